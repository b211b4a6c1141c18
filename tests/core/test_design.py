"""The choice of the next pulse: who is asked, where posteriors are drawn, and what an image is worth."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from one_voxel import between, question
from scansteer.core import design
from scansteer.core.design import Conditional, Quota
from scansteer.core.lack_of_fit import FARTHEST_BEYOND
from scansteer.core.lattice import Box
from scansteer.core.nuisance import SPREAD

BOX = Box(jnp.array([0.0, 0.0]), jnp.array([0.004, 1500.0]), (40, 40))


def gaussian(mean, covariance):
    """Log density on the lattice, voxel by voxel, up to a constant."""
    f, k = (np.asarray(BOX.value(axis, jnp.arange(40.0))) for axis in (0, 1))
    points = np.stack(np.meshgrid(f, k, indexing="ij"), axis=-1).reshape(-1, 2)
    off = points - np.asarray(mean)[:, None]
    return -0.5 * np.einsum("vci,vij,vcj->vc", off, np.linalg.inv(covariance), off)


def variance_over(drawn, values):
    """What `contrast` makes of values at the lattice cells."""
    at = values[drawn.cells]
    return np.sum(np.einsum("vhk,vk->vh", drawn.contrast, at) ** 2, axis=1)


def test_stratified_voxels_spread_over_both_parameters():
    values = np.random.default_rng(0).uniform(size=(900, 2))
    chosen = design.stratify(np.arange(900), values, 25)
    assert len(set(chosen)) == 25
    assert np.all(np.histogram(values[chosen, 0], bins=5, range=(0, 1))[0] >= 3)
    assert np.all(np.histogram(values[chosen, 1], bins=5, range=(0, 1))[0] >= 3)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=12), st.integers(1, 200))
def test_no_region_starves(sizes, n):
    shares = design.share_out(sizes, n)
    assert sum(shares) <= n
    assert len(shares) == len(sizes)
    at_least = max(1, int(0.5 * (n - len(sizes)) / len(sizes)))
    assert all(min(size, at_least) <= share <= size for share, size in zip(shares[:n], sizes[:n], strict=True))
    assert not any(shares[n:])


def test_draws_of_a_wide_posterior_vary_as_it_does():
    mean, sd = np.array([[0.002, 700.0]]), np.array([4e-4, 150.0])
    covariance = np.array([[[sd[0] ** 2, 0.6 * sd[0] * sd[1]], [0.6 * sd[0] * sd[1], sd[1] ** 2]]])
    f, k = (np.asarray(BOX.value(axis, jnp.arange(40.0))) for axis in (0, 1))
    drawn = [design.draw(gaussian(mean, covariance), mean, covariance, BOX, seed) for seed in range(200)]
    assert not np.any(drawn[0].weights == 1)  # sampled, not linearised
    spread = np.mean([variance_over(each, np.repeat(f, 40)) for each in drawn])
    assert spread == pytest.approx(sd[0] ** 2, rel=0.1)  # 16 draws at a time
    assert np.mean([variance_over(each, np.tile(k, 40)) for each in drawn]) == pytest.approx(sd[1] ** 2, rel=0.1)


def test_a_posterior_narrower_than_the_lattice_is_linearised():
    mean, sd = np.array([[0.002, 700.0]]), np.array([2e-5, 9.0])
    covariance = np.array([[[sd[0] ** 2, -0.7 * sd[0] * sd[1]], [-0.7 * sd[0] * sd[1], sd[1] ** 2]]])
    drawn = design.draw(gaussian(mean, covariance), mean, covariance, BOX, 0)
    f, k = (np.asarray(BOX.value(axis, jnp.arange(40.0))) for axis in (0, 1))
    total = np.repeat(f, 40) / sd[0] + np.tile(k, 40) / sd[1]
    assert variance_over(drawn, total)[0] == pytest.approx(2 - 2 * 0.7, rel=0.1)  # a step of the lattice is not straight in f and k


def test_a_narrow_posteriors_mean_is_reached_from_its_nearest_cell_along_the_gradient():
    position = np.array([20.3, 30.6])
    mean = np.array([[float(BOX.value(axis, jnp.asarray(position[axis]))) for axis in (0, 1)]])
    narrow = np.array([[[1e-12, 0.0], [0.0, 1e-6]]])
    drawn = design.draw(np.zeros((1, BOX.n_cells), np.float32), mean, narrow, BOX, 0)
    row, column = np.divmod(drawn.cells[0], 40)
    assert drawn.mean_weights[0] @ (3.0 * row - 2.0 * column) == pytest.approx(3.0 * 20.3 - 2.0 * 30.6)
    assert drawn.mean_weights.sum() == pytest.approx(1.0)
    assert np.all(drawn.weights[0] == [1, *[0] * (design.N_DRAWS - 1)])


def test_a_wide_posteriors_draws_all_count_the_same():
    mean, wide = np.array([[0.002, 700.0]]), np.array([[[4e-7, 0.0], [0.0, 4e4]]])
    drawn = design.draw(gaussian(mean, wide), mean, wide, BOX, 0)
    assert np.all(drawn.mean_weights == 1 / design.N_DRAWS)


def test_amplitude_and_nuisance_given_the_images_are_the_gaussian_they_should_be():
    """Against the normal equations: unknown amplitude, one nuisance whose coefficient has variance 1 (times amplitude)."""
    rng = np.random.default_rng(1)
    columns, sigma, amplitude = np.stack([rng.uniform(0.3, 1, 6), rng.normal(0, 0.1, 6)], axis=1), 4.0, 1000.0
    signals = amplitude * columns @ [1.0, 0.5] + rng.normal(0, sigma, 6)
    asked = question(columns, signals, sigma, np.eye(2))
    given = design.condition(asked, design.fitted(asked))
    implied = (columns[:, 0] @ signals / (columns[:, 0] @ columns[:, 0])) ** 2
    precision = columns.T @ columns / sigma**2 + np.diag([0, 1 / implied])
    covariance = np.linalg.inv(precision)
    candidate = np.array([0.6, 0.2])
    mean, spread = np.asarray(given.mean)[0, 0], np.asarray(given.root)[0, 0]
    assert candidate @ mean == pytest.approx(candidate @ covariance @ columns.T @ signals / sigma**2, rel=1e-5)  # float32
    assert sigma**2 * np.sum((candidate @ spread) ** 2) == pytest.approx(candidate @ covariance @ candidate, rel=1e-4)


def overrun(columns, signals, sigma):
    asked = question(columns, signals, sigma, np.eye(columns.shape[1]))
    return np.asarray(design.overrun(asked, design.fitted(asked)))[0]


@pytest.mark.parametrize(("coefficient", "size"), [(-4.0, 0.02), (1.0, 0.02), (3.0, 0.02), (3.0, 0.3)])
def test_how_far_a_nuisance_lies_beyond_its_range_is_what_least_squares_without_its_prior_say(coefficient, size):
    """Large nuisances are known so well that the amplitude's error counts beside theirs."""
    rng = np.random.default_rng(3)
    columns, sigma = np.stack([rng.uniform(0.3, 1, 8), rng.normal(0, size, 8), 1e-6 * rng.normal(size=8)], axis=1), 4.0
    signals = 1000.0 * columns @ [1.0, coefficient, 0.0] + rng.normal(0, sigma, 8)
    amplitude, scaled = np.linalg.lstsq(columns[:, :2], signals, rcond=None)[0]
    covariance = sigma**2 * np.linalg.inv(columns[:, :2].T @ columns[:, :2])
    to_coefficient = np.array([-scaled / amplitude, 1.0]) / amplitude
    sd = np.sqrt(to_coefficient @ covariance @ to_coefficient)
    found = overrun(columns, signals, sigma)
    assert found[0] == pytest.approx((abs(scaled / amplitude) - 3**0.5 / SPREAD) / sd, rel=0.05)
    assert found[1] == -np.inf  # nothing is told of it


def test_how_far_beyond_is_told_at_the_posteriors_mean_and_not_at_its_nearest_cell():
    rng = np.random.default_rng(5)
    signal, nuisance = rng.uniform(0.3, 1, 8), rng.normal(0, 0.02, 8)
    images = 1000.0 * (signal + 3 * nuisance) + rng.normal(0, 4.0, 8)
    ends = [question(np.stack([each, nuisance], axis=1), images, 4.0, np.eye(2)) for each in (signal, signal + 0.2 * nuisance)]

    def told(share: float) -> float:
        asked = between(*ends, np.array([[1 - share, share]]))
        return float(np.asarray(design.overrun(asked, design.fitted(asked)))[0, 0])

    assert told(0.0) > told(1.0) + 1
    assert told(0.25) == pytest.approx(0.75 * told(0.0) + 0.25 * told(1.0))


def test_a_nuisance_within_its_range_is_seldom_said_to_be_beyond():
    rng = np.random.default_rng(4)
    columns, sigma = np.stack([rng.uniform(0.3, 1, 8), rng.normal(0, 0.02, 8)], axis=1), 4.0
    within = [1000.0 * columns @ [1.0, each] + rng.normal(0, sigma, 8) for each in rng.uniform(-1, 1, 300) * 3**0.5 / SPREAD]
    assert np.mean([overrun(columns, signals, sigma)[0] > FARTHEST_BEYOND for signals in within]) < 0.01
    beyond = [1000.0 * columns @ [1.0, 2 * 3**0.5 / SPREAD] + rng.normal(0, sigma, 8) for _ in range(20)]
    assert np.mean([overrun(columns, signals, sigma)[0] > FARTHEST_BEYOND for signals in beyond]) > 0.9


def test_a_mixture_leans_to_the_component_that_explains_the_images():
    rng = np.random.default_rng(2)
    right, wrong = rng.uniform(0.3, 1, 8), rng.uniform(0.3, 1, 8)
    signals = 1000.0 * right + rng.normal(0, 2.0, 8)
    asked = question(right[:, None], signals, 2.0, np.array([[1.0, 0.0]]))
    both = [np.array([[c @ c]]) for c in (wrong, right)]
    asked = asked.__class__(**{name: getattr(asked, name) for name in asked.__dataclass_fields__} | {
        "weights": np.stack([[[0.0, 1.0]], [[1.0, 0.0]]])[None],
        "gram": np.stack(both)[None, None],
        "projection": np.array([[wrong @ signals], [right @ signals]])[None, None],
    })  # fmt: skip
    mean = np.asarray(design.condition(asked, design.fitted(asked)).mean)[0, 0]
    assert mean[0] == pytest.approx(1000.0, rel=0.01)  # the right one reads the first node
    assert abs(mean[1]) < 1e-3 * mean[0]


def test_gain_of_a_gaussian_is_what_its_log_area_loses():
    """One draw's contrast of unit variance along a line: 1/2 log(1 + slope^2 / s^2)."""
    given = Conditional(jnp.zeros((1, 2, 2)), jnp.zeros((1, 2, 2, 1)), jnp.full((1, 2), 4.0))
    mean = jnp.array([[[0.0, 0.0], [3.0, 1.0]]])  # two draws, two candidates: at draw 2 they read 3 and 1 more
    contrast, weights = jnp.array([[[-1.0, 1.0]]]), jnp.array([[1.0, 0.0]])
    gains = design.gain((mean, [jnp.zeros((1, 2, 2))]), given, weights, contrast)
    np.testing.assert_allclose(gains[0], 0.5 * np.log1p(np.array([9.0, 1.0]) / 4), rtol=1e-6)


def test_joint_gain_of_one_image_is_its_gain_and_grows_with_more():
    rng = np.random.default_rng(3)
    given = Conditional(jnp.zeros((2, 4, 3)), jnp.zeros((2, 4, 3, 2)), jnp.asarray(rng.uniform(1, 2, (2, 4))))
    read = (jnp.asarray(rng.normal(size=(2, 4, 5))), [jnp.asarray(rng.normal(size=(2, 4, 5))) for _ in range(2)])
    weights = jnp.full((2, 4), 0.25)
    contrast = jnp.asarray(np.broadcast_to((np.eye(4) - 0.25) / 2, (2, 4, 4)))
    single = design.gain(read, given, weights, contrast)
    together = [design.joint_gain(read, jnp.asarray(np.arange(5) < n, float), given, weights, contrast) for n in range(1, 6)]
    np.testing.assert_allclose(together[0], single[:, 0], rtol=1e-5)
    assert np.all(np.diff(np.array(together), axis=0) > 0)


@settings(max_examples=40)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(0, 2**31))
def test_a_pulse_is_barred_once_its_neighbourhood_has_had_its_share(window, most, seed):
    quota = Quota(window=window + 1, most=most, radius=0.1)
    latest = np.random.default_rng(seed).choice([0.1, 0.5], size=(12, 2))
    here = np.array([[0.1, 0.1]])
    alike = np.sum(np.all(latest[-window:] == 0.1, axis=1))
    assert design.barred(quota, here, latest)[0] == (alike >= most)


def test_random_choices_depend_on_scan_and_image_only():
    assert design.seed_of("a", 3) == design.seed_of("a", 3)
    assert len({design.seed_of("a", 3), design.seed_of("a", 4), design.seed_of("b", 3)}) == 3
