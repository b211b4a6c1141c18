"""Distances between posteriors, draws, contrast against uncertainty."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scansteer.core import agreement, gaussian_region, region
from scansteer.core import coordinate as coordinates
from scansteer.core.coordinate import Coordinate
from scansteer.core.encoder import Gaussian
from scansteer.core.grid_posterior import make_prior

LOWER, UPPER = jnp.array([0.0, 0.0]), jnp.array([0.3, 70.0])
COORDINATE = Coordinate(LOWER, UPPER, ("uniform", "beta"))
PRIOR = make_prior(LOWER, UPPER, (64, 64), ("uniform", "beta"))
POSTERIOR = Gaussian(
    jnp.array([[0.2, -0.4], [-0.8, 0.3], [-0.5, 0.1]], jnp.float32),
    jnp.array([[0.3, -0.2, 0.25], [0.06, 0.03, 0.05], [0.4, 0.2, 0.35]], jnp.float32),
)


def on_lattice(posterior: Gaussian):
    """Log density over (f, k) on the lattice's cells."""
    box = PRIOR.box
    values = [box.value(axis, jnp.arange(64, dtype=jnp.float32)) for axis in (0, 1)]
    z = jnp.stack(jnp.meshgrid(*(COORDINATE.z(axis, values[axis]) for axis in (0, 1)), indexing="ij"), axis=-1).reshape(1, -1, 2)
    ratio = coordinates.log_normal(coordinates.whiten(z - posterior.mean[:, None], posterior.root[:, None]), posterior.root[:, None])
    return (ratio + 0.5 * jnp.sum(z**2, axis=-1) + PRIOR.on_cells())


LATTICE = agreement.follow(on_lattice(POSTERIOR), PRIOR, COORDINATE)


def test_moments_of_a_lattice_are_those_of_its_gaussian():
    found = agreement.moments(LATTICE)
    np.testing.assert_allclose(coordinates.whiten(found.mean - POSTERIOR.mean, POSTERIOR.root), 0.0, atol=0.03)  # cubic in the lattice's steps
    np.testing.assert_allclose(found.root, POSTERIOR.root, rtol=0.05, atol=0.005)


def test_without_data_and_degrees_of_freedom_the_posterior_is_the_prior():
    found = agreement.moments(agreement.follow(PRIOR.on_cells()[None], PRIOR, COORDINATE, jnp.asarray(2.0)))
    np.testing.assert_allclose(found.mean, 0.0, atol=1e-3)
    np.testing.assert_allclose(found.root, [[1.0, 0.0, 1.0]], atol=0.005)


def test_a_perfect_match_has_the_median_of_chi():
    distances = jax.jit(lambda key: agreement.compare(key, POSTERIOR, LATTICE, 4000))(jax.random.PRNGKey(0))
    for each in distances:
        np.testing.assert_allclose(np.median(each, axis=1), 1.177, rtol=0.04)
        assert np.mean(each > agreement.TOO_FAR) < 2e-3


def test_a_shifted_posterior_is_found_out():
    shifted = Gaussian(POSTERIOR.mean + 3 * POSTERIOR.root[:, :1], POSTERIOR.root)
    distances = agreement.compare(jax.random.PRNGKey(0), shifted, LATTICE, 400)
    assert np.median(distances.m1) > 2.5
    assert np.median(distances.m2) > 2.5


def test_regions_of_a_gaussian_are_those_of_its_lattice():
    ours = jax.jit(lambda posterior: gaussian_region.summarise(posterior, posterior.mean.T, COORDINATE))(POSTERIOR)
    theirs = jax.jit(lambda lattice: region.summarise(lattice, PRIOR.log_density, PRIOR.box))(on_lattice(POSTERIOR).reshape(-1, 64, 64))
    width = theirs.upper - theirs.lower
    np.testing.assert_allclose((ours.lower - theirs.lower) / width, 0.0, atol=0.03)
    np.testing.assert_allclose((ours.upper - theirs.upper) / width, 0.0, atol=0.03)
    np.testing.assert_allclose(ours.mean / theirs.mean, 1.0, rtol=0.02)
    np.testing.assert_allclose(ours.cr_area / theirs.cr_area, 1.0, rtol=0.12)  # an ellipse in z is not quite the densest region in (f, k)
    np.testing.assert_allclose(ours.anytime_area / theirs.anytime_area, 1.0, rtol=0.05)


def test_the_mode_of_a_posterior_that_knows_little_stays_in_the_box():
    prior = Gaussian(jnp.array([[0.01, -0.02]], jnp.float32), jnp.array([[0.999, 0.0, 0.999]], jnp.float32))
    assert np.all(np.abs(gaussian_region.mode(prior)) <= 3.5)


def test_a_posterior_draw_is_a_map_within_the_box():
    drawn = agreement.posterior_draw(jax.random.PRNGKey(1), POSTERIOR, COORDINATE)
    assert drawn.shape == (3, 2)
    assert np.all((drawn >= LOWER) & (drawn <= UPPER))


def test_contrast_to_uncertainty_is_that_of_two_normals():
    draws = jax.random.normal(jax.random.PRNGKey(2), (2, 200, 100)) * jnp.array([1.0, 2.0])[:, None, None] + jnp.array([0.0, 3.0])[:, None, None]
    found = agreement.contrast_to_uncertainty(draws[0], draws[1])
    assert float(found) == pytest.approx(3 / np.sqrt(2.5), rel=0.03)
