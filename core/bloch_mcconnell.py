"""Bloch-McConnell equations of water and its pools, and their exact solution while the RF is constant.

State: rows [Mx of water and the x-y-z pools, My of the same, Mz of water and of every pool]; magnetisation in units of water's
equilibrium. Arrays have the batch ("cell") as *last* axis: a product of 6 x 6 matrices over many cells is then a handful of long
fused multiply-adds. The frame rotates with the RF; RF of phase phi turns about (cos phi, sin phi): phase 0 gives
dMy/dt = w1 Mz, dMz/dt = -w1 My, and off resonance dMx/dt = (w_rf - w_pool) My.
"""

from __future__ import annotations

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from scansteer.core import lineshape
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
    return sum(matrix[:, k] * state[k][None] for k in range(state.shape[0]))  # type: ignore[return-value]


def multiply(left: Float[Array, "row inner *cell"], right: Float[Array, "inner column *cell"]) -> Float[Array, "row column *cell"]:
    """Matrix product in every cell, one fused multiply-add over all cells per inner index."""
    return sum(left[:, k, None] * right[k][None] for k in range(right.shape[0]))  # type: ignore[return-value]


def then(first: Affine, second: Affine) -> Affine:
    """The map that applies `first`, then `second`."""
    return Affine(multiply(second.matrix, first.matrix), second(first.shift))


def power(step: Affine, exponent: int) -> Affine:
    """`step` applied `exponent` times (at least once), by repeated squaring."""
    result, square = None, step
    while True:
        if exponent & 1:
            result = square if result is None else then(result, square)
        exponent >>= 1
        if not exponent:
            return result  # type: ignore[return-value]
        square = hold(then(square, square))


def hold(tree):
    """Keep XLA from fusing a product into its consumers, where it would be computed again for every element."""
    return lax.optimization_barrier(tree)


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
    Stockmeyer. The number of squarings follows the largest 1-norm of the batch: put like with like, in batches that stay in cache.
    """
    scaled = jnp.concatenate([a, b[:, None]], axis=1) * duration
    norm = jnp.max(jnp.sum(jnp.abs(scaled), axis=0))
    squarings = jnp.ceil(jnp.log2(jnp.maximum(norm, 1.0))).astype(int)
    step = hold(_taylor(hold(scaled * jnp.exp2(-squarings.astype(scaled.dtype)))))

    def square(step, number):
        return lax.cond(number < squarings, lambda s: hold(_compose(s, s)), lambda s: s, step), None

    step, _ = lax.scan(square, step, jnp.arange(MAX_SQUARINGS))
    step = jnp.where(squarings <= MAX_SQUARINGS, step, jnp.nan)
    return Affine(step[:, :-1], step[:, -1])


def _compose(left, right, corner=1.0):
    """Product of two maps stored as [matrix | shift]; below them `left` has the row [0 | 0 or 1], `right` [0 | corner]."""
    last = jnp.zeros(right.shape[1], left.dtype).at[-1].set(corner).reshape((1, -1) + (1,) * (left.ndim - 2))
    return multiply(left[:, :-1], right) + left[:, -1:] * last


def _taylor(x):
    """sum_k X^k / k!, k <= 16, of X = [A | b] with a bottom row of zeros; Paterson-Stockmeyer in blocks of four powers."""
    one = jnp.eye(x.shape[0], x.shape[1], dtype=x.dtype).reshape(x.shape[:2] + (1,) * (x.ndim - 2))
    x2 = hold(_compose(x, x, 0.0))
    x3, x4 = hold(_compose(x2, x, 0.0)), hold(_compose(x2, x2, 0.0))
    factor = [1 / math.factorial(k) for k in range(DEGREE + 1)]
    result = factor[12] * one + factor[13] * x + factor[14] * x2 + factor[15] * x3 + factor[16] * x4
    for k in (8, 4, 0):
        block = factor[k] * one + factor[k + 1] * x + factor[k + 2] * x2 + factor[k + 3] * x3
        result = hold(_compose(x4, hold(result), factor[k + 4]) + block)
    return result
