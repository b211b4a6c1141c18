import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scansteer.core import likelihood
from scansteer.core.likelihood import Noise

N_CELLS, N_IMAGES = 5, 6


def example(seed=0, n_nuisances=2, n_voxels=3, amplitude=1000.0, sigma=4.0):
    """Columns (image, column, cell) with a signal and small nuisance derivatives, and signals made from cell 2."""
    rng = np.random.default_rng(seed)
    signal = rng.uniform(0.3, 0.9, (N_IMAGES, 1, N_CELLS))
    columns = np.concatenate([signal, 0.01 * rng.standard_normal((N_IMAGES, n_nuisances, N_CELLS))], axis=1)
    coefficients = np.concatenate([np.ones((1, n_voxels)), rng.standard_normal((n_nuisances, n_voxels))])
    measured = amplitude * columns[:, :, 2] @ coefficients + sigma * rng.standard_normal((N_IMAGES, n_voxels))
    return columns, measured


UPDATE, FIT = jax.jit(likelihood.update), jax.jit(likelihood.fit)


def absorbed(columns, measured):
    sums = likelihood.init(measured.shape[1], 1, columns.shape[1], columns.shape[2])
    for expected, seen in zip(columns, measured, strict=True):
        sums = UPDATE(sums, jnp.asarray(expected)[:, None], jnp.asarray(seen))
    return sums


def noise(sigma=4.0, dof=1e6, discrepancy=0.0):
    return Noise(jnp.asarray(sigma), jnp.asarray(dof), jnp.asarray(discrepancy))


def by_integration(columns, seen, sigma):
    """log of the integral over amplitude (prior 1/a) and nuisances (N(0, 1)), the latter in closed form, the former on a grid."""
    amplitudes = np.linspace(700.0, 1400.0, 20001)
    values = []
    for cell in range(N_CELLS):
        mean, slopes = columns[:, 0, cell], columns[:, 1:, cell]
        eigen, basis = np.linalg.eigh(slopes @ slopes.T)
        variance = sigma**2 + amplitudes[:, None] ** 2 * np.maximum(eigen, 0.0)
        residual = (seen @ basis)[None] - amplitudes[:, None] * (mean @ basis)[None]
        log = -0.5 * np.sum(residual**2 / variance + np.log(variance), axis=1) - np.log(amplitudes)
        values.append(np.log(np.sum(np.exp(log - log.max()))) + log.max())
    return np.array(values)


def test_likelihood_equals_the_integral_over_amplitude_and_nuisances():
    columns, measured = example()
    fit = FIT(absorbed(columns, measured), noise())
    got = np.array(fit.log_likelihood)[:, 0]
    expected = by_integration(columns, measured[:, 0], 4.0)
    near = expected > expected.max() - 12  # elsewhere nobody looks
    difference = (got - got[2]) - (expected - expected[2])
    assert near.sum() >= 1
    # the ridge takes the amplitude of the lattice point for the integrated one; that is worth a few hundredths here
    np.testing.assert_allclose(difference[near], 0, atol=0.1)


def test_likelihood_separates_close_cells_as_the_integral_does():
    columns, measured = example(seed=3)
    columns = columns[:, :, [2]] * np.linspace(0.99, 1.01, N_CELLS) + np.linspace(-0.01, 0.01, N_IMAGES)[:, None, None] * np.linspace(
        -1, 1, N_CELLS
    )
    got = np.array(FIT(absorbed(columns, measured), noise()).log_likelihood)[:, 1]
    expected = by_integration(columns, measured[:, 1], 4.0)
    np.testing.assert_allclose(got - got.max(), expected - expected.max(), atol=0.1)


@pytest.mark.parametrize("n_nuisances", [0, 1, 3])
@pytest.mark.parametrize("discrepancy", [0.0, 0.01])
def test_a_single_image_says_nothing(n_nuisances, discrepancy):
    columns, measured = example(n_nuisances=n_nuisances, n_voxels=1)
    fit = FIT(absorbed(columns[:1], measured[:1]), noise(dof=3.0, discrepancy=discrepancy))
    np.testing.assert_allclose(np.ptp(np.array(fit.log_likelihood), axis=0), 0, atol=2e-5)  # float32 logarithms


def test_order_of_images_does_not_matter():
    columns, measured = example()
    order = np.random.default_rng(1).permutation(N_IMAGES)
    one, other = (FIT(absorbed(c, m), noise()) for c, m in ((columns, measured), (columns[order], measured[order])))
    np.testing.assert_allclose(one.log_likelihood, other.log_likelihood, rtol=1e-5)


def test_a_known_nuisance_shift_equals_columns_moved_by_it():
    columns, measured = example(n_voxels=1)
    shift = jnp.array([[1.7], [-0.6]])
    moved = columns.copy()
    moved[:, 0] += np.einsum("icx,c->ix", columns[:, 1:], np.array(shift)[:, 0])
    # one noise level for both: the ridge must not differ through the implied amplitude
    shifted = FIT(absorbed(columns, measured), noise(), shift)
    centred = FIT(absorbed(moved, measured), noise())
    np.testing.assert_allclose(shifted.residual, centred.residual, rtol=1e-2)
    np.testing.assert_allclose(shifted.amplitude, centred.amplitude, rtol=1e-3)


def test_voxels_of_unlike_brightness_share_the_mean_of_the_amplitudes_that_they_imply():
    """Against linear algebra, cell by cell: ridge and variance are those of the block's mean signal."""
    columns, measured = example(n_nuisances=3)
    measured = measured * np.array([0.6, 1.0, 1.3])
    fit = FIT(absorbed(columns, measured), noise(discrepancy=0.01))
    for cell in range(N_CELLS):
        f, x = columns[:, 0, cell], columns[:, 1:, cell]
        implied = (f @ measured.mean(axis=1) / (f @ f)) ** 2
        variance = 4.0**2 + 0.01**2 * implied
        without = np.eye(N_IMAGES) - x @ np.linalg.solve(x.T @ x + variance / implied * np.eye(3), x.T)
        amplitude = f @ without @ measured / (f @ without @ f)
        rest = measured - f[:, None] * amplitude
        np.testing.assert_allclose(fit.amplitude[cell], amplitude, rtol=1e-5)  # float32
        np.testing.assert_allclose(fit.residual[cell], np.einsum("iv,ij,jv->v", rest, without, rest), rtol=1e-4)


def test_unknown_noise_widens_the_likelihood():
    columns, measured = example(sigma=4.0)
    sums = absorbed(columns, measured)
    sure, unsure = (np.array(FIT(sums, noise(dof=dof)).log_likelihood)[:, 0] for dof in (1e6, 2.0))
    assert np.ptp(unsure) < np.ptp(sure)


def test_mixture_of_equal_components_is_the_component():
    columns, measured = example()
    one = FIT(absorbed(columns, measured), noise())
    sums = likelihood.init(measured.shape[1], 2, columns.shape[1], columns.shape[2])
    for expected, seen in zip(columns, measured, strict=True):
        sums = UPDATE(sums, jnp.stack([jnp.asarray(expected)] * 2, axis=1), jnp.asarray(seen))
    two = FIT(sums, noise())
    np.testing.assert_allclose(two.log_likelihood - jnp.log(2.0), one.log_likelihood, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(two.residual, one.residual, rtol=1e-4)


def test_noise_in_pixel_units_does_not_bias_the_fraction():
    """Toy with a saturation that grows with f: with the normaliser in place the mean error over many voxels vanishes."""
    rng = np.random.default_rng(5)
    f = np.linspace(0.2, 1.8, 81)
    strengths = np.array([0.1, 0.9, 0.5, 0.7, 0.3])
    columns = 1 / (1 + strengths[:, None, None] * f)
    sigma, amplitude = 0.02, 1.0
    truth = np.full(400, 40)
    measured = amplitude * columns[:, 0, truth] + sigma * rng.standard_normal((len(strengths), len(truth)))
    fit = FIT(absorbed(columns, measured), noise(sigma))
    weight = jax.nn.softmax(fit.log_likelihood, axis=0)
    mean = np.array(weight.T @ f)
    assert abs(mean.mean() - 1.0) < 0.04  # without the normaliser: +0.1 and more


def test_a_cell_whose_nuisances_leave_nothing_of_the_amplitude_is_improbable():
    rng = np.random.default_rng(5)
    signal = rng.uniform(0.3, 0.9, N_IMAGES)
    nuisance = 0.5 * signal + 0.1 * rng.standard_normal(N_IMAGES)
    columns = np.broadcast_to(np.stack([signal, nuisance], axis=1)[..., None], (N_IMAGES, 2, N_CELLS))
    per_nuisance = (signal @ signal) / (nuisance @ signal)
    # all of the same brightness, explained by ever less of the signal and ever more of the nuisance
    shares = np.array([1.0, 0.1, 0.0, -0.1, -0.3])
    seen = 1000.0 * (shares * signal[:, None] + (1 - shares) * nuisance[:, None] * per_nuisance)
    fit = FIT(absorbed(columns, seen), noise())
    assert np.all(np.diff(fit.log_likelihood[0, 1:]) < -10)  # a tenth of the amplitude is the least that is believed
    assert np.all(fit.amplitude > 0)
