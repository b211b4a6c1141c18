import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import beta

from scansteer.core import region, resolution, stopping
from scansteer.core.grid_posterior import make_prior
from scansteer.core.lattice import Box

N = 64
BOX = Box(jnp.array([0.0, 0.0]), jnp.array([0.004, 1500.0]), (N, N))
LOG_PRIOR = tuple(jnp.full(N, -np.log(side), jnp.float32) for side in (0.004, 1500.0))


SUMMARISE = jax.jit(region.summarise)


def lattice():
    steps = jnp.arange(N, dtype=jnp.float64)
    return np.array(BOX.value(0, steps)), np.array(BOX.value(1, steps))


def gaussian(mean, sd, rho):
    f, k = lattice()
    a, b = (f[:, None] - mean[0]) / sd[0], (k[None] - mean[1]) / sd[1]
    return -0.5 * (a * a - 2 * rho * a * b + b * b) / (1 - rho**2)


def summary_of(*log_posteriors):
    padded = [*log_posteriors, *log_posteriors[-1:] * (2 - len(log_posteriors))]  # one shape, one compilation
    return SUMMARISE(jnp.asarray(np.stack(padded), jnp.float32), LOG_PRIOR, BOX)


@pytest.mark.parametrize("scale", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("rho", [0.0, 0.8, -0.95])
def test_gaussian_of_any_width_keeps_its_area_and_intervals(scale, rho):
    mean, sd = (0.0018, 400.0), (2e-4 * scale, 40.0 * scale)
    got = summary_of(gaussian(mean, sd, rho))
    area = np.pi * 5.9915 * sd[0] * sd[1] * np.sqrt(1 - rho**2)
    assert got.cr_area[0] == pytest.approx(area, rel=0.02)
    for axis in (0, 1):
        assert got.map[0, axis] == pytest.approx(mean[axis], abs=0.25 * sd[axis])  # a fine cell is a seventh of sd
        assert got.mean[0, axis] == pytest.approx(mean[axis], abs=0.03 * sd[axis])
        assert got.upper[0, axis] - got.lower[0, axis] == pytest.approx(3.92 * sd[axis], rel=0.02)
        assert got.covariance[0, axis, axis] == pytest.approx(sd[axis] ** 2, rel=0.03)
    assert got.covariance[0, 0, 1] == pytest.approx(rho * sd[0] * sd[1], abs=0.03 * sd[0] * sd[1])


@pytest.mark.parametrize("sd", [0.05, 0.1, 0.2, 0.5])
@pytest.mark.parametrize("rho", [0.0, 0.9, -0.95])
@pytest.mark.parametrize("dof", [10, 200])
def test_a_posterior_far_narrower_than_a_lattice_step_stays_in_place(sd, rho, dof):
    """A Student-t whose peak lies between lattice points, as small as a twentieth of a step; the error of its mean is a share of its width."""
    n_images, centres = 31, 30 + np.random.default_rng(0).uniform(0, 1, (16, 2))
    power, steps = dof + n_images - 1, np.arange(N)
    a, b = (steps[None, :, None] - centres[:, :1, None]) / sd, (steps[None, None] - centres[:, 1:, None]) / sd
    misfit = (a * a - 2 * rho * a * b + b * b) / (1 - rho**2)
    got = SUMMARISE(jnp.asarray(-0.5 * power * np.log1p(misfit / power), jnp.float32), LOG_PRIOR, BOX, jnp.asarray(float(power)))
    at = [np.asarray(each(axis, jnp.asarray(centres[:, axis]))) for each in (BOX.value, BOX.slope) for axis in (0, 1)]
    widths = np.stack(at[2:], axis=1) * sd * np.sqrt(power / (power - 4))
    np.testing.assert_array_less(np.abs(got.mean - np.stack(at[:2], axis=1)), 0.1 * widths)
    np.testing.assert_allclose((got.upper - got.lower) / 3.92, widths, rtol=0.06)
    np.testing.assert_allclose(got.cr_area, np.pi * 5.9915 * widths[:, 0] * widths[:, 1] * np.sqrt(1 - rho**2), rtol=0.12)


def test_anytime_region_is_where_the_posterior_exceeds_a_twentieth_of_the_prior():
    sd = (2e-4, 40.0)
    got = summary_of(gaussian((0.0018, 400.0), sd, 0.0))
    peak_ratio = 0.004 * 1500 / (2 * np.pi * sd[0] * sd[1])
    radius2 = 2 * np.log(peak_ratio / 0.05)
    assert got.anytime_area[0] == pytest.approx(np.pi * radius2 * sd[0] * sd[1], rel=0.03)
    assert got.anytime_area[0] > got.cr_area[0]


def test_flat_posterior_fills_the_box_and_is_not_prior_limited():
    got = summary_of(np.zeros((N, N)))
    assert got.cr_area[0] == pytest.approx(0.95 * 6.0, rel=0.02)
    assert got.anytime_area[0] == pytest.approx(6.0, rel=0.01)
    assert float(got.edge_mass.max()) < 0.025
    np.testing.assert_allclose(got.lower[0], [0.0001, 37.5], rtol=0.03)


@pytest.mark.parametrize("power", [None, 2.0, 5.0])
def test_nothing_seen_gives_the_prior_back_however_little_is_known_of_the_noise(power):
    prior = make_prior(jnp.array([0.0, 0.0]), jnp.array([0.004, 1500.0]), (N, N), ("beta", "beta"))
    on_lattice = jnp.tile(prior.on_cells().reshape(1, N, N), (2, 1, 1))
    given = (on_lattice, prior.log_density, prior.box)
    got = SUMMARISE(*given) if power is None else SUMMARISE(*given, jnp.asarray(power))
    edges = beta(2, 2).ppf([0.025, 0.975])
    for axis, side in enumerate((0.004, 1500.0)):
        assert got.mean[0, axis] == pytest.approx(0.5 * side, rel=0.005)
        assert got.covariance[0, axis, axis] == pytest.approx(side**2 / 20, rel=0.01)
        np.testing.assert_allclose([got.lower[0, axis], got.upper[0, axis]], edges * side, rtol=0.01)


def test_mass_at_an_edge_is_prior_limited():
    got = summary_of(gaussian((0.004, 400.0), (5e-5, 40.0), 0.0), gaussian((0.002, 0.0), (2e-4, 20.0), 0.0))
    assert got.edge_mass[0, 0] > 0.3
    assert got.edge_mass[0, 1] < 1e-3
    assert got.edge_mass[1, 1] > 0.3


@pytest.mark.parametrize("n_points", [resolution.COARSE, resolution.FINE])
@pytest.mark.parametrize("way", [8, -8])
def test_a_beta_prior_does_not_hide_that_a_posterior_is_pushed_against_an_edge(n_points, way):
    """Of a truth beyond the edge, where the likelihood grows by exp(8 x) over the side; the prior by itself is not pushed."""
    prior = make_prior(jnp.array([0.0, 0.0]), jnp.array([0.004, 1500.0]), n_points, ("beta", "beta"))
    alone = prior.on_cells().reshape(n_points)
    pushed = alone + way * (jnp.arange(n_points[0]) / (n_points[0] - 1))[:, None] ** 2  # points are even in the root of f
    edge = SUMMARISE(jnp.stack([alone, pushed]).astype(jnp.float32), prior.log_density, prior.box).edge_mass
    assert float(edge[0].max()) < 0.5 * stopping.BETA_PRIOR_LIMIT
    assert stopping.BETA_PRIOR_LIMIT < float(edge[1, 0]) < stopping.PRIOR_LIMIT


def test_banana_agrees_with_a_dense_grid():
    f, k = np.linspace(0, 0.004, 1201), np.linspace(0, 1500, 1201)

    def log_density(f, k):
        return -0.5 * ((f[:, None] * k[None] - 0.5) / 0.05) ** 2 - 0.5 * ((k[None] - 350) / 120) ** 2

    dense = log_density(f, k)
    mass = np.exp(dense - dense.max())
    mass /= mass.sum()
    ordered = np.sort(mass.ravel())[::-1]
    n_inside = np.searchsorted(np.cumsum(ordered), 0.95) + 1
    area = n_inside * (f[1] - f[0]) * (k[1] - k[0])
    got = summary_of(log_density(*lattice()))
    assert got.cr_area[0] == pytest.approx(area, rel=0.03)
    cdf = np.cumsum(mass.sum(axis=1))
    assert got.lower[0, 0] == pytest.approx(np.interp(0.025, cdf, f), rel=0.02)
    assert got.upper[0, 0] == pytest.approx(np.interp(0.975, cdf, f), rel=0.02)


def test_a_voxel_does_not_depend_on_its_neighbours():
    one, two = gaussian((0.001, 300.0), (2e-4, 40.0), 0.3), gaussian((0.003, 900.0), (4e-4, 90.0), -0.5)
    with_itself, with_another = summary_of(one, one), summary_of(one, two)
    np.testing.assert_array_equal(with_itself.cr_area[0], with_another.cr_area[0])
