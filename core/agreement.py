"""How well two posteriors of the same voxel agree, and what a person reads off posteriors: draws, and contrast against uncertainty."""

from __future__ import annotations

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from scansteer.core import coordinate as coordinates
from scansteer.core import region
from scansteer.core.coordinate import Coordinate
from scansteer.core.encoder import Gaussian
from scansteer.core.lattice import Box

N_FINE = 40
"""Fine cells per parameter over the window that holds the mass."""
REACH = 15.0
"""The window holds all of the lattice within so many nats of the peak."""
TOO_FAR = 4.0
"""Mahalanobis distance beyond which two posteriors do not agree (3e-4 of the draws of a perfect match)."""


class Lattice(eqx.Module):
    """A posterior on fine cells that follow it; leaves (voxel, ..)."""

    places: tuple[Float[Array, "voxel fine"], Float[Array, "voxel fine"]]
    """Centres of the cells along f and k, 0 .. 1 along the lattice's axes."""
    widths: Float[Array, "voxel 2"]
    """Of the cells, in the same unit."""
    mass: Float[Array, "voxel fine fine"]


class Distances(NamedTuple):
    """Mahalanobis distances of draws, (voxel, draw) each."""

    m1: Float[Array, "voxel draw"]
    """Draws of the encoder's posterior to the reference's mean and covariance."""
    m2: Float[Array, "voxel draw"]
    """Draws of the reference's posterior to the encoder's."""
    self_distance: Float[Array, "voxel draw"]
    """Draws of the reference's posterior to its own: what not being Gaussian costs."""


def follow(log_posterior: Float[Array, "voxel f k"], box: Box) -> Lattice:
    """Interpolate a lattice posterior (log densities over (f, k), each up to a constant) to fine cells where its mass is."""
    height = jnp.maximum(log_posterior - jnp.max(log_posterior, axis=(1, 2), keepdims=True), -1e4)
    windows = [_window(jnp.max(height, axis=2 - axis)) for axis in (0, 1)]
    steps = jnp.arange(N_FINE, dtype=jnp.float32) + 0.5
    positions = [first[:, None] + (last - first)[:, None] * steps / N_FINE for first, last in windows]
    fine = region.interpolate(height, (positions[0], positions[1]))
    slope = [box.slope(axis, positions[axis]) for axis in (0, 1)]
    mass = jnp.exp(fine - jnp.max(fine, axis=(1, 2), keepdims=True)) * slope[0][:, :, None] * slope[1][:, None]
    last_point = [box.n_points[axis] - 1 for axis in (0, 1)]
    widths = jnp.stack([(last - first) / N_FINE / last_point[axis] for axis, (first, last) in enumerate(windows)], axis=1)
    places = positions[0] / last_point[0], positions[1] / last_point[1]
    return Lattice(places, widths, mass / jnp.sum(mass, axis=(1, 2), keepdims=True))


def moments(lattice: Lattice, coordinate: Coordinate) -> Gaussian:
    """Mean and covariance in the coordinate in which the encoder is Gaussian."""
    z = [coordinate.from_place(axis, lattice.places[axis]) for axis in (0, 1)]
    marginal = jnp.sum(lattice.mass, axis=2), jnp.sum(lattice.mass, axis=1)
    mean = jnp.stack([jnp.sum(marginal[axis] * z[axis], axis=1) for axis in (0, 1)], axis=1)
    centred = [z[axis] - mean[:, axis, None] for axis in (0, 1)]
    variance = [jnp.sum(marginal[axis] * centred[axis] ** 2, axis=1) for axis in (0, 1)]
    mixed = jnp.sum(jnp.sum(lattice.mass * centred[1][:, None], axis=2) * centred[0], axis=1)
    spread = jnp.stack([jnp.stack([variance[0], mixed], 1), jnp.stack([mixed, variance[1]], 1)], 1)
    return Gaussian(mean, coordinates.root_of(spread))


def draw_lattice(key: PRNGKeyArray, lattice: Lattice, coordinate: Coordinate, n_draws: int) -> Float[Array, "voxel draw 2"]:
    """Draws (in z) of a lattice posterior, even within its cells."""
    choice, within = jax.random.split(key)
    flat = jnp.cumsum(lattice.mass.reshape(len(lattice.mass), -1), axis=1)
    level = jax.random.uniform(choice, (len(flat), n_draws)) * flat[:, -1:]
    cell = jax.vmap(jnp.searchsorted)(flat, level).clip(0, N_FINE**2 - 1)
    index = cell // N_FINE, cell % N_FINE
    jitter = jax.random.uniform(within, (2, len(flat), n_draws), minval=-0.5, maxval=0.5)
    place = [
        jnp.take_along_axis(lattice.places[axis], index[axis], 1) + jitter[axis] * lattice.widths[:, axis, None]
        for axis in (0, 1)
    ]
    return jnp.stack([coordinate.from_place(axis, jnp.clip(place[axis], 0.0, 1.0)) for axis in (0, 1)], axis=-1)


def draw(key: PRNGKeyArray, posterior: Gaussian, n_draws: int) -> Float[Array, "voxel draw 2"]:
    """Draws (in z) of the encoder's posterior."""
    noise = jax.random.normal(key, (len(posterior.mean), n_draws, 2), posterior.mean.dtype)
    root = posterior.root[:, None]
    second = root[..., 1] * noise[..., 0] + root[..., 2] * noise[..., 1]
    return posterior.mean[:, None] + jnp.stack([root[..., 0] * noise[..., 0], second], axis=-1)


def mahalanobis(z: Float[Array, "voxel draw 2"], posterior: Gaussian) -> Float[Array, "voxel draw"]:
    """Distance of draws to a posterior's mean in units of its covariance."""
    whitened = coordinates.whiten(z - posterior.mean[:, None], posterior.root[:, None])
    return jnp.sqrt(jnp.sum(whitened**2, axis=-1))


def compare(key: PRNGKeyArray, encoder: Gaussian, reference: Lattice, coordinate: Coordinate, n_draws: int = 200) -> Distances:
    """Both ways, and the reference against itself."""
    first, second = jax.random.split(key)
    known = moments(reference, coordinate)
    of_reference = draw_lattice(second, reference, coordinate, n_draws)
    return Distances(
        mahalanobis(draw(first, encoder, n_draws), known), mahalanobis(of_reference, encoder), mahalanobis(of_reference, known)
    )


def intersect(
    lower_a: Float[Array, "voxel 2"],
    upper_a: Float[Array, "voxel 2"],
    lower_b: Float[Array, "voxel 2"],
    upper_b: Float[Array, "voxel 2"],
) -> Array:
    """Where two intervals have a point in common, (voxel, 2)."""
    return (lower_a <= upper_b) & (lower_b <= upper_a)


def posterior_draw(key: PRNGKeyArray, posterior: Gaussian, coordinate: Coordinate) -> Float[Array, "voxel 2"]:
    """One random (f, k) per voxel: a map that is as likely as any other, for people who judge uncertainty by looking."""
    z = draw(key, posterior, 1)[:, 0]
    return jnp.stack([coordinate.value(axis, z[:, axis]) for axis in (0, 1)], axis=1)


def contrast_to_uncertainty(first: Float[Array, "voxel draw"], second: Float[Array, "voxel draw"]) -> Float[Array, ""]:
    """Contrast between two regions over their total uncertainty, from posterior draws of one parameter in every voxel.

    |mean_1 - mean_2| / sqrt((V_1 + V_2) / 2); V is the variance of a region's draws about the region's mean: that of its voxels and
    that within each voxel together (Eq. 9 of Finkelstein et al., PS-VAE).
    """
    difference = jnp.mean(first) - jnp.mean(second)
    return jnp.abs(difference) / jnp.sqrt(0.5 * (jnp.var(first) + jnp.var(second)))


def _window(profile: Float[Array, "voxel n"]) -> tuple[Float[Array, " voxel"], Float[Array, " voxel"]]:
    """First and last lattice step of what is within reach of the peak, and one step beyond."""
    n = profile.shape[1]
    alive = profile > -REACH
    first = jnp.argmax(alive, axis=1) - 1.0
    last = n - jnp.argmax(alive[:, ::-1], axis=1) + 0.0
    return jnp.maximum(first, 0.0).astype(jnp.float32), jnp.minimum(last, n - 1.0).astype(jnp.float32)
