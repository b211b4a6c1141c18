"""Confidence regions and intervals of a posterior that is known on a lattice.

Where the posterior is too narrow for the lattice the likelihood's misfit is still smooth: the sum of squares that makes the likelihood a
Gaussian, or with unknown noise a Student-t. It is the misfit that is interpolated (cubic, exact for a quadratic form of any width), the prior
apart from it: first on a window that holds all the mass, then on one that holds what matters, each of `N_FINE` x `N_FINE` cells. The resolution
thus follows the posterior.
(Interpolating the log posterior itself is as good for a Gaussian only: with 200 degrees of freedom, 0.2 lattice steps wide and correlated by
-0.95, means are off by 0.8 standard deviations.)
"""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scansteer.core.lattice import Box

N_FINE = 48
N_BISECTIONS = 6
"""Of the level of a region: to a fifth of a nat, within which area is a linear function of mass to 0.2 %."""
EDGE_FRACTION = 0.01
"""Width of an edge row, as a fraction of the box (a cell of the published 100 x 100 grid)."""
NARROW = 0.5
"""Lattice steps: a posterior whose smallest standard deviation is less may have its peak between lattice points."""
ANYTIME_LEVEL = 0.05
"""The anytime region is {posterior > 0.05 x prior} (Waudby-Smith & Ramdas 2020)."""


class Summary(eqx.Module):
    """What is said of one voxel's posterior; leaves (voxel, ..)."""

    map: Float[Array, "voxel 2"]
    """Joint maximum a posteriori of (f, k)."""
    mean: Float[Array, "voxel 2"]
    covariance: Float[Array, "voxel 2 2"]
    lower: Float[Array, "voxel 2"]
    """2.5 % quantiles of the marginals."""
    upper: Float[Array, "voxel 2"]
    """97.5 % quantiles of the marginals."""
    cr_area: Float[Array, " voxel"]
    """Area of the 95 % highest-density region [f x 1/s]."""
    anytime_area: Float[Array, " voxel"]
    """Area of {posterior > 0.05 x prior} [f x 1/s]."""
    edge_mass: Float[Array, "voxel 2"]
    """Mass in the fuller of the two edge rows of each parameter."""


def summarise(
    log_posterior: Float[Array, "voxel f k"],
    log_prior: tuple[Float[Array, " f"], Float[Array, " k"]],
    box: Box,
    power: Float[Array, ""] | None = None,
) -> Summary:
    """As `with_evidence`, without it."""
    return with_evidence(log_posterior, log_prior, box, power)[0]


def with_evidence(
    log_posterior: Float[Array, "voxel f k"],
    log_prior: tuple[Float[Array, " f"], Float[Array, " k"]],
    box: Box,
    power: Float[Array, ""] | None = None,
) -> tuple[Summary, Float[Array, " voxel"]]:
    """Summarise log posterior densities over (f, k), each up to a constant; the prior is the product of two normalised ones.

    Parameters
    ----------
    power
        Of a Student-t: the density is misfit^(-power / 2), power = degrees of freedom behind the noise + images - 1; none: Gaussian.

    Returns
    -------
    What is said of every voxel, and the log of its posterior's integral over the box as it was given, not normalised.
    """
    misfit, outer = prepared(log_posterior, log_prior[0][:, None] + log_prior[1], power)
    prior = _prior_on(outer, log_prior)
    wide, area = from_misfit(_zoom(misfit, outer), power) + prior, _cell_areas(outer, box)
    mass, log_total = _mass(wide, area)
    marginals = jnp.sum(mass, axis=2), jnp.sum(mass, axis=1)
    edges = [_edge_mass(marginal, outer[axis], box, axis) for axis, marginal in enumerate(marginals)]
    anytime = _anytime_area(wide - log_total[:, None, None], prior, area)
    inner = _shrink(marginals[0], outer[0], box.n_points[0]), _shrink(marginals[1], outer[1], box.n_points[1])
    density, area = from_misfit(_zoom(misfit, inner), power) + _prior_on(inner, log_prior), _cell_areas(inner, box)
    mass, log_total = _mass(density, area)
    highest = jnp.max(log_posterior - (log_prior[0][:, None] + log_prior[1]), axis=(1, 2))  # of the likelihood: what `prepared` takes away
    return _describe(density, mass, area, inner, box, anytime_area=anytime, edge_mass=jnp.stack(edges, 1)), highest + log_total


_FLOOR = -1e6
Window = tuple[Float[Array, " voxel"], Float[Array, " voxel"]]
"""First and last edge of a window along one axis, in lattice steps."""


def to_misfit(log_density: Float[Array, "..."], power: Float[Array, ""] | None) -> Float[Array, "..."]:
    """What is quadratic where the model is linear; the log density itself where that is small, or Gaussian."""
    if power is None:
        return log_density
    half = (0.5 * power).astype(log_density.dtype)
    return -half * jnp.expm1(jnp.minimum(-log_density / half, _LARGEST_EXPONENT))


def from_misfit(misfit: Float[Array, "..."], power: Float[Array, ""] | None) -> Float[Array, "..."]:
    """Inverse of `to_misfit`."""
    if power is None:
        return misfit
    half = (0.5 * power).astype(misfit.dtype)
    return -half * jnp.log1p(jnp.maximum(-misfit / half, _SMALLEST_MISFIT - 1))


_LARGEST_EXPONENT = 60.0  # exp of it is still a number in single precision
_SMALLEST_MISFIT = 1e-6  # of what the best lattice point has: beyond a lattice's reach


def prepared(
    log_posterior: Float[Array, "voxel f k"], log_prior: Float[Array, "f k"], power: Float[Array, ""] | None
) -> tuple[Float[Array, "voxel f k"], tuple[Window, Window]]:
    """The likelihood's misfit, which is to be interpolated, and a window that holds all the posterior's mass.

    The prior is left out: with few degrees of freedom its logarithm, steep at the box's edge, would be that of a misfit no polynomial follows.
    """
    log_likelihood, log_posterior = (
        jnp.maximum(each - jnp.max(each, axis=(1, 2), keepdims=True), _FLOOR) for each in (log_posterior - log_prior, log_posterior)
    )
    misfit = to_misfit(log_likelihood, power)
    return misfit, _window(log_posterior, misfit, power)


def _prior_on(windows: tuple[Window, Window], log_prior: tuple[Float[Array, " f"], Float[Array, " k"]]) -> Float[Array, "voxel fine fine"]:
    """Log of the prior on a window's cells."""
    along_f, along_k = (_weights(positions(window), len(each)) @ each for window, each in zip(windows, log_prior, strict=True))
    return along_f[:, :, None] + along_k[:, None]


def _window(log_posterior: Array, misfit: Array, power: Array | None) -> tuple[Window, Window]:
    """Where there is mass: on the lattice, and, where a ridge may slip between lattice points, about the peak that they imply."""
    ends = _peak_window(misfit, power)
    windows = []
    for axis, (first, last) in enumerate(_lattice_window(log_posterior)):
        n = log_posterior.shape[1 + axis]
        low, high = (jnp.clip(end[:, axis], 0.0, n - 1.0) for end in ends)
        windows.append((jnp.fmin(first, low), jnp.fmax(last, high)))
    return windows[0], windows[1]


def _peak_window(misfit: Float[Array, "voxel f k"], power: Array | None) -> tuple[Float[Array, "voxel 2"], Float[Array, "voxel 2"]]:
    """Six standard deviations either way of the peak of the quadratic through the best lattice point's neighbours; NaN where that is wide."""
    n = misfit.shape[1:]
    best = _where_highest(misfit.reshape(len(misfit), -1))
    i, j = jnp.clip(best // n[1], 1, n[0] - 2), jnp.clip(best % n[1], 1, n[1] - 2)
    voxel = jnp.arange(len(misfit))
    at = lambda di, dj: misfit[voxel, i + di, j + dj]  # noqa: E731
    slope = jnp.stack([at(1, 0) - at(-1, 0), at(0, 1) - at(0, -1)], axis=1) / 2
    a, b = (2 * at(0, 0) - at(di, dj) - at(-di, -dj) for di, dj in ((1, 0), (0, 1)))
    c = -(at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1)) / 4
    determinant = a * b - c**2
    covariance = jnp.stack([jnp.stack([b, -c], 1), jnp.stack([-c, a], 1)], 1) / determinant[:, None, None]
    step = jnp.sum(covariance * slope[:, None], axis=2)
    height = at(0, 0) + 0.5 * jnp.sum(slope * step, axis=1)
    scale = 1.0 if power is None else jnp.maximum(1 - height / (0.5 * power).astype(height.dtype), _SMALLEST_MISFIT)
    sd = jnp.sqrt(jnp.stack([b, a], axis=1) / determinant[:, None] * jnp.broadcast_to(scale, height.shape)[:, None])
    is_narrow = (determinant > 0) & (a + b > 1 / NARROW**2)
    centre = jnp.stack([i, j], axis=1).astype(step.dtype) + step
    reach = jnp.where(is_narrow[:, None], 6 * sd, jnp.nan)
    return centre - reach, centre + reach


def _lattice_window(log_posterior: Array) -> tuple[Window, Window]:
    """All of the lattice where a marginal's mass is not negligible, and a step beyond."""
    windows = []
    for axis in (2, 1):
        n = log_posterior.shape[3 - axis]
        marginal = jnp.max(log_posterior, axis=axis)
        alive = marginal > -25.0
        first = jnp.argmax(alive, axis=1) - 1.0
        last = n - jnp.argmax(alive[:, ::-1], axis=1) + 0.0
        windows.append((jnp.maximum(first, 0.0).astype(jnp.float32), jnp.minimum(last, n - 1.0).astype(jnp.float32)))
    return windows[0], windows[1]


def positions(window: Window) -> Float[Array, "voxel fine"]:
    """Centres of the fine cells, in the window's unit."""
    first, last = window
    return first[:, None] + (last - first)[:, None] * (jnp.arange(N_FINE, dtype=jnp.float32) + 0.5) / N_FINE


def _stencil(positions: Array, n: int) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    """Cubic Lagrange interpolation from lattice points 0 .. n - 1: the first of four points, and their weights."""
    base = jnp.clip(jnp.floor(positions) - 1, 0, n - 4)
    t = positions - base
    weights = (
        -(t - 1) * (t - 2) * (t - 3) / 6,
        t * (t - 2) * (t - 3) / 2,
        -t * (t - 1) * (t - 3) / 2,
        t * (t - 1) * (t - 2) / 6,
    )
    return base, weights


def _weights(positions: Float[Array, "voxel fine"], n: int) -> Float[Array, "voxel fine n"]:
    """The interpolation as a dense matrix; not a sum of four, which XLA's older code generator holds in memory each by itself."""
    base, stencil = _stencil(positions, n)
    offset = jnp.arange(n, dtype=jnp.float32) - base[..., None]
    result = jnp.zeros_like(offset)
    for m, weight in enumerate(stencil):
        result = jnp.where(offset == m, weight[..., None], result)
    return result


def at_point(values: Float[Array, "cell voxel"], position: tuple[Array, Array], n_points: tuple[int, int]) -> Float[Array, " voxel"]:
    """Values interpolated at one position per voxel (in lattice steps along f and along k)."""
    (first_f, along_f), (first_k, along_k) = (_stencil(position[axis], n_points[axis]) for axis in (0, 1))
    corner = first_f.astype(int) * n_points[1] + first_k.astype(int)
    voxel = jnp.arange(values.shape[1])
    return sum(  # type: ignore[return-value]
        along_f[i] * along_k[j] * values[corner + i * n_points[1] + j, voxel] for i in range(4) for j in range(4)
    )


def interpolate(values: Float[Array, "voxel f k"], positions: tuple[Array, Array]) -> Float[Array, "voxel fine_f fine_k"]:
    """Values on the tensor grid of positions (in lattice steps, (voxel, fine) along f and along k)."""
    along_f = _weights(positions[0], values.shape[1]) @ values
    return along_f @ jnp.swapaxes(_weights(positions[1], values.shape[2]), 1, 2)


def _zoom(values: Array, windows: tuple[Window, Window]) -> Float[Array, "voxel fine fine"]:
    return interpolate(values, (positions(windows[0]), positions(windows[1])))


def _mass(
    log_density: Float[Array, "voxel fine fine"], area: Float[Array, "voxel fine fine"]
) -> tuple[Float[Array, "voxel fine fine"], Float[Array, " voxel"]]:
    """Of every cell, normalised, and the log of all mass before that."""
    highest = jnp.max(log_density, axis=(1, 2), keepdims=True)
    mass = jnp.exp(log_density - highest) * area
    total = jnp.sum(mass, axis=(1, 2), keepdims=True)
    return mass / total, (highest + jnp.log(total))[:, 0, 0]


def _cell_areas(windows: tuple[Window, Window], box: Box) -> Float[Array, "voxel fine fine"]:
    """[f x 1/s]; cells of equal width in lattice steps differ in f and k."""
    sides = [box.slope(axis, positions(window)) * ((window[1] - window[0]) / N_FINE)[:, None] for axis, window in enumerate(windows)]
    return sides[0][:, :, None] * sides[1][:, None]


def _cdf_at(marginal: Float[Array, "voxel fine"], window: Window, position: Float[Array, " voxel"]) -> Float[Array, " voxel"]:
    """Mass below a position [lattice steps], linear within cells."""
    first, last = window
    cells = (position - first) / (last - first) * N_FINE
    return jnp.sum(marginal * jnp.clip(cells[:, None] - jnp.arange(N_FINE), 0.0, 1.0), axis=1)


def quantile(marginal: Float[Array, "voxel fine"], window: Window, p: float) -> Float[Array, " voxel"]:
    """Position, in the window's unit, below which the mass is p, linear within cells."""
    first, last = window
    cdf = jnp.cumsum(marginal, axis=1)
    cell = jnp.argmax(cdf >= p, axis=1)
    here = jnp.take_along_axis(marginal, cell[:, None], 1)[:, 0]
    below = jnp.take_along_axis(cdf, cell[:, None], 1)[:, 0] - here
    return first + (last - first) / N_FINE * (cell + jnp.clip((p - below) / jnp.maximum(here, 1e-30), 0.0, 1.0))


def _edge_mass(marginal: Array, window: Window, box: Box, axis: int) -> Float[Array, " voxel"]:
    """The fuller of the two edge rows."""
    width = EDGE_FRACTION * (box.upper - box.lower)[axis]
    rows = [box.position(axis, edge).astype(jnp.float32) for edge in (box.lower[axis] + width, box.upper[axis] - width)]
    below = [_cdf_at(marginal, window, jnp.broadcast_to(row, len(marginal))) for row in rows]
    return jnp.maximum(below[0], 1 - below[1])


def _shrink(marginal: Array, window: Window, n: int) -> Window:
    """The window that holds all but 2 x 3e-4 of the marginal, a tenth wider on either side."""
    first, last = quantile(marginal, window, 3e-4), quantile(marginal, window, 1 - 3e-4)
    margin = jnp.maximum(0.05 * (last - first), 1e-3)
    return jnp.maximum(first - margin, 0.0), jnp.minimum(last + margin, n - 1.0)


def _anytime_area(log_posterior: Array, log_prior: Array, area: Array) -> Float[Array, " voxel"]:
    """Area where the posterior exceeds 0.05 x the prior, both normalised."""
    return jnp.sum(jnp.where(log_posterior > log_prior + jnp.log(ANYTIME_LEVEL), area, 0.0), axis=(1, 2))


def _hpd_area(log_density: Array, mass: Array, area: Array) -> Float[Array, " voxel"]:
    """Smallest area that holds 95 %: bisection on the log density's level (sorting is ten times slower), then a share of the last cells."""
    relative = log_density - jnp.max(log_density, axis=(1, 2), keepdims=True)
    low, high = jnp.full(len(relative), _LOWEST_LEVEL, jnp.float32), jnp.zeros(len(relative), jnp.float32)
    for _ in range(N_BISECTIONS):
        level = 0.5 * (low + high)
        enough = _above(relative, level, mass) >= 0.95
        low, high = jnp.where(enough, level, low), jnp.where(enough, high, level)
    outer_mass, inner_mass = _above(relative, low, mass), _above(relative, high, mass)
    share = jnp.clip((0.95 - inner_mass) / jnp.maximum(outer_mass - inner_mass, 1e-30), 0.0, 1.0)
    outer, inner = _above(relative, low, area), _above(relative, high, area)
    return inner + share * (outer - inner)


_LOWEST_LEVEL = -12.0


def _where_highest(values: Float[Array, "voxel place"]) -> Int[Array, " voxel"]:
    """The first place of the highest value: as `argmax` where none is NaN, in a quarter of its time."""
    n = values.shape[1]
    is_highest = values == jnp.max(values, axis=1, keepdims=True)
    return jnp.minimum(jnp.min(jnp.where(is_highest, jnp.arange(n, dtype=jnp.int32), n), axis=1), n - 1)


def _above(density: Array, level: Array, what: Array) -> Float[Array, " voxel"]:
    """Sum of `what` where the density exceeds the level."""
    return jnp.sum(jnp.where(density > level[:, None, None], what, 0.0), axis=(1, 2))


def _describe(
    log_density: Array, mass: Array, area: Array, windows: tuple[Window, Window], box: Box, *, anytime_area: Array, edge_mass: Array
) -> Summary:
    marginals = jnp.sum(mass, axis=2), jnp.sum(mass, axis=1)
    values = jnp.stack([box.value(axis, positions(window)) for axis, window in enumerate(windows)], axis=1)  # (voxel, 2, fine)
    mean = jnp.stack([jnp.sum(m * values[:, axis], axis=1) for axis, m in enumerate(marginals)], axis=1)
    centred = values - mean[:, :, None]
    variance = [jnp.sum(m * centred[:, axis] ** 2, axis=1) for axis, m in enumerate(marginals)]
    mixed = jnp.sum(jnp.sum(mass * centred[:, 1, None], axis=2) * centred[:, 0], axis=1)
    covariance = jnp.stack([jnp.stack([variance[0], mixed], 1), jnp.stack([mixed, variance[1]], 1)], 1)
    best = _where_highest(log_density.reshape(len(log_density), -1))
    cells = jnp.stack([best // N_FINE, best % N_FINE], axis=1)
    return Summary(
        map=jnp.take_along_axis(values, cells[:, :, None], axis=2)[:, :, 0],
        mean=mean,
        covariance=covariance,
        lower=jnp.stack([box.value(i, quantile(marginals[i], windows[i], 0.025)) for i in (0, 1)], 1),
        upper=jnp.stack([box.value(i, quantile(marginals[i], windows[i], 0.975)) for i in (0, 1)], 1),
        cr_area=_hpd_area(log_density, mass, area),
        anytime_area=anytime_area,
        edge_mass=edge_mass,
    )
