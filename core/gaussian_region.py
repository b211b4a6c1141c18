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


def mode(posterior: Gaussian) -> Float[Array, "2 voxel"]:
    """z where the likelihood is highest: (1 - Sigma)^-1 mu, for the prior's own bell divides out."""
    s11, s12, s22 = _covariance(posterior.root)
    a11, a22, a12 = 1 - s11, 1 - s22, -s12
    smallest = 0.5 * (a11 + a22) - jnp.sqrt(0.25 * (a11 - a22) ** 2 + a12**2)
    lift = jnp.maximum(1 - _LARGEST_SPREAD - smallest, 0.0)
    a11, a22 = a11 + lift, a22 + lift
    determinant = a11 * a22 - a12**2
    m1, m2 = posterior.mean.T
    z = jnp.stack([(a22 * m1 - a12 * m2) / determinant, (a11 * m2 - a12 * m1) / determinant])
    return jnp.clip(z, -3.5, 3.5)


def summarise(posterior: Gaussian, estimate: Float[Array, "2 voxel"], coordinate: Coordinate) -> Summary:
    """What is said of every voxel; `estimate` is the z that is reported as the MAP. Voxels come last until the end: see core.encoder."""
    c11, c21, c22 = posterior.root.T
    mean, deviation = posterior.mean.T, jnp.stack([c11, jnp.hypot(c21, c22)])
    values = _values(coordinate, jnp.stack([estimate, mean - QUANTILE * deviation, mean + QUANTILE * deviation], axis=1))
    mean_value, covariance = _moments(posterior, coordinate)
    return Summary(
        map=values[:, 0].T,
        mean=mean_value.T,
        covariance=jnp.moveaxis(covariance, -1, 0),
        lower=values[:, 1].T,
        upper=values[:, 2].T,
        cr_area=_area(posterior.mean, posterior.root * np.float32(CHI2_95**0.5), coordinate),
        anytime_area=_anytime_area(posterior, coordinate),
        edge_mass=jnp.stack([_edge_mass(mean[axis], deviation[axis], coordinate, axis) for axis in (0, 1)], axis=1),
    )


def _covariance(root: Float[Array, "voxel 3"]) -> tuple[Array, Array, Array]:
    """Entries 11, 12, 22 of C C'."""
    c11, c21, c22 = root.T
    return c11**2, c11 * c21, c21**2 + c22**2


def _values(coordinate: Coordinate, z: Float[Array, "2 point voxel"]) -> Float[Array, "2 point voxel"]:
    return jnp.stack([coordinate.value(axis, z[axis]) for axis in (0, 1)])


def _moments(posterior: Gaussian, coordinate: Coordinate) -> tuple[Float[Array, "2 voxel"], Float[Array, "2 2 voxel"]]:
    """Mean and covariance of (f, k), by 3 x 3 Gauss-Hermite points."""
    along, weight = np.array([-(3**0.5), 0.0, 3**0.5]), np.array([1, 4, 1]) / 6
    stencil = np.stack(np.meshgrid(along, along, indexing="ij"), axis=-1).reshape(-1, 2)
    weights = np.outer(weight, weight).reshape(-1).tolist()
    f, k = jax.lax.optimization_barrier(_values(coordinate, coordinates.points(posterior.mean, posterior.root, stencil)))

    def expected(x: Float[Array, "point voxel"]) -> Float[Array, " voxel"]:
        return sum(share * each for share, each in zip(weights, x, strict=True))  # pyright: ignore[reportReturnType] - more than none

    mean = jnp.stack([expected(f), expected(k)])
    f, k = f - mean[0], k - mean[1]
    mixed = expected(f * k)
    return mean, jnp.stack([jnp.stack([expected(f * f), mixed]), jnp.stack([mixed, expected(k * k)])])


def _area(centre: Float[Array, "voxel 2"], root: Float[Array, "voxel 3"], coordinate: Coordinate) -> Float[Array, " voxel"]:
    """Area in (f, k) of the ellipse centre + root e, |e| <= 1: its area in z times the mean of df/dz dk/dz over it."""
    radius, weight = np.polynomial.legendre.leggauss(2)
    radius = np.sqrt(0.5 * (radius + 1))  # even in area
    angle = (np.arange(6) + 0.5) * np.pi / 3
    disc = np.stack([np.outer(radius, np.cos(angle)), np.outer(radius, np.sin(angle))], axis=-1).reshape(-1, 2)
    weights = np.repeat(weight / 2 / len(angle), len(angle)).tolist()
    z = jax.lax.optimization_barrier(coordinates.points(centre, root, disc))
    density = jax.lax.optimization_barrier(coordinate.slope(0, z[0]) * coordinate.slope(1, z[1]))
    mean = sum(share * each for share, each in zip(weights, density, strict=True))
    return np.float32(np.pi) * root[:, 0] * root[:, 2] * mean


def _anytime_area(posterior: Gaussian, coordinate: Coordinate) -> Float[Array, " voxel"]:
    """Area where the posterior exceeds 0.05 x prior: in z an ellipse about the mode, or much of the box where data say little."""
    s11, s12, s22 = _covariance(posterior.root)
    determinant = s11 * s22 - s12**2
    # precision of posterior over prior, Sigma^-1 - 1, held to be positive
    p11, p22, p12 = s22 / determinant - 1, s11 / determinant - 1, -s12 / determinant
    smallest = 0.5 * (p11 + p22) - jnp.sqrt(0.25 * (p11 - p22) ** 2 + p12**2)
    lift = jnp.maximum(0.05 - smallest, 0.0)
    p11, p22 = p11 + lift, p22 + lift
    m1, m2 = posterior.mean.T
    b1 = (s22 * m1 - s12 * m2) / determinant
    b2 = (s11 * m2 - s12 * m1) / determinant
    det = p11 * p22 - p12**2
    centre = jnp.stack([(p22 * b1 - p12 * b2) / det, (p11 * b2 - p12 * b1) / det], axis=1)
    peak = -0.5 * (m1 * b1 + m2 * b2) + 0.5 * (centre[:, 0] * b1 + centre[:, 1] * b2) - 0.5 * jnp.log(determinant)
    squared = jnp.maximum(2 * (peak - np.float32(np.log(ANYTIME_LEVEL))), 0.0)
    spread = jnp.stack([jnp.stack([p22, -p12], -1), jnp.stack([-p12, p11], -1)], -2) / det[:, None, None]
    centre, root = jax.lax.optimization_barrier((centre, coordinates.root_of(spread) * jnp.sqrt(squared)[:, None]))
    box = np.prod(np.subtract(coordinate.upper, coordinate.lower)).item()
    return jnp.minimum(_area(jnp.clip(centre, -4.0, 4.0), jnp.clip(root, -4.0, 4.0), coordinate), box)


def _edge_mass(mean: Array, deviation: Array, coordinate: Coordinate, axis: int) -> Float[Array, " voxel"]:
    """The fuller of the two edge rows."""
    width = EDGE_FRACTION * (coordinate.upper[axis] - coordinate.lower[axis])
    edges = coordinate.lower[axis] + width, coordinate.upper[axis] - width
    low, high = (coordinate.z(axis, jnp.asarray(edge, jnp.float64)).astype(mean.dtype) for edge in edges)
    return jnp.maximum(ndtr((low - mean) / deviation), ndtr((mean - high) / deviation))
