"""The encoder's answers for a whole volume: running sums and posteriors of many voxels, in blocks of one size.

A block is small, so that what is computed on the way to its answer stays in the processor's cache, and padded, so that a voxel's answer is the
same bit for bit alone and in a volume. Blocks are answered several to a call, one after the other: what a call costs would else be as much as
the answer. Calls run side by side on all cores.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial, reduce
from operator import add
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from scansteer.core import agreement, gaussian_region, signal_basis, voxel_columns
from scansteer.core import coordinate as coordinates
from scansteer.core import encoder as encoders
from scansteer.core.code_generation import for_blocks_of_voxels, with_barriers
from scansteer.core.encoder import Encoder, Expansion, Fit, Gaussian, Plan, Points, State
from scansteer.core.grid_posterior import Info
from scansteer.core.likelihood import Noise
from scansteer.core.noise import NoiseEstimate
from scansteer.core.signal_basis import Basis
from scansteer.core.voxel_columns import Columns, Rows

BLOCK = 128
"""Voxels per block."""
BATCH, SMALL_BATCH = 64, 4
"""Blocks per call, of a volume and of a region: a few thousand voxels then keep all cores busy as well. In a volume up to 8 192 voxels are one
call, a tenth of a second of one core."""
SEARCH = 0.4
"""Scale of the search for the MAP, in standard deviations of the posterior."""


class Answer(NamedTuple):
    """What the encoder says of some voxels."""

    info: Info
    posterior: Gaussian


class Volume:
    """The encoder alone; voxels are those of `begin`, in its order."""

    def __init__(self, encoder: Encoder, columns: Columns, discrepancy: float, block: int = BLOCK, batch: int = BATCH) -> None:
        """Compile: ten seconds. XLA's older code generator would take three quarters of that, its code half as long again per voxel and more."""
        self.encoder, self.columns, self._block, self._batch = encoder, columns, block, batch
        self._plan = encoders.plan(encoder)
        self._discrepancy = jnp.asarray(discrepancy)
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="scansteer-encoder")
        static = eqx.filter(encoder, eqx.is_array, inverse=True)
        self._answer = jax.jit(partial(_answer_blocks, static=static, kinds=columns.kinds), donate_argnums=0, compiler_options=for_blocks_of_voxels())
        self._evaluate = eqx.filter_jit(_evaluate_blocks, compiler_options=with_barriers())  # pyright: ignore[reportCallIssue] - for jax.jit
        self._draw = eqx.filter_jit(agreement.posterior_draw)
        self._n_voxels = 0
        self._rows: list[Rows] = []
        self._states: list[State] = []
        self._warm_up()

    def begin(self, rows: Rows, n_voxels: int) -> None:
        """Fix the voxels: `rows` as `core.voxel_columns.rows_of_voxels` gives them."""
        n_batches = -(-n_voxels // (self._batch * self._block))
        self._n_voxels = n_voxels
        self._rows = [tuple(jnp.asarray(self._blocks(row, index), jnp.float32) for row in rows) for index in range(n_batches)]
        state = encoders.init(self._block, self._block if self.columns.mapped else 1, sum(self.encoder.basis.ranks))
        self._states = [jax.tree.map(lambda leaf: jnp.zeros((self._batch, *leaf.shape), leaf.dtype), state) for _ in range(n_batches)]

    def absorb(self, expected: Float[np.ndarray, "node point"], signal: Float[np.ndarray, " voxel"], noise: NoiseEstimate) -> Answer:
        """Add one image and infer; `expected` are its simulated signals at every nuisance node. NumPy leaves over all voxels."""
        columns = voxel_columns.at_mapped_nodes(self.columns, np.asarray(expected))
        at_nodes = jnp.asarray(signal_basis.coefficients(self.encoder.basis, columns), jnp.float32)
        known = self._known(noise)
        weights = eqx.filter(self.encoder, eqx.is_array)
        n_blocks = -(-self._n_voxels // self._block)

        def one(index: int) -> Answer:
            values = self._blocks(np.asarray(signal, np.float64)[None], index)[:, 0]
            here = min(n_blocks - index * self._batch, self._batch)
            self._states[index], answer = self._answer(
                self._states[index], weights, self._plan, self._rows[index], at_nodes, known, values, here
            )
            return jax.tree.map(np.asarray, answer)

        return self._joined(list(self._pool.map(one, range(len(self._states)))))

    def nrmse_at(self, values: Float[np.ndarray, "voxel 2"], noise: NoiseEstimate) -> Float[np.ndarray, " voxel"]:
        """Norm of the residual over the norm of the signal at given (f, k), all else fitted, for comparisons by one measure."""
        known, coordinate = self._known(noise), self.encoder.coordinate
        z = np.stack([np.asarray(coordinate.z(axis, jnp.asarray(values[:, axis], jnp.float32))) for axis in (0, 1)])
        parts = []
        for index, state in enumerate(self._states):
            residual = self._evaluate(self.encoder, self._plan, state, known, jnp.asarray(self._blocks(z, index)))
            parts.append(np.sqrt(np.asarray(residual) / np.maximum(np.asarray(state.energy), 1e-30)))
        return self._joined(parts)

    def draw(self, key: jax.Array, posterior: Gaussian) -> Float[np.ndarray, "voxel 2"]:
        """One random (f, k) per voxel from the posteriors that `absorb` gave."""
        parts, size = [], self._batch * self._block
        for index in range(len(self._states)):
            rows = np.minimum(np.arange(index * size, (index + 1) * size), self._n_voxels - 1)
            batch = jax.tree.map(lambda leaf, rows=rows: leaf[rows], posterior)
            parts.append(np.asarray(self._draw(jax.random.fold_in(key, index), batch, self.encoder.coordinate)))
        return np.concatenate(parts)[: self._n_voxels]

    def close(self) -> None:
        self._pool.shutdown(wait=False)

    def _known(self, noise: NoiseEstimate) -> Noise:
        return Noise(jnp.asarray(float(noise.sigma)), jnp.asarray(float(noise.dof)), self._discrepancy)

    def _blocks(self, values: Float[np.ndarray, "lead voxel *rest"], index: int) -> Float[np.ndarray, "block lead voxel *rest"]:
        """One batch of blocks, the last one padded with copies of the last voxel."""
        size = self._batch * self._block
        here = values[:, np.minimum(np.arange(index * size, (index + 1) * size), values.shape[1] - 1)]
        return np.moveaxis(here.reshape(len(values), self._batch, self._block, *values.shape[2:]), 1, 0)

    def _joined(self, batches):
        """Leaves (block, voxel, ..) of all batches -> (voxel, ..), without the padding."""
        return jax.tree.map(
            lambda *leaves: np.concatenate([leaf.reshape(-1, *leaf.shape[2:]) for leaf in leaves])[: self._n_voxels], *batches
        )

    def _warm_up(self) -> None:
        mapped = [axis for axis in self.columns.axes if axis.name in self.columns.mapped]
        self.begin(tuple(np.full((2, 2, axis.n_nodes), 1 / axis.n_nodes) for axis in mapped), 2)
        nodes = int(np.prod([axis.n_nodes for axis in self.columns.axes], dtype=int))
        made_up = np.full((nodes + 1, self.encoder.basis.functions.shape[1]), 0.5), np.full(2, 0.5), NoiseEstimate(0.01, 10.0)
        for _ in range(2):
            self.draw(jax.random.PRNGKey(0), self.absorb(*made_up).posterior)
        self.begin((), 0)


def answer(encoder: Encoder, plan: Plan, state: State, noise: Noise) -> Answer:
    """Posterior and summary of every voxel of a block."""
    posterior, expansion, seen = encoders.infer(encoder, plan, state, noise)
    best, at = _most_probable(encoder, plan, expansion, noise, posterior, seen)
    nrmse = jnp.sqrt(at.residual / jnp.maximum(state.energy.astype(jnp.float32), 1e-30))
    summary = gaussian_region.summarise(posterior, best, encoder.coordinate)
    return Answer(Info(summary, nrmse, at.amplitude), posterior)


def _most_probable(
    encoder: Encoder, plan: Plan, expansion: Expansion, noise: Noise, posterior: Gaussian, seen: Points
) -> tuple[Float[jax.Array, "2 voxel"], Fit]:
    """Where each voxel's density over (f, k) is highest, in z, and the fit there.

    Sought about the best of the points of the last refinement, for where the posterior is a curved ridge its mean does not lie on it, and
    at a Newton step from there, whole and half. The likelihood's peak, were it Gaussian, and the point halfway to it are tried beside.
    """

    def looked_at(z: jax.Array) -> tuple[jax.Array, jax.Array, Fit]:
        z = lax.optimization_barrier(jnp.clip(z, -4.5, 4.5))
        fit = encoders.evaluate(encoder, plan, expansion, noise, z)
        return z, fit.log_likelihood + density(z), fit

    def density(z: jax.Array) -> jax.Array:
        return sum(encoder.coordinate.log_density(axis, z[axis]) for axis in (0, 1))  # pyright: ignore[reportReturnType] - of two

    start = _highest(seen.log_likelihood + density(seen.z), seen.z).T
    peak = lax.optimization_barrier(gaussian_region.mode(posterior))
    narrower = SEARCH * posterior.root
    about = coordinates.points(start, narrower, encoders.STENCIL)
    near = looked_at(jnp.concatenate([about, jnp.stack([peak, 0.5 * (posterior.mean.T + peak)], axis=1)], axis=1))
    heights = near[1][: len(encoders.STENCIL)]
    step, _ = encoders.newton(heights - heights[0])
    far = looked_at(coordinates.displaced(start, narrower, jnp.stack([step, 0.5 * step], axis=1)))
    z, height, fit = jax.tree.map(lambda *each: jnp.concatenate(each, axis=-2), near, far)
    return _highest(height, (z, fit))


def _highest(height: Float[jax.Array, "point voxel"], tree):
    """Of leaves (.., point, voxel), each voxel's where `height` is highest."""
    height, tree = lax.optimization_barrier((height, tree))
    best, so_far = jax.tree.map(lambda leaf: leaf[..., 0, :], tree), height[0]
    for number in range(1, len(height)):
        higher = height[number] > so_far
        best = jax.tree.map(lambda leaf, old, number=number, higher=higher: jnp.where(higher, leaf[..., number, :], old), tree, best)
        so_far = jnp.maximum(height[number], so_far)
    return best


def voxel_coefficients(basis: Basis, kinds: tuple[int, ...], rows: Rows, at_nodes: jax.Array) -> Float[jax.Array, "function voxel"]:
    """One image's coefficients of every voxel, from those at the nodes of what is mapped.

    The first half of the maps by a matrix product, the others within each voxel: the weights of all nodes at once would be a thousand per
    voxel where there are six maps.
    """
    half = (len(rows) + 1) // 2
    result = []
    for kind, block in zip(kinds, basis.blocks, strict=True):
        outer, inner = voxel_columns.weights(rows[:half], kind).T, voxel_columns.weights(rows[half:], kind - half).T
        outer, inner = lax.optimization_barrier((outer, inner))
        nodes = jnp.moveaxis(at_nodes[:, block].reshape(len(outer), len(inner), -1), 0, -1)
        at_inner = lax.optimization_barrier(nodes @ outer)
        result.append(lax.optimization_barrier(reduce(add, (weight * each for weight, each in zip(inner, at_inner, strict=True)))))
    return jnp.concatenate(result)


def _answer_blocks(
    states: State,
    weights: Encoder,
    plan: Plan,
    rows: Rows,
    at_nodes: jax.Array,
    noise: Noise,
    signals: jax.Array,
    n_blocks: int,
    *,
    static: Encoder,
    kinds: tuple[int, ...],
) -> tuple[State, Answer]:
    """Add one image to every block and infer the first `n_blocks`; `weights` are the encoder's arrays, `static` is what else it holds."""
    encoder = eqx.combine(weights, static)

    def updated(state: State, coefficients: jax.Array, signal: jax.Array) -> State:
        return encoders.update(encoder.basis, state, coefficients, signal)

    def one(index: jax.Array | int) -> Answer:
        state = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), states)
        return answer(encoder, plan, state, noise)

    def put(index: jax.Array, so_far: Answer) -> Answer:
        return jax.tree.map(lambda leaves, leaf: lax.dynamic_update_index_in_dim(leaves, leaf, index, 0), so_far, one(index))

    def coefficients_of(index: jax.Array) -> jax.Array:
        return voxel_coefficients(encoder.basis, kinds, jax.tree.map(lambda row: row[index], rows), at_nodes)

    coefficients = lax.map(coefficients_of, jnp.arange(len(signals)))  # block by block: of all of them at once the nodes do not stay in the cache
    states = jax.vmap(updated)(states, coefficients, signals)
    nothing = jax.tree.map(lambda leaf: jnp.zeros((len(signals), *leaf.shape), leaf.dtype), jax.eval_shape(lambda: one(0)))
    return states, lax.fori_loop(0, n_blocks, put, nothing)


def _evaluate_blocks(
    encoder: Encoder, plan: Plan, states: State, noise: Noise, z: Float[jax.Array, "block 2 voxel"]
) -> Float[jax.Array, "block voxel"]:
    """The residual sum of squares at one point per voxel [pixel^2]."""

    def one(given: tuple[State, jax.Array]) -> jax.Array:
        state, here = given
        return encoders.evaluate(encoder, plan, encoders.expand(encoder, plan, state, here.T), noise, here[:, None]).residual[0]

    return lax.map(one, (states, z))
