"""Bloch-McConnell equations of water and its pools, and their exact solution while the RF is constant.

State: rows [Mx of water and the x-y-z pools, My of the same, Mz of water and of every pool]; magnetisation in units of water's
equilibrium. Arrays have the batch ("cell") as *last* axis: a product of 6 x 6 matrices over many cells is then a handful of long
fused multiply-adds. The frame rotates with the RF; RF of phase phi turns about (cos phi, sin phi): phase 0 gives
dMy/dt = w1 Mz, dMz/dt = -w1 My, and off resonance dMx/dt = (w_rf - w_pool) My.
"""

from __future__ import annotations

import functools
import math
import operator

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from scansteer.core import lineshape
from scansteer.core import rational_exponential as rational
from scansteer.core.tissue import Pool, Tissue

MAX_SQUARINGS = 26
"""Scaling by 2^26 holds a generator of norm 6e7; beyond it the result is NaN rather than wrong."""
DEGREE = 16
"""Degree of the Taylor polynomial; with norm below 1 its remainder is 3e-15."""


class Affine(eqx.Module):
    """The map M -> matrix @ M + shift, one per cell."""

    matrix: Float[Array, "row column *cell"]
    shift: Float[Array, "row *cell"]

    def __call__(self, state: Float[Array, "column *cell"]) -> Float[Array, "row *cell"]:
        return apply(self.matrix, state) + self.shift


def apply(matrix: Float[Array, "row column *cell"], state: Float[Array, "column *cell"]) -> Float[Array, "row *cell"]:
    """Matrix times vector in every cell."""
    return _sum(matrix[:, k] * state[k][None] for k in range(state.shape[0]))


def multiply(left: Float[Array, "row inner *cell"], right: Float[Array, "inner column *cell"]) -> Float[Array, "row column *cell"]:
    """Matrix product in every cell, one fused multiply-add over all cells per inner index.

    XLA fuses a product into its consumers and then computes it again for each of their elements. Long chains of products therefore
    belong into the body of a `lax.scan`, one product each.
    """
    return _sum(left[:, k, None] * right[k][None] for k in range(right.shape[0]))


def _sum(terms):
    return functools.reduce(operator.add, terms)


def then(first: Affine, second: Affine) -> Affine:
    """The map that applies `first`, then `second`."""
    return Affine(multiply(second.matrix, first.matrix), second(first.shift))


def power(step: Affine, exponent: int) -> Affine:
    """`step` applied `exponent` times (at least once), by repeated squaring."""

    def one_bit(result, bit):
        square = then(result, result)
        return lax.cond(bit, lambda map: then(map, step), lambda map: map, square), None

    bits = [digit == "1" for digit in bin(exponent)[3:]]
    return lax.scan(one_bit, step, jnp.asarray(bits))[0] if bits else step


def is_transverse(pool: Pool) -> bool:
    """Whether the pool has x-y-z magnetisation."""
    return pool.lineshape == "bloch"


def n_transverse(tissue: Tissue) -> int:
    """Number of x-y-z pools, water included."""
    return 1 + sum(is_transverse(pool) for pool in tissue.pools)


def equilibrium(tissue: Tissue) -> Float[Array, "pool *cell"]:
    """Longitudinal equilibrium: 1 for water, the volume fraction for a pool."""
    shape = cell_shape(tissue)
    return jnp.stack([jnp.ones(shape, _dtype(tissue)), *(jnp.broadcast_to(pool.f, shape) for pool in tissue.pools)])


def cell_shape(tissue: Tissue) -> tuple[int, ...]:
    """Common shape of the tissue's leaves."""
    return jnp.broadcast_shapes(*(jnp.shape(leaf) for leaf in jax.tree.leaves(tissue)))


def _dtype(tissue: Tissue):
    return jnp.result_type(float, *jax.tree.leaves(tissue))


def generator(tissue: Tissue, w1, offset, phase=0.0) -> tuple[Float[Array, "row row *cell"], Float[Array, "row *cell"]]:
    """A and b of dM/dt = A M + b.

    Parameters
    ----------
    tissue
        Leaves of shape (*cell).
    w1
        True RF amplitude seen by the spins [rad/s]: gamma B1 times the tissue's relative B1.
    offset
        Frame (RF) frequency minus the nominal water frequency [rad/s]. With w1 = 0: the frame of free precession.
    phase
        RF phase in this frame [rad].
    """
    shape = jnp.broadcast_shapes(cell_shape(tissue), jnp.shape(w1), jnp.shape(offset), jnp.shape(phase))
    full = lambda value: jnp.broadcast_to(jnp.asarray(value, _dtype(tissue)), shape)  # noqa: E731
    n, pools = n_transverse(tissue), tissue.pools
    size = 2 * n + 1 + len(pools)
    zero = jnp.zeros(shape, _dtype(tissue))
    a = [[zero] * size for _ in range(size)]
    seen = full(offset - 2 * math.pi * tissue.b0_hz)
    cosine, sine = full(w1 * jnp.cos(phase)), full(w1 * jnp.sin(phase))
    z_water, outflow = 2 * n, full(sum(pool.k * pool.f for pool in pools) if pools else 0.0)
    transverse_outflow = full(sum((pool.k * pool.f for pool in pools if is_transverse(pool)), start=jnp.zeros(())))
    _spin(a, 0, n, z_water, seen, full(1 / tissue.t2) + transverse_outflow, cosine, sine)
    a[z_water][z_water] = -(full(1 / tissue.t1) + outflow)
    index = 0
    for number, pool in enumerate(pools, start=1):
        z = z_water + number
        back, forth = full(pool.k), full(pool.k * pool.f)
        pairs = [(z_water, z)]
        a[z][z] = -(full(1 / pool.t1) + back)
        difference = seen - full(2 * math.pi * pool.offset_hz)
        if is_transverse(pool):
            index += 1
            _spin(a, index, n + index, z, difference, full(1 / pool.t2) + back, cosine, sine)
            pairs += [(0, index), (n, n + index)]
        else:
            a[z][z] = a[z][z] - full(w1) ** 2 * absorption(pool, difference)
        for water, other in pairs:
            a[water][other], a[other][water] = back, forth
    rates = [full(1 / tissue.t1), *(full(pool.f / pool.t1) for pool in pools)]
    return jnp.stack([jnp.stack(row) for row in a]), jnp.stack([zero] * 2 * n + rates)


def _spin(a, x: int, y: int, z: int, offset, decay, cosine, sine) -> None:
    """Enter one pool's own precession, nutation and transverse decay."""
    a[x][x] = a[y][y] = -decay
    a[x][y], a[y][x] = offset, -offset
    a[y][z], a[z][y] = cosine, -cosine
    a[x][z], a[z][x] = -sine, sine


def absorption(pool: Pool, offset) -> Float[Array, "..."]:
    """pi g [s] of a z-only pool at `offset` [rad/s] from its resonance."""
    if pool.lineshape == "lorentzian":
        return lineshape.lorentzian(offset, pool.t2)
    return lineshape.super_lorentzian(offset, pool.t2, jnp.asarray(2 * math.pi * pool.cutoff_hz))


def propagate(a: Float[Array, "row row *cell"], b: Float[Array, "row *cell"], duration) -> Affine:
    """Exact solution of dM/dt = A M + b over `duration` [s], as an affine map.

    [exp(A t) | integral of exp(A s) b] by scaling and squaring of a Taylor polynomial of degree 16 in the form of Paterson and
    Stockmeyer. The number of squarings follows the largest 1-norm of the batch: pass cells in batches that stay in a core's cache.
    """
    scaled = jnp.concatenate([a, b[:, None]], axis=1) * duration
    norm = jnp.max(jnp.sum(jnp.abs(scaled), axis=0))
    squarings = jnp.ceil(jnp.log2(jnp.maximum(norm, 1.0))).astype(int)
    step = _taylor(scaled * jnp.exp2(-squarings.astype(scaled.dtype)))

    def square(step, number):
        return lax.cond(number < squarings, lambda map: _compose(map, map, 1.0), lambda map: map, step), None

    step, _ = lax.scan(square, step, jnp.arange(MAX_SQUARINGS))
    step = jnp.where(squarings <= MAX_SQUARINGS, step, jnp.nan)
    return Affine(step[:, :-1], step[:, -1])


def _compose(left, right, corner):
    """Product of two maps stored as [matrix | shift]; below them `left` has the row [0 | 0 or 1], `right` [0 | corner]."""
    last = jnp.zeros(right.shape[1], left.dtype).at[-1].set(corner).reshape((1, -1) + (1,) * (left.ndim - 2))
    return multiply(left[:, :-1], right) + left[:, -1:] * last


def _taylor(x):
    """sum_k X^k / k!, k <= 16, of X = [A | b] with a bottom row of zeros; Paterson-Stockmeyer in blocks of four powers."""
    one = jnp.eye(x.shape[0], x.shape[1], dtype=x.dtype).reshape(x.shape[:2] + (1,) * (x.ndim - 2))

    def raise_power(power, _):
        power = _compose(power, x, 0.0)
        return power, power

    x4, (x2, x3, _) = lax.scan(raise_power, x, None, length=3)
    block = lambda c: c[0] * one + c[1] * x + c[2] * x2 + c[3] * x3  # noqa: E731

    def horner(result, coefficients):
        return _compose(x4, result, coefficients[4]) + block(coefficients), None

    factors = [1 / math.factorial(k) for k in range(DEGREE + 1)]
    table = jnp.asarray([factors[k : k + 5] for k in (8, 4, 0)], x.dtype)
    return lax.scan(horner, block(factors[12:16]) + factors[16] * x4, table)[0]


def identity(size: int, shape: tuple[int, ...]) -> Affine:
    """The map that changes nothing."""
    one = jnp.eye(size).reshape((size, size) + (1,) * len(shape))
    return Affine(jnp.broadcast_to(one, (size, size, *shape)), jnp.zeros((size, *shape)))


def free(tissue: Tissue, duration, offset=0.0) -> Affine:
    """Free precession over `duration` [s] in a frame at `offset` [rad/s] from the nominal water frequency."""
    n, shape = n_transverse(tissue), cell_shape(tissue)
    a, _ = generator(tissue, 0.0, offset)
    transverse = propagate(a[: 2 * n, : 2 * n], jnp.zeros((2 * n, *shape)), duration).matrix
    longitudinal = free_longitudinal(tissue, duration)
    count = longitudinal.shift.shape[0]
    upper = jnp.concatenate([transverse, jnp.zeros((2 * n, count, *shape))], axis=1)
    lower = jnp.concatenate([jnp.zeros((count, 2 * n, *shape)), longitudinal.matrix], axis=1)
    shift = jnp.concatenate([jnp.zeros((2 * n, *shape)), longitudinal.shift])
    return Affine(jnp.concatenate([upper, lower]), shift)


def turned(tissue: Tissue, pulse: Affine, angle) -> Affine:
    """`pulse` between an instantaneous turn of all x-y-z pools by `angle` [rad] from z towards x, and its reverse.

    A positive angle lays Mz along the effective field of RF above resonance, phase 0.
    """
    n = n_transverse(tissue)
    z = [2 * n, *(2 * n + i for i, pool in enumerate(tissue.pools, start=1) if is_transverse(pool))]
    x = list(range(n))
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    matrix = pulse.matrix
    columns = (matrix[:, x] * cosine - matrix[:, z] * sine, matrix[:, x] * sine + matrix[:, z] * cosine)
    matrix = matrix.at[:, jnp.asarray(x)].set(columns[0]).at[:, jnp.asarray(z)].set(columns[1])
    full = jnp.concatenate([matrix, pulse.shift[:, None]], axis=1)
    rows = (full[jnp.asarray(x)] * cosine - full[jnp.asarray(z)] * sine, full[jnp.asarray(x)] * sine + full[jnp.asarray(z)] * cosine)
    full = full.at[jnp.asarray(x)].set(rows[0]).at[jnp.asarray(z)].set(rows[1])
    return Affine(full[:, :-1], full[:, -1])


def free_longitudinal(tissue: Tissue, duration) -> Affine:
    """Relaxation and exchange of Mz alone over `duration` [s], as an affine map of Mz of water and pools.

    Detailed balance makes all eigenvalues real and negative, so that a sum over seven poles is exact to 1e-13; the pools exchange
    with water only, so that each resolvent is written down directly.
    """
    shape = cell_shape(tissue)
    full = lambda value: jnp.broadcast_to(value * duration, shape)  # noqa: E731
    back = [full(pool.k) for pool in tissue.pools]
    out = [full(pool.k * pool.f) for pool in tissue.pools]
    decay = [full(1 / tissue.t1) + _total(out, shape), *(full(1 / pool.t1 + pool.k) for pool in tissue.pools)]
    source = [full(1 / tissue.t1), *(full(pool.f / pool.t1) for pool in tissue.pools)]
    count = len(decay)
    into, from_ = [jnp.ones(shape), *out], [jnp.ones(shape), *back]
    matrix = [[jnp.zeros(shape)] * count for _ in range(count)]
    shift = [jnp.zeros(shape)] * count
    for pole, weight in zip(rational.POLES, rational.WEIGHTS, strict=True):
        local = [1 / (pole + rate) for rate in decay[1:]]
        water = 1 / (pole + decay[0] - _total([k * kf * one for k, kf, one in zip(back, out, local, strict=True)], shape))
        reach = [jnp.ones(shape), *local]
        for row in range(count):
            for column in range(count):
                entry = into[row] * from_[column] * reach[row] * reach[column] * water
                entry = entry + local[row - 1] if row == column > 0 else entry
                matrix[row][column] = matrix[row][column] - 2 * (weight * entry).real
                shift[row] = shift[row] - 2 * (weight / pole * entry).real * source[column]
    return Affine(jnp.stack([jnp.stack(row) for row in matrix]), jnp.stack(shift))


def _total(values, shape):
    return _sum([jnp.zeros(shape), *values])
