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
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from scansteer.core import lineshape
from scansteer.core import rational_exponential as rational
from scansteer.core.tissue import Pool, Tissue

MAX_SQUARINGS = 29
"""Scaling by 2^29 holds a generator of norm 8e7; beyond it the result is NaN rather than wrong."""
SHORTEST_TURNED_T2 = 1e-3
"""Pools of shorter T2 [s] are not turned by a tip."""
TAYLOR_NORM = 0.15
"""Norm to which a matrix is scaled down: the remainder of degree 8 is then 1e-13 of the matrix, and is doubled by each squaring."""


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
    return _once(lambda first, second: Affine(multiply(second.matrix, first.matrix), second(first.shift)), first, second)


def _once(function, *operands):
    """`function(*operands)` behind a branch that XLA cannot see through: neither side is fused into the other.

    The branch not taken returns the NaN that it was taken for. (`lax.optimization_barrier` is gone before the CPU compiler fuses.)
    """
    broken = jnp.isnan(jax.tree.leaves(operands)[-1].reshape(-1)[0])
    result = jax.eval_shape(function, *operands)
    fail = lambda *_: jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype), result)  # noqa: E731
    return lax.cond(broken, fail, function, *operands)


def chain(first: Affine, *rest: Affine) -> Affine:
    """The map that applies `first`, then each of the others."""
    return functools.reduce(then, rest, first)


def power(step: Affine, exponent: int) -> Affine:
    """`step` applied `exponent` times (at least once), by repeated squaring."""
    result = step
    for bit in bin(exponent)[3:]:
        result = then(result, result)
        result = then(result, step) if bit == "1" else result
    return result


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
    n, pools = n_transverse(tissue), tissue.pools
    z_water = 2 * n
    seen = offset - 2 * math.pi * tissue.b0_hz
    water = [(0, n, z_water)]
    terms = [
        *_precession(0, n, seen, 1 / tissue.t2),
        (-1 / tissue.t1, [(z_water, z_water, 1)]),
    ]
    turned = list(water)
    for z, pool in enumerate(pools, start=z_water + 1):
        difference = seen - 2 * math.pi * pool.offset_hz
        pairs = [(z_water, z)]
        decay = 1 / pool.t1
        if is_transverse(pool):
            x = len(turned)
            turned.append((x, n + x, z))
            terms += _precession(x, n + x, difference, 1 / pool.t2)
            pairs += [(0, x), (n, n + x)]
        else:
            decay = decay + w1**2 * absorption(pool, difference)
        terms.append((-decay, [(z, z, 1)]))
        terms.append((pool.k, [entry for one, other in pairs for entry in ((one, other, 1), (other, other, -1))]))
        terms.append((pool.k * pool.f, [entry for one, other in pairs for entry in ((other, one, 1), (one, one, -1))]))
    terms.append((w1 * jnp.cos(phase), [entry for _, y, z in turned for entry in ((y, z, 1), (z, y, -1))]))
    if not (isinstance(phase, float) and phase == 0.0):
        terms.append((w1 * jnp.sin(phase), [entry for x, _, z in turned for entry in ((x, z, -1), (z, x, 1))]))
    source = [(1 / tissue.t1, [(z_water, 0, 1)])]
    source += [(pool.f / pool.t1, [(z, 0, 1)]) for z, pool in enumerate(pools, start=z_water + 1)]
    size = z_water + 1 + len(pools)
    return _assemble(terms, (size, size), shape), _assemble(source, (size, 1), shape)[:, 0]


def _precession(x: int, y: int, offset, decay) -> list:
    return [(offset, [(x, y, 1), (y, x, -1)]), (-decay, [(x, x, 1), (y, y, 1)])]


def _assemble(terms, size: tuple[int, int], shape: tuple[int, ...]) -> Float[Array, "row column *cell"]:
    """Matrix of `size` per cell from terms (value, [(row, column, sign), ..]), as one product of patterns and values."""
    patterns = np.zeros((*size, len(terms)))
    for number, (_, places) in enumerate(terms):
        for row, column, sign in places:
            patterns[row, column, number] += sign
    values = jnp.stack([jnp.broadcast_to(value, shape).reshape(-1) for value, _ in terms])
    flat = jnp.dot(patterns.reshape(-1, len(terms)), values, precision=lax.Precision.HIGHEST)
    return flat.reshape(size + shape)


def absorption(pool: Pool, offset) -> Float[Array, "..."]:
    """pi g [s] of a z-only pool at `offset` [rad/s] from its resonance."""
    if pool.lineshape == "lorentzian":
        return lineshape.lorentzian(offset, pool.t2)
    return lineshape.super_lorentzian(offset, pool.t2, jnp.asarray(2 * math.pi * pool.cutoff_hz))


def propagate(a: Float[Array, "row row *cell"], b: Float[Array, "row *cell"], duration) -> Affine:
    """Exact solution of dM/dt = A M + b over `duration` [s], as an affine map.

    [exp(A t) | integral of exp(A s) b] by scaling and squaring of a Taylor polynomial of degree 8. The number of squarings
    follows the largest 1-norm of the batch: pass cells in batches that stay in a core's cache.
    """
    step = _exponential(jnp.concatenate([a, b[:, None]], axis=1) * duration)
    return Affine(step[:, :-1], step[:, -1])


@jax.custom_jvp
def _exponential(x):
    """[exp(A) | integral of exp(A s) b over 0..1] of [A | b]."""
    scaled, squarings = _scaled(x)
    step = lax.fori_loop(0, squarings, lambda _, map: _compose(map, map, 1.0), _taylor(scaled))
    return jnp.where(squarings <= MAX_SQUARINGS, step, jnp.nan)


@_exponential.defjvp
def _exponential_jvp(primals, tangents):
    """By differentiating a loop of fixed length, which unlike the one above can be run backwards."""

    def fixed_length(x):
        scaled, squarings = _scaled(x)

        def square(step, number):
            return lax.cond(number < squarings, lambda map: _compose(map, map, 1.0), lambda map: map, step), None

        step, _ = lax.scan(square, _taylor(scaled), jnp.arange(MAX_SQUARINGS))
        return jnp.where(squarings <= MAX_SQUARINGS, step, jnp.nan)

    return jax.jvp(fixed_length, primals, tangents)


def _scaled(x):
    """x / 2^n of norm below 1, and n."""
    norm = lax.stop_gradient(jnp.max(jnp.sum(jnp.abs(x), axis=0)))
    squarings = jnp.ceil(jnp.log2(jnp.maximum(norm / TAYLOR_NORM, 1.0))).astype(int)
    return x * jnp.exp2(-squarings.astype(x.dtype)), squarings


def _compose(left, right, corner):
    """Product of two maps stored as [matrix | shift]; below them `left` has the row [0 | 0 or 1], `right` [0 | corner]."""
    last = np.eye(right.shape[1])[-1].reshape((1, -1) + (1,) * (left.ndim - 2))
    return multiply(left[:, :-1], right) + left[:, -1:] * (corner * last)


def _taylor(x):
    """sum_k X^k / k!, k <= 8, of X = [A | b] with a bottom row of zeros, in three products.

    Bader P, Blanes S, Casas F. Computing the matrix exponential with an optimized Taylor polynomial approximation. Mathematics 7 (2019),
    doi:10.3390/math7121174, equation 12.
    """
    one = np.eye(*x.shape[:2]).reshape(x.shape[:2] + (1,) * (x.ndim - 2))
    root = math.sqrt(177)
    x2 = _once(lambda x: _compose(x, x, 0.0), x)
    x4 = _once(lambda x, x2: _compose(x2, (1 + root) / 132 * x + (1 + root) / 528 * x2, 0.0), x, x2)

    def last(x, x2, x4):
        constant = (-271 + 29 * root) / 210
        linear, square, fourth = 11 * (root - 1) / 840, 11 * (root - 9) / 3360, (89 - root) / 5040 * 2.25
        right = constant * one + linear * x + square * x2 + fourth * x4
        return one + x + (857 - 58 * root) / 630 * x2 + _compose(2 / 3 * x2 + x4, right, constant)

    return _once(last, x, x2, x4)


def identity(size: int, shape: tuple[int, ...]) -> Affine:
    """The map that changes nothing."""
    one = jnp.eye(size).reshape((size, size) + (1,) * len(shape))
    return Affine(jnp.broadcast_to(one, (size, size, *shape)), jnp.zeros((size, *shape)))


def free(tissue: Tissue, duration, offset=0.0) -> Affine:
    """Free precession over `duration` [s] in a frame at `offset` [rad/s] from the nominal water frequency."""
    n, shape = n_transverse(tissue), cell_shape(tissue)
    transverse = _free_transverse(tissue, duration, offset)
    longitudinal = free_longitudinal(tissue, duration)
    count = longitudinal.shift.shape[0]
    upper = jnp.concatenate([transverse, jnp.zeros((2 * n, count, *shape))], axis=1)
    lower = jnp.concatenate([jnp.zeros((count, 2 * n, *shape)), longitudinal.matrix], axis=1)
    shift = jnp.concatenate([jnp.zeros((2 * n, *shape)), longitudinal.shift])
    return Affine(jnp.concatenate([upper, lower]), shift)


def _free_transverse(tissue, duration, offset) -> Float[Array, "row row *cell"]:
    """exp(A t) of the transverse components; of the complex 2 x 2 matrix of Mx + i My in closed form, else by `propagate`."""
    n, shape = n_transverse(tissue), cell_shape(tissue)
    if n > 2:
        a, _ = generator(tissue, 0.0, offset)
        return propagate(a[: 2 * n, : 2 * n], jnp.zeros((2 * n, *shape)), duration).matrix
    diagonal, into, from_ = _complex_rates(tissue, duration, offset, shape)
    if n == 1:
        entries = [[jnp.exp(diagonal[0])]]
    else:
        mean, half = 0.5 * (diagonal[0] + diagonal[1]), 0.5 * (diagonal[0] - diagonal[1])
        square = half**2 + into * from_
        root = jnp.sqrt(jnp.where(jnp.abs(square) < 1e-12, 1e-12, square))
        plus, minus = jnp.exp(mean + root), jnp.exp(mean - root)
        even, odd = 0.5 * (plus + minus), 0.5 * (plus - minus) / root
        entries = [[even + half * odd, from_ * odd], [into * odd, even - half * odd]]
    real = [jnp.concatenate([jnp.stack([e.real for e in row]), jnp.stack([-e.imag for e in row])]) for row in entries]
    imaginary = [jnp.concatenate([jnp.stack([e.imag for e in row]), jnp.stack([e.real for e in row])]) for row in entries]
    return jnp.stack([*real, *imaginary])


def _complex_rates(tissue, duration, offset, shape):
    """Diagonal of the generator of Mx + i My, and the exchange into and from the first x-y-z pool (0 without one), times the duration."""
    full = lambda value: jnp.broadcast_to(value * duration, shape)  # noqa: E731
    seen = offset - 2 * math.pi * tissue.b0_hz
    pools = [pool for pool in tissue.pools if is_transverse(pool)]
    out = sum((pool.k * pool.f for pool in pools), start=0.0 * tissue.t2)
    diagonal = [lax.complex(full(-1 / tissue.t2 - out), full(-seen))]
    diagonal += [lax.complex(full(-1 / pool.t2 - pool.k), full(2 * math.pi * pool.offset_hz - seen)) for pool in pools]
    into, from_ = (full(pools[0].k * pools[0].f), full(pools[0].k)) if pools else (full(0.0), full(0.0))
    return diagonal, into, from_


def turn(tissue: Tissue, angle) -> Affine:
    """Turn of water and the x-y-z pools by `angle` [rad] from z towards x, by a pulse too short for anything else to happen.

    A positive angle lays Mz along the effective field of RF above resonance, phase 0. Pools of T2 below a millisecond do not follow: real tips
    take about that long.
    """
    n, shape = n_transverse(tissue), cell_shape(tissue)
    size = 2 * n + 1 + len(tissue.pools)
    followers = [(0, 2 * n, angle)]
    for z, pool in enumerate(tissue.pools, start=2 * n + 1):
        if is_transverse(pool):
            followers.append((len(followers), z, jnp.where(pool.t2 > SHORTEST_TURNED_T2, angle, 0.0)))
    waves = _once(lambda angles: [(jnp.cos(a), jnp.sin(a)) for a in angles], [a + jnp.zeros(shape) for *_, a in followers])
    terms = [(1.0, [(row, row, 1) for row in range(n, size) if row not in [z for _, z, _ in followers]])]
    for (x, z, _), (cosine, sine) in zip(followers, waves, strict=True):
        terms += [(cosine, [(x, x, 1), (z, z, 1)]), (sine, [(x, z, 1), (z, x, -1)])]
    return Affine(_assemble(terms, (size, size), shape), jnp.zeros((size, *shape)))


def free_longitudinal(tissue: Tissue, duration) -> Affine:
    """Relaxation and exchange of Mz alone over `duration` [s], as an affine map of Mz of water and pools.

    Detailed balance makes all eigenvalues real and negative, so that a sum over seven poles is exact to 1e-13; the pools exchange
    with water only, so that each resolvent is written down directly.
    """
    shape = cell_shape(tissue)
    full = lambda value: jnp.broadcast_to(value * duration, shape)  # noqa: E731
    back = [full(pool.k) for pool in tissue.pools]
    out = [full(pool.k * pool.f) for pool in tissue.pools]
    decay = [_total([full(1 / tissue.t1), *out]), *(full(1 / pool.t1 + pool.k) for pool in tissue.pools)]
    source = jnp.stack([full(1 / tissue.t1), *(full(pool.f / pool.t1) for pool in tissue.pools)])
    ones = [jnp.ones(shape)]
    into, from_ = jnp.stack(ones + out), jnp.stack(ones + back)
    own = np.eye(len(decay)).reshape((len(decay),) * 2 + (1,) * len(shape))
    own[0, 0] = 0.0

    def add(total, at):
        pole, weight = at
        local = [1 / (pole + rate) for rate in decay[1:]]
        water = 1 / (pole + decay[0] - _total([k * kf * one for k, kf, one in zip(back, out, local, strict=True)], pole))
        reach = jnp.stack([jnp.ones(shape, water.dtype), *local])
        resolvent = (into * reach)[:, None] * (from_ * reach * water)[None] + own * reach[None]
        return (total[0] - 2 * (weight * resolvent).real, total[1] - 2 * (weight / pole * resolvent).real), None

    nothing = jnp.zeros((len(decay), len(decay), *shape))
    at = (jnp.asarray(rational.POLES), jnp.asarray(rational.WEIGHTS))
    matrix, over_time = lax.scan(add, (nothing, nothing), at)[0]
    return Affine(matrix, apply(over_time, source))


def _total(values, like=0.0):
    return functools.reduce(operator.add, values) if values else 0.0 * like
