"""The coordinate in which posteriors are Gaussian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scansteer.core import coordinate as coordinates
from scansteer.core.coordinate import Coordinate
from scansteer.core.grid_posterior import make_prior

SHAPES = ["uniform", "log-uniform", "beta"]


def of_shape(shape) -> Coordinate:
    return Coordinate(jnp.array([0.1, 1.0]), jnp.array([2.0, 50.0]), (shape, shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_places_are_inverted(shape):
    coordinate, z = of_shape(shape), jnp.linspace(-4, 4, 33)
    for axis in (0, 1):
        np.testing.assert_allclose(coordinate.z(axis, coordinate.value(axis, z)), z, atol=1e-9)
        np.testing.assert_allclose(coordinate.from_place(axis, coordinate.place(axis, z)), z, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_slope_is_the_derivative_of_the_value(shape):
    coordinate, z = of_shape(shape), jnp.linspace(-3, 3, 13)
    np.testing.assert_allclose(coordinate.slope(1, z), jax.vmap(jax.grad(lambda each: coordinate.value(1, each)))(z), rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_single_precision_gives_the_same_places_slopes_and_densities(shape):
    coordinate, z = of_shape(shape), jnp.linspace(-4.8, 4.8, 65)
    single = z.astype(jnp.float32)
    np.testing.assert_allclose(coordinate.place(0, single), coordinate.place(0, z), atol=1e-5)  # float32, 24 steps of a recurrence
    np.testing.assert_allclose(coordinate.value(0, single), coordinate.value(0, z), atol=2e-5)
    inner = np.abs(np.asarray(z)) < 4
    np.testing.assert_allclose(coordinate.slope(0, single)[inner], coordinate.slope(0, z)[inner], rtol=5e-4, atol=1e-6)
    density = coordinate.log_prior(0, coordinate.value(0, z))
    np.testing.assert_allclose(coordinate.log_density(0, single)[inner], jnp.broadcast_to(density, z.shape)[inner], atol=5e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_prior_of_the_lattice_is_a_standard_normal(shape):
    coordinate = of_shape(shape)
    prior = make_prior(jnp.array(coordinate.lower), jnp.array(coordinate.upper), (64, 64), (shape, shape))
    values = prior.box.value(0, jnp.arange(1, 63, dtype=jnp.float64))
    np.testing.assert_allclose(coordinate.log_prior(0, values), prior.log_density[0][1:63], atol=1e-4)  # float32


def test_whitening_inverts_the_root():
    covariance = jnp.array([[[2.0, -0.6], [-0.6, 0.5]]])
    root = coordinates.root_of(covariance)
    np.testing.assert_allclose(coordinates.covariance(root), covariance, rtol=1e-12)
    e = jnp.array([[[0.3, -1.2]]])
    moved = coordinates.points(jnp.zeros((1, 2)), root, np.asarray(e[0])).T
    np.testing.assert_allclose(coordinates.whiten(moved, root[:, None]), e, rtol=1e-12)
