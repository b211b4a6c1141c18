"""Confidence regions and intervals of posteriors that are Gaussian in the prior's probit (core.coordinate), in closed form.

The same figures as core.region gives of a lattice, for a hundred thousand voxels at once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr
from jaxtyping import Array, Float

from scansteer.core import coordinate as coordinates
from scansteer.core.coordinate import Coordinate
from scansteer.core.encoder import Gaussian
from scansteer.core.region import ANYTIME_LEVEL, EDGE_FRACTION, Summary

CHI2_95 = 5.991
"""95 % of a chi-square with two degrees of freedom."""
QUANTILE = 1.959964
_LARGEST_SPREAD = 0.9
"""A direction that keeps more of the prior's variance than this does not move the mode: the data say nothing of it."""


def mode(posterior: Gaussian) -> Float[Array, "voxel 2"]:
    """z where the likelihood is highest: (1 - Sigma)^-1 mu, for the prior's own bell divides out."""
    sigma = coordinates.covariance(posterior.root)
    a11, a22, a12 = 1 - sigma[:, 0, 0], 1 - sigma[:, 1, 1], -sigma[:, 0, 1]
    smallest = 0.5 * (a11 + a22) - jnp.sqrt(0.25 * (a11 - a22) ** 2 + a12**2)
    lift = jnp.maximum(1 - _LARGEST_SPREAD - smallest, 0.0)
    a11, a22 = a11 + lift, a22 + lift
    determinant = a11 * a22 - a12**2
    m1, m2 = posterior.mean[:, 0], posterior.mean[:, 1]
    z = jnp.stack([(a22 * m1 - a12 * m2) / determinant, (a11 * m2 - a12 * m1) / determinant], axis=1)
    return jnp.clip(z, -3.5, 3.5)


def summarise(posterior: Gaussian, estimate: Float[Array, "voxel 2"], coordinate: Coordinate) -> Summary:
    """What is said of every voxel; `estimate` is the z that is reported as the MAP."""
    deviation = jnp.stack([posterior.root[:, 0], jnp.hypot(posterior.root[:, 1], posterior.root[:, 2])], axis=1)
    lower, upper = (_values(coordinate, posterior.mean + sign * QUANTILE * deviation) for sign in (-1, 1))
    mean, covariance = _moments(posterior, coordinate)
    return Summary(
        map=_values(coordinate, estimate),
        mean=mean,
        covariance=covariance,
        lower=lower,
        upper=upper,
        cr_area=_area(posterior.mean, posterior.root * np.float32(CHI2_95**0.5), coordinate),
        anytime_area=_anytime_area(posterior, coordinate),
        edge_mass=jnp.stack(
            [_edge_mass(posterior.mean[:, axis], deviation[:, axis], coordinate, axis) for axis in (0, 1)], axis=1
        ),
    )


def _values(coordinate: Coordinate, z: Float[Array, "*any 2"]) -> Float[Array, "*any 2"]:
    return jnp.stack([coordinate.value(axis, z[..., axis]) for axis in (0, 1)], axis=-1)


def _moments(posterior: Gaussian, coordinate: Coordinate) -> tuple[Float[Array, "voxel 2"], Float[Array, "voxel 2 2"]]:
    """Mean and covariance of (f, k), by 3 x 3 Gauss-Hermite points."""
    along, weight = np.array([-(3**0.5), 0.0, 3**0.5]), np.array([1, 4, 1]) / 6
    stencil = np.stack(np.meshgrid(along, along, indexing="ij"), axis=-1).reshape(-1, 2)
    weights = jnp.asarray(np.outer(weight, weight).reshape(-1), jnp.float32)
    values = _values(coordinate, coordinates.points(posterior.mean, posterior.root, jnp.asarray(stencil, jnp.float32)))
    mean = jnp.sum(weights[:, None] * values, axis=1)
    centred = values - mean[:, None]
    pairs = [[jnp.sum(weights * centred[..., i] * centred[..., j], axis=1) for j in (0, 1)] for i in (0, 1)]
    return mean, jnp.stack([jnp.stack(row, axis=-1) for row in pairs], axis=-2)


def _area(centre: Float[Array, "voxel 2"], root: Float[Array, "voxel 3"], coordinate: Coordinate) -> Float[Array, " voxel"]:
    """Area in (f, k) of the ellipse centre + root e, |e| <= 1: its area in z times the mean of df/dz dk/dz over it."""
    radius, weight = np.polynomial.legendre.leggauss(2)
    radius = np.sqrt(0.5 * (radius + 1))  # even in area
    angle = (np.arange(6) + 0.5) * np.pi / 3
    disc = np.stack([np.outer(radius, np.cos(angle)), np.outer(radius, np.sin(angle))], axis=-1).reshape(-1, 2)
    weights = jnp.asarray(np.repeat(weight / 2 / len(angle), len(angle)), jnp.float32)
    z = jax.lax.optimization_barrier(coordinates.points(centre, root, jnp.asarray(disc, jnp.float32)))
    density = coordinate.slope(0, z[..., 0]) * coordinate.slope(1, z[..., 1])
    return np.float32(np.pi) * root[:, 0] * root[:, 2] * jnp.sum(weights * density, axis=1)


def _anytime_area(posterior: Gaussian, coordinate: Coordinate) -> Float[Array, " voxel"]:
    """Area where the posterior exceeds 0.05 x prior: in z an ellipse about the mode, or much of the box where data say little."""
    sigma = coordinates.covariance(posterior.root)
    determinant = sigma[:, 0, 0] * sigma[:, 1, 1] - sigma[:, 0, 1] ** 2
    # precision of posterior over prior, Sigma^-1 - 1, held to be positive
    p11, p22, p12 = sigma[:, 1, 1] / determinant - 1, sigma[:, 0, 0] / determinant - 1, -sigma[:, 0, 1] / determinant
    smallest = 0.5 * (p11 + p22) - jnp.sqrt(0.25 * (p11 - p22) ** 2 + p12**2)
    lift = jnp.maximum(0.05 - smallest, 0.0)
    p11, p22 = p11 + lift, p22 + lift
    m1, m2 = posterior.mean[:, 0], posterior.mean[:, 1]
    b1 = (sigma[:, 1, 1] * m1 - sigma[:, 0, 1] * m2) / determinant
    b2 = (sigma[:, 0, 0] * m2 - sigma[:, 0, 1] * m1) / determinant
    det = p11 * p22 - p12**2
    centre = jnp.stack([(p22 * b1 - p12 * b2) / det, (p11 * b2 - p12 * b1) / det], axis=1)
    peak = -0.5 * (m1 * b1 + m2 * b2) + 0.5 * (centre[:, 0] * b1 + centre[:, 1] * b2) - 0.5 * jnp.log(determinant)
    squared = jnp.maximum(2 * (peak - np.float32(np.log(ANYTIME_LEVEL))), 0.0)
    spread = jnp.stack([jnp.stack([p22, -p12], -1), jnp.stack([-p12, p11], -1)], -2) / det[:, None, None]
    centre, root = jax.lax.optimization_barrier((centre, coordinates.root_of(spread) * jnp.sqrt(squared)[:, None]))
    box = jnp.prod((coordinate.upper - coordinate.lower).astype(jnp.float32))
    return jnp.minimum(_area(jnp.clip(centre, -4.0, 4.0), jnp.clip(root, -4.0, 4.0), coordinate), box)


def _edge_mass(mean: Array, deviation: Array, coordinate: Coordinate, axis: int) -> Float[Array, " voxel"]:
    """The fuller of the two edge rows."""
    width = EDGE_FRACTION * (coordinate.upper - coordinate.lower)[axis]
    edges = coordinate.lower[axis] + width, coordinate.upper[axis] - width
    low, high = (coordinate.z(axis, edge).astype(mean.dtype) for edge in edges)
    return jnp.maximum(ndtr((low - mean) / deviation), ndtr((mean - high) / deviation))
