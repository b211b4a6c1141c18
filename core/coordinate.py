"""The coordinate in which a posterior over the box of (f, k) may be called Gaussian: the probit of the prior's distribution function.

z = Phi^-1(P(x)), where P is the prior's distribution function of one parameter. The prior is then exactly N(0, 1) in each coordinate, so a
posterior that knows nothing is Gaussian, one at the box's edge has nowhere to fall over, and a narrow one is as Gaussian as it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Array, Float

from scansteer.core.grid_posterior import PriorShape

REACH = 5.0
"""Beyond this |z| lies 6e-7 of the prior; values are held there."""


def _floats(bounds: Sequence[float] | Float[Array, " 2"]) -> tuple[float, float]:
    first, second = bounds
    return float(first), float(second)


class Coordinate(eqx.Module):
    """The box, and the shape of the prior along each of its sides (core.grid_posterior.make_prior).

    Constants of every program: read from arrays, they keep a CPU from working on eight values at once.
    """

    lower: tuple[float, float] = eqx.field(static=True, converter=_floats)
    upper: tuple[float, float] = eqx.field(static=True, converter=_floats)
    shapes: tuple[PriorShape, PriorShape] = eqx.field(static=True)

    def value(self, axis: int, z: Float[Array, "..."]) -> Float[Array, "..."]:
        """The parameter at z, in its own unit; of z's precision."""
        lower, upper = self.lower[axis], self.upper[axis]
        if self._has_curve(axis, z):
            return lower + (upper - lower) * jnp.square(self.place(axis, z))
        mass = ndtr(jnp.clip(z, -REACH, REACH))
        if self.shapes[axis] == "log-uniform":
            return lower * (upper / lower) ** mass
        return lower + (upper - lower) * (_beta_quantile(mass) if self.shapes[axis] == "beta" else mass)

    def z(self, axis: int, value: Float[Array, "..."]) -> Float[Array, "..."]:
        """Inverse of `value`, held within the reach."""
        lower, upper = self.lower[axis], self.upper[axis]
        share = (value - lower) / (upper - lower)
        if self.shapes[axis] == "log-uniform":
            mass = jnp.log(value / lower) / math.log(upper / lower)
        else:
            mass = share**2 * (3 - 2 * share) if self.shapes[axis] == "beta" else share
        edge = ndtr(jnp.asarray(-REACH, value.dtype))
        return ndtri(jnp.clip(mass, edge, 1 - edge))

    def slope(self, axis: int, z: Float[Array, "..."]) -> Float[Array, "..."]:
        """d value / d z: the bell over the prior's density."""
        return jnp.exp(-0.5 * z**2 - self.log_prior(axis, self.value(axis, z))) / jnp.sqrt(2 * jnp.pi).astype(z.dtype)

    def log_prior(self, axis: int, value: Float[Array, "..."]) -> Float[Array, "..."]:
        """Log of the prior's density over the parameter."""
        lower, upper = self.lower[axis], self.upper[axis]
        if self.shapes[axis] == "log-uniform":
            return -jnp.log(value * math.log(upper / lower))
        share = (value - lower) / (upper - lower)
        within = jnp.log(6 * jnp.clip(share * (1 - share), 1e-5, 0.25)) if self.shapes[axis] == "beta" else jnp.zeros_like(share)
        return within - math.log(upper - lower)

    def place(self, axis: int, z: Float[Array, "..."]) -> Float[Array, "..."]:
        """Where z lies on the lattice's own axis, 0 .. 1 (the square root of the distance from the lower bound)."""
        if self._has_curve(axis, z):
            return _chebyshev(_curve(self.shapes[axis]), z)
        lower, upper = self.lower[axis], self.upper[axis]
        return jnp.sqrt(jnp.clip((self.value(axis, z) - lower) / (upper - lower), 0.0, 1.0))

    def from_place(self, axis: int, place: Float[Array, "..."]) -> Float[Array, "..."]:
        """Inverse of `place`."""
        lower, upper = self.lower[axis], self.upper[axis]
        return self.z(axis, lower + (upper - lower) * jnp.square(place))

    def log_density(self, axis: int, z: Float[Array, "..."]) -> Float[Array, "..."]:
        """Log of the prior's density over the parameter, at z."""
        return self.log_prior(axis, self.value(axis, z))

    def _has_curve(self, axis: int, z: Array) -> bool:
        """In single precision a polynomial takes a third of the time."""
        return z.dtype == jnp.float32 and self.shapes[axis] in ("uniform", "beta")


@lru_cache
def _curve(shape: PriorShape) -> np.ndarray:
    """Chebyshev coefficients of `place` over the reach, to 5e-8."""
    cheb = np.polynomial.chebyshev
    at = np.cos(np.pi * (np.arange(256) + 0.5) / 256)
    mass = scipy.special.ndtr(REACH * at)
    place = np.sqrt(0.5 - np.sin(np.arcsin(1 - 2 * mass) / 3) if shape == "beta" else mass)
    return cheb.chebfit(at, place, 18 if shape == "beta" else 24)


def _chebyshev(coefficients: np.ndarray, z: Float[Array, "..."]) -> Float[Array, "..."]:
    """The series at z, held within the reach, by Clenshaw's recurrence."""
    x = jnp.clip(z / REACH, -1.0, 1.0)
    after, last = jnp.zeros_like(x), jnp.zeros_like(x)
    twice = 2 * x
    for each in coefficients[:0:-1].tolist():
        after, last = twice * after - last + each, after
    return x * after - last + float(coefficients[0])


def _beta_quantile(mass: Float[Array, "..."]) -> Float[Array, "..."]:
    """Inverse of 3 s^2 - 2 s^3, the distribution function of Beta(2, 2)."""
    return jnp.clip(0.5 - jnp.sin(jnp.arcsin(jnp.clip(1 - 2 * mass, -1.0, 1.0)) / 3), 0.0, 1.0)


def points(
    mean: Float[Array, "voxel 2"], root: Float[Array, "voxel 3"], stencil: Float[np.ndarray, "point 2"]
) -> Float[Array, "2 point voxel"]:
    """mean + C e for every e of the stencil; `root` holds the lower triangle C11, C21, C22."""
    return displaced(mean, root, jnp.asarray(stencil.T, mean.dtype)[:, :, None])


def displaced(mean: Float[Array, "voxel 2"], root: Float[Array, "voxel 3"], step: Float[Array, "2 *point #voxel"]) -> Float[Array, "2 *point voxel"]:
    """mean + C step, each voxel's own."""
    return jnp.stack([mean[:, 0] + root[:, 0] * step[0], mean[:, 1] + root[:, 1] * step[0] + root[:, 2] * step[1]])


def covariance(root: Float[Array, "*voxel 3"]) -> Float[Array, "*voxel 2 2"]:
    """C C' of the lower triangle C11, C21, C22."""
    c11, c21, c22 = (root[..., i] for i in range(3))
    return jnp.stack([jnp.stack([c11**2, c11 * c21], -1), jnp.stack([c11 * c21, c21**2 + c22**2], -1)], -2)


def root_of(covariance: Float[Array, "*voxel 2 2"]) -> Float[Array, "*voxel 3"]:
    """The lower triangle C11, C21, C22 of a covariance."""
    c11 = jnp.sqrt(covariance[..., 0, 0])
    c21 = covariance[..., 1, 0] / c11
    return jnp.stack([c11, c21, jnp.sqrt(jnp.maximum(covariance[..., 1, 1] - c21**2, 1e-12))], -1)


def whiten(offset: Float[Array, "*any 2"], root: Float[Array, "*any 3"]) -> Float[Array, "*any 2"]:
    """C^-1 offset."""
    first = offset[..., 0] / root[..., 0]
    return jnp.stack([first, (offset[..., 1] - root[..., 1] * first) / root[..., 2]], -1)


def log_normal(whitened: Float[Array, "*any 2"], root: Float[Array, "*any 3"]) -> Float[Array, "*any"]:
    """log density of N(0, C C') where C^-1 x is `whitened`."""
    return -0.5 * jnp.sum(whitened**2, -1) - jnp.log(root[..., 0] * root[..., 2]) - jnp.log(2 * jnp.pi)
