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
from scansteer.core.grid_posterior import Prior
from scansteer.core.lattice import Box
from scansteer.core.region import Window

LEFT_OUT = 3e-5
"""Mass beyond the cells, at each end of a marginal."""
TOO_FAR = 4.0
"""Mahalanobis distance beyond which two posteriors do not agree (3e-4 of the draws of a perfect match)."""


class Lattice(eqx.Module):
    """A posterior on cells that follow it, even in z (core.coordinate); leaves (voxel, ..)."""

    z: tuple[Float[Array, "voxel fine"], Float[Array, "voxel fine"]]
    """Centres of the cells."""
    widths: Float[Array, "voxel 2"]
    mass: Float[Array, "voxel fine fine"]


class Distances(NamedTuple):
    """Mahalanobis distances of draws, (voxel, draw) each."""

    m1: Float[Array, "voxel draw"]
    """Draws of the encoder's posterior to the reference's mean and covariance."""
    m2: Float[Array, "voxel draw"]
    """Draws of the reference's posterior to the encoder's."""
    self_distance: Float[Array, "voxel draw"]
    """Draws of the reference's posterior to its own: what not being Gaussian costs."""


def follow(
    log_posterior: Float[Array, "voxel cell"], prior: Prior, coordinate: Coordinate, power: Float[Array, ""] | None = None
) -> Lattice:
    """A lattice posterior on cells where its mass is: first all of it, then all but `LEFT_OUT` at each end; `power` as in `region.summarise`.

    The likelihood is interpolated; the prior is N(0, 1) in z.
    """
    box = prior.box
    on_lattice = log_posterior.reshape(-1, *box.n_points), prior.on_cells().reshape(box.n_points)
    misfit, outer = region.prepared(*on_lattice, power)

    def cells(windows: tuple[Window, Window]) -> Float[Array, "voxel fine fine"]:
        z = [region.positions(window) for window in windows]
        at = [coordinate.place(axis, z[axis]) * (box.n_points[axis] - 1) for axis in (0, 1)]
        height = region.from_misfit(region.interpolate(misfit, (at[0], at[1])), power)
        height = height - 0.5 * (z[0][:, :, None] ** 2 + z[1][:, None] ** 2)
        mass = jnp.exp(height - jnp.max(height, axis=(1, 2), keepdims=True))
        return mass / jnp.sum(mass, axis=(1, 2), keepdims=True)

    wide = _in_z(outer[0], box, coordinate, 0), _in_z(outer[1], box, coordinate, 1)
    mass = cells(wide)
    close = _shrink(jnp.sum(mass, axis=2), wide[0]), _shrink(jnp.sum(mass, axis=1), wide[1])
    widths = jnp.stack([(last - first) / region.N_FINE for first, last in close], axis=1)
    return Lattice((region.positions(close[0]), region.positions(close[1])), widths, cells(close))


def moments(lattice: Lattice) -> Gaussian:
    """Mean and covariance in the coordinate in which the encoder is Gaussian."""
    marginal = jnp.sum(lattice.mass, axis=2), jnp.sum(lattice.mass, axis=1)
    mean = jnp.stack([jnp.sum(marginal[axis] * lattice.z[axis], axis=1) for axis in (0, 1)], axis=1)
    centred = [lattice.z[axis] - mean[:, axis, None] for axis in (0, 1)]
    variance = [jnp.sum(marginal[axis] * centred[axis] ** 2, axis=1) for axis in (0, 1)]
    mixed = jnp.sum(jnp.sum(lattice.mass * centred[1][:, None], axis=2) * centred[0], axis=1)
    spread = jnp.stack([jnp.stack([variance[0], mixed], 1), jnp.stack([mixed, variance[1]], 1)], 1)
    return Gaussian(mean, coordinates.root_of(spread))


def draw_lattice(key: PRNGKeyArray, lattice: Lattice, n_draws: int) -> Float[Array, "voxel draw 2"]:
    """Draws (in z) of a lattice posterior, even within its cells."""
    choice, within = jax.random.split(key)
    flat = jnp.cumsum(lattice.mass.reshape(len(lattice.mass), -1), axis=1)
    level = jax.random.uniform(choice, (len(flat), n_draws)) * flat[:, -1:]
    cell = jax.vmap(jnp.searchsorted)(flat, level).clip(0, region.N_FINE**2 - 1)
    index = cell // region.N_FINE, cell % region.N_FINE
    jitter = jax.random.uniform(within, (2, len(flat), n_draws), minval=-0.5, maxval=0.5)
    z = [jnp.take_along_axis(lattice.z[axis], index[axis], 1) + jitter[axis] * lattice.widths[:, axis, None] for axis in (0, 1)]
    return jnp.stack(z, axis=-1)


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


def compare(key: PRNGKeyArray, encoder: Gaussian, reference: Lattice, n_draws: int = 200) -> Distances:
    """Both ways, and the reference against itself."""
    first, second = jax.random.split(key)
    known = moments(reference)
    of_reference = draw_lattice(second, reference, n_draws)
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


def _in_z(window: Window, box: Box, coordinate: Coordinate, axis: int) -> Window:
    """A window in lattice steps, in z."""
    first, last = (coordinate.from_place(axis, end / (box.n_points[axis] - 1)) for end in window)
    return first, last


def _shrink(marginal: Float[Array, "voxel fine"], window: Window) -> Window:
    """The window that holds what matters, a twentieth wider on either side."""
    first, last = region.quantile(marginal, window, LEFT_OUT), region.quantile(marginal, window, 1 - LEFT_OUT)
    margin = 0.05 * (last - first) + 1e-4
    return jnp.maximum(first - margin, window[0]), jnp.minimum(last + margin, window[1])
