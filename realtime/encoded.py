"""The posterior of a whole volume: the encoder for every voxel, the reference auditing a random sample of them at every image.

Same interface as `realtime.reference.Reference`. The audited voxels are drawn once, from every region, seeded by the scan's name, for the
reference's sums must have seen every image; the draws that compare are seeded by the scan's name and the number of images. Where the two
disagree beyond `MEDIAN_BOUND` or `OVER_4_BOUND` the reference takes over for the whole region; if the region is too large for it, this is said
and stops are vetoed.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from scansteer.core import agreement, design, gaussian_region, nuisance, signal_basis, voxel_columns
from scansteer.core import coordinate as coordinates
from scansteer.core import encoder as encoders
from scansteer.core.code_generation import for_blocks_of_voxels, for_large_programs, with_barriers
from scansteer.core.encoder import Encoder, Fit, Gaussian, Plan, State
from scansteer.core.errors import InputError
from scansteer.core.grid_posterior import Info, Prior
from scansteer.core.likelihood import Noise
from scansteer.core.noise import NoiseEstimate
from scansteer.core.signal_basis import Basis
from scansteer.core.voxel_columns import Columns, Rows
from scansteer.protocols import forward
from scansteer.protocols.scan import SaturationBlock, Scan, bounds
from scansteer.realtime.encoder_file import Trained, check, load, shipped
from scansteer.realtime.messages import Audit
from scansteer.realtime.reference import Reference

BLOCK = 256
"""Voxels per block: few, so that what is computed on the way stays in cache; fixed and padded, so that a voxel's answer is the same alone
and in a volume."""
VOLUME = 20_000
"""Voxels of a matrix from which on speed per voxel counts for more than being ready a few seconds earlier."""
SEARCH = (0.5, 0.2)
"""Scales of the search for the MAP, in standard deviations of the posterior."""
N_AUDITED = 128
"""Voxels, enough for `design` to ask about and for the two bounds below: 5 % of 128 is more than six voxels' worth of draws."""
N_DRAWS = 100
MEDIAN_BOUND = 2.0
"""Largest acceptable median Mahalanobis distance, either way (1.18 is a perfect match)."""
OVER_4_BOUND = 0.05
"""Largest acceptable share of distances over 4, either way."""
FIRST_AUDITED = 3
"""Number of images from which disagreement counts: before, a posterior is little more than the prior."""
MOST_VOXELS_OF_REFERENCE = 2048
"""Regions up to this size can be handed to the reference within seconds."""


class Auditor(Reference):
    """A reference that is told what signals to expect, so that one repetition is simulated once for all."""

    _told: jnp.ndarray | None = None

    def play(self, block: SaturationBlock, *, first: bool) -> jnp.ndarray:
        return super().play(block, first=first) if self._told is None else self._told

    def learn(self, expected: jnp.ndarray, signal: np.ndarray, noise: NoiseEstimate) -> Info:
        """Absorb an image whose expected signals are known."""
        self._told = expected
        try:
            return self.absorb(signal, noise, self.scan.schedule[0], first=False)
        finally:
            self._told = None


class Answer(NamedTuple):
    """What the encoder says of one block."""

    info: Info
    posterior: Gaussian


class Volume:
    """The encoder alone: running sums and posteriors of many voxels in fixed blocks."""

    def __init__(self, encoder: Encoder, columns: Columns, discrepancy: float, block: int = BLOCK, *, ready_soon: bool = False) -> None:
        """Compile: ten seconds; about half of that with `ready_soon`, for code that takes half as long again per voxel."""
        self.encoder, self.columns, self._block = encoder, columns, block
        self._plan = encoders.plan(encoder)
        self._discrepancy = jnp.asarray(discrepancy)
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="scansteer-encoder")
        static = eqx.filter(encoder, eqx.is_array, inverse=True)
        step = partial(_step, static=static, kinds=columns.kinds)
        options = for_blocks_of_voxels() | (for_large_programs() if ready_soon else {})
        self._step = jax.jit(step, donate_argnums=0, compiler_options=options)
        self._evaluate = eqx.filter_jit(_evaluate, compiler_options=with_barriers())  # pyright: ignore[reportCallIssue] - for jax.jit
        self._draw = eqx.filter_jit(agreement.posterior_draw)
        self._n_voxels = 0
        self._rows: list[Rows] = []
        self._states: list[State] = []
        self._warm_up()

    def begin(self, rows: Rows, n_voxels: int) -> None:
        """Fix the voxels: `rows` as `core.voxel_columns.rows_of_voxels` gives them."""
        n_blocks = -(-n_voxels // self._block)
        shared = not self.columns.mapped
        self._n_voxels = n_voxels
        self._rows = [tuple(jnp.asarray(_padded(row, index, self._block), jnp.float32) for row in rows) for index in range(n_blocks)]
        size = sum(self.encoder.basis.ranks)
        self._states = [encoders.init(self._block, 1 if shared else self._block, size) for _ in range(n_blocks)]

    def absorb(
        self, expected: Float[np.ndarray, "node point"], signal: Float[np.ndarray, " voxel"], noise: NoiseEstimate
    ) -> Answer:
        """Add one image and infer; `expected` are its simulated signals at every nuisance node. NumPy leaves over all voxels."""
        columns = voxel_columns.at_mapped_nodes(self.columns, np.asarray(expected))
        at_nodes = jnp.asarray(signal_basis.coefficients(self.encoder.basis, columns), jnp.float32)
        known = Noise(jnp.asarray(float(noise.sigma)), jnp.asarray(float(noise.dof)), self._discrepancy)
        weights = eqx.filter(self.encoder, eqx.is_array)

        def one(index: int) -> Answer:
            values = _padded(np.asarray(signal, np.float64)[None], index, self._block)[0]
            self._states[index], answer = self._step(self._states[index], weights, self._plan, self._rows[index], at_nodes, known, values)
            return jax.tree.map(np.asarray, answer)

        answers = list(self._pool.map(one, range(len(self._states))))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: self._n_voxels], *answers)

    def nrmse_at(self, values: Float[np.ndarray, "voxel 2"], noise: NoiseEstimate) -> Float[np.ndarray, " voxel"]:
        """Norm of the residual over the norm of the signal at given (f, k), all else fitted, for comparisons by one measure."""
        known = Noise(jnp.asarray(noise.sigma), jnp.asarray(noise.dof), self._discrepancy)
        coordinate = self.encoder.coordinate
        z = np.stack([np.asarray(coordinate.z(axis, jnp.asarray(values[:, axis], jnp.float32))) for axis in (0, 1)])
        parts = []
        for index, state in enumerate(self._states):
            points = jnp.asarray(_padded(z, index, self._block).T)
            residual = self._evaluate(self.encoder, self._plan, state, known, points).residual[0]
            parts.append(np.sqrt(np.asarray(residual) / np.maximum(np.asarray(state.energy), 1e-30)))
        return np.concatenate(parts)[: self._n_voxels]

    def draw(self, key: jax.Array, posterior: Gaussian) -> Float[np.ndarray, "voxel 2"]:
        """One random (f, k) per voxel from the posteriors that `absorb` gave."""
        parts = []
        for index in range(len(self._states)):
            rows = np.minimum(np.arange(index * self._block, (index + 1) * self._block), self._n_voxels - 1)
            block = jax.tree.map(lambda leaf, rows=rows: leaf[rows], posterior)
            parts.append(np.asarray(self._draw(jax.random.fold_in(key, index), block, self.encoder.coordinate)))
        return np.concatenate(parts)[: self._n_voxels]

    def close(self) -> None:
        self._pool.shutdown(wait=False)

    def _warm_up(self) -> None:
        mapped = [axis for axis in self.columns.axes if axis.name in self.columns.mapped]
        self.begin(tuple(np.full((2, 2, axis.n_nodes), 1 / axis.n_nodes) for axis in mapped), 2)
        nodes = int(np.prod([axis.n_nodes for axis in self.columns.axes], dtype=int))
        made_up = np.full((nodes + 1, self.encoder.basis.functions.shape[1]), 0.5), np.full(2, 0.5), NoiseEstimate(0.01, 10.0)
        for _ in range(2):
            self.draw(jax.random.PRNGKey(0), self.absorb(*made_up).posterior)
        self.begin((), 0)


class Encoded:
    """The posterior of every voxel of a region, one image at a time; see the module."""

    def __init__(self, scan: Scan, mapped: Sequence[str], trained: Trained) -> None:
        """Compile and simulate the schedule: seconds.

        Raises
        ------
        InputError
            The weights belong to another scan, or were trained with other maps.
        """
        self.scan = scan
        axes = (*forward.chain_axes(scan), *forward.tissue_axes(scan))
        self._mapped = tuple(axis.name for axis in axes if axis.name in mapped)
        check(trained, scan, self._mapped)  # before anything is compiled
        columns = voxel_columns.make(axes, self._mapped, nuisance.of_range(*bounds(scan.readout.offset)))
        with ThreadPoolExecutor(2) as side_by_side:  # both compile for long
            few = math.prod(scan.matrix or (0,)) < VOLUME
            volume = side_by_side.submit(Volume, trained.encoder, columns, scan.noise.discrepancy, ready_soon=few)
            self._reference = Auditor(scan, mapped)
            self._volume = volume.result()
        self._coordinate = trained.encoder.coordinate
        self._compare = jax.jit(self._distances, compiler_options=for_large_programs())
        self._seed = zlib.crc32(scan.name.encode())
        self._history: list[tuple[np.ndarray, np.ndarray, NoiseEstimate]] | None = None
        self._region: tuple[dict[str, np.ndarray], np.ndarray] | None = None
        self._audited = np.zeros(0, int)
        self._n_images = 0
        self.source: Literal["reference", "encoder"] = "encoder"
        self._sampled: Info | None = None
        self._posterior: Gaussian | None = None
        self.audit: Audit | None = None
        self.said: str | None = None
        """What happened at the latest image that a person should know."""
        self.veto: str | None = None
        """Why a stop is out of the question; none: nothing speaks against it."""
        self._warm_up()

    @property
    def prior(self) -> Prior:
        return self._reference.prior

    def begin(
        self, maps: dict[str, Float[np.ndarray, " voxel"]], brightness: Float[np.ndarray, " voxel"], regions: Sequence[np.ndarray]
    ) -> None:
        """Fix the voxels; see `Reference.begin`."""
        n_voxels = len(brightness)
        used = {name: np.asarray(maps[name], float) for name in self._mapped}
        errors = {name: map_error(self.scan, name, values) for name, values in used.items()}
        self._volume.begin(voxel_columns.rows_of_voxels(self._volume.columns, used, errors), n_voxels)
        self._audited = sampled(regions, np.random.default_rng(self._seed))
        self._reference.begin({name: values[self._audited] for name, values in used.items()}, brightness[self._audited])
        self._region = used, brightness
        self._history = [] if n_voxels <= MOST_VOXELS_OF_REFERENCE else None
        self._n_images, self.source, self.audit, self.said, self.veto = 0, "encoder", None, None, None

    def absorb(self, signal: Float[np.ndarray, " voxel"], noise: NoiseEstimate, block: SaturationBlock, *, first: bool) -> Info:
        """Play the block, absorb the image it led to, infer, audit; NumPy leaves over all voxels."""
        expected = self._reference.play(block, first=first)
        self._n_images += 1
        self.said = None
        if self.source == "reference":
            self.audit = None
            return self._reference.learn(expected, signal, noise)
        answer = self._volume.absorb(np.asarray(expected), signal, noise)
        self._posterior = answer.posterior
        if self._history is not None:
            self._history.append((np.asarray(expected), signal, noise))
        self._sampled = self._reference.learn(expected, signal[self._audited], noise)
        self.audit = self._judge(answer.posterior, noise)
        apart = self._n_images >= FIRST_AUDITED and _disagree(self.audit)
        self.veto = None
        return self._hand_over(answer.info) if apart else answer.info

    def draw(self) -> Float[np.ndarray, "voxel 2"] | None:
        """One random (f, k) per voxel, seeded by scan and image number; none where the reference answers."""
        if self.source == "reference" or self._posterior is None:
            return None
        return self._volume.draw(self._key(), self._posterior)

    def reserve(self, n_voxels: int) -> None:
        """See `Reference.reserve`."""
        self._reference.reserve(min(n_voxels, N_AUDITED))

    def play(self, block: SaturationBlock, *, first: bool) -> jnp.ndarray:
        """Carry the magnetisation through one repetition without an image."""
        return self._reference.play(block, first=first)

    @property
    def auditor(self) -> Reference:
        """The reference, whose running sums are those of the audited voxels."""
        return self._reference

    def among_all(self, voxels: Int[np.ndarray, " voxel"]) -> Int[np.ndarray, " voxel"]:
        """Indices among the region's voxels of those that `for_advice` speaks of."""
        return voxels if self.source == "reference" or self._sampled is None else self._audited[voxels]

    def for_advice(self, info: Info, regions: Sequence[np.ndarray]) -> tuple[Reference, Info, Sequence[np.ndarray]]:
        """The audited voxels and their exact posteriors; a region without any, there being more regions than audited voxels, is left out."""
        if self.source == "reference" or self._sampled is None:
            return self._reference, info, regions
        inside = [np.flatnonzero(np.isin(self._audited, region)) for region in regions]
        return self._reference, self._sampled, [each for each in inside if len(each)]

    def close(self) -> None:
        self._volume.close()
        self._reference.close()

    def _judge(self, posterior: Gaussian, noise: NoiseEstimate) -> Audit:
        """Encoder against reference on the audited voxels; always the same number, the last one repeated."""
        n = len(self._audited)
        rows = np.minimum(np.arange(N_AUDITED), n - 1)
        ours = jax.tree.map(lambda leaf: leaf[self._audited[rows]], posterior)
        power = np.float64(noise.dof + self._n_images - 1)
        m1, m2 = (np.asarray(each)[:n] for each in self._compare(self._key(), ours, self._reference.log_posterior(rows), power))
        over = max(float(np.mean(m1 > agreement.TOO_FAR)), float(np.mean(m2 > agreement.TOO_FAR)))
        return Audit(n_voxels=n, m1_median=_bounded(np.median(m1)), m2_median=_bounded(np.median(m2)), fraction_over_4=over)

    def _key(self) -> jax.Array:
        return jax.random.fold_in(jax.random.PRNGKey(self._seed), self._n_images)

    def _distances(self, key, ours: Gaussian, log_posterior, power):
        lattice = agreement.follow(log_posterior, self.prior, self._coordinate, power)
        distances = agreement.compare(key, ours, lattice, N_DRAWS)
        return distances.m1, distances.m2

    def _hand_over(self, info: Info) -> Info:
        """The reference takes over, with all images so far; if the region is too large for it, stops are vetoed."""
        assert self.audit is not None and self._region is not None
        found = (
            f"Encoder and reference disagree: Mahalanobis medians {self.audit.m1_median:.2f} and {self.audit.m2_median:.2f}, "
            f"{self.audit.fraction_over_4:.1%} over 4"
        )
        if self._history is None:
            self.said = self.veto = f"{found}; the region is too large for the reference, so no stop is called."
            return info
        self._reference.begin(*self._region)
        for expected, signal, noise in self._history:
            info = self._reference.learn(jnp.asarray(expected), signal, noise)
        self.source, self._history = "reference", None
        self.said = f"{found}; the reference decides from now on."
        return info

    def _warm_up(self) -> None:
        """Compile the comparison."""
        n_cells = self.prior.box.n_cells
        ours = Gaussian(np.zeros((N_AUDITED, 2), np.float32), np.tile(np.array([1, 0, 1], np.float32), (N_AUDITED, 1)))  # pyright: ignore[reportArgumentType]
        jax.block_until_ready(self._compare(jax.random.PRNGKey(0), ours, np.zeros((N_AUDITED, n_cells), np.float32), np.float64(10.0)))


def sampled(regions: Sequence[Int[np.ndarray, " voxel"]], rng: np.random.Generator) -> Int[np.ndarray, " voxel"]:
    """Which voxels are audited: drawn at random within each region, so that also a small one has some. Ascending."""
    shares = design.share_out([len(region) for region in regions], N_AUDITED)
    return np.unique(np.concatenate([rng.permutation(region)[:share] for region, share in zip(regions, shares, strict=True)]))


def map_error(scan: Scan, name: str, values: np.ndarray) -> np.ndarray:
    """Standard deviation of a map, as the scan states it."""
    described = scan.auxiliaries[name]  # type: ignore[index]
    return np.hypot(described.map_error, described.map_error_relative * values)


def voxel_coefficients(basis: Basis, kinds: tuple[int, ...], rows: Rows, at_nodes: jax.Array) -> Float[jax.Array, "function voxel"]:
    """One image's coefficients of every voxel, from those at the nodes of what is mapped."""
    blocks = zip(kinds, basis.blocks, strict=True)
    return jnp.concatenate([at_nodes[:, block].T @ voxel_columns.weights(rows, kind).T for kind, block in blocks])


def answer(encoder: Encoder, plan: Plan, state: State, noise: Noise) -> Answer:
    """Posterior and summary of every voxel.

    The MAP is sought among the points of the last refinement and then, twice and ever closer, about the best of them: where the posterior is a
    curved ridge, its mean does not lie on it. The likelihood's peak and the point halfway to it are tried beside.
    """
    posterior, expansion, seen = encoders.infer(encoder, plan, state, noise)
    peak = jax.lax.optimization_barrier(gaussian_region.mode(posterior))
    ends = jnp.stack([peak, 0.5 * (posterior.mean.T + peak)], axis=1)

    def closer(best: tuple[jax.Array, Fit], scale: jax.Array) -> tuple[tuple[jax.Array, Fit], None]:
        about = coordinates.points(best[0].T, scale * posterior.root, encoders.STENCIL)
        z = jax.lax.optimization_barrier(jnp.clip(jnp.concatenate([about, ends], axis=1), -4.5, 4.5))
        return _most_probable(encoder, z, encoders.evaluate(encoder, plan, expansion, noise, z)), None

    start = _most_probable(encoder, seen.z, Fit(*(seen.log_likelihood,) * 3))  # its centre is looked at again: only where it is counts
    best, at = jax.lax.scan(closer, start, jnp.asarray(SEARCH, jnp.float32))[0]
    nrmse = jnp.sqrt(at.residual / jnp.maximum(state.energy.astype(jnp.float32), 1e-30))
    summary = gaussian_region.summarise(posterior, best, encoder.coordinate)
    return Answer(Info(summary, nrmse, at.amplitude), posterior)


def _most_probable(
    encoder: Encoder, z: Float[jax.Array, "2 point voxel"], fit: Fit
) -> tuple[Float[jax.Array, "2 voxel"], Fit]:
    """Of the points at which each voxel's likelihood is known, the one of the highest density over (f, k), and the fit there."""
    density = sum(encoder.coordinate.log_density(axis, z[axis]) for axis in (0, 1))
    heights, z, fit = jax.lax.optimization_barrier((fit.log_likelihood + density, z, fit))
    best, height = jax.tree.map(lambda leaf: leaf[..., 0, :], (z, fit)), heights[0]
    for number in range(1, len(heights)):
        higher = heights[number] > height
        best = jax.tree.map(lambda leaf, so_far, number=number, higher=higher: jnp.where(higher, leaf[..., number, :], so_far), (z, fit), best)
        height = jnp.maximum(heights[number], height)
    return best


def _evaluate(encoder: Encoder, plan: Plan, state: State, noise: Noise, z: Float[jax.Array, "voxel 2"]) -> Fit:
    """The fit at one point per voxel."""
    return encoders.evaluate(encoder, plan, encoders.expand(encoder, plan, state, z), noise, z.T[:, None])


def _step(
    state: State,
    weights: Encoder,
    plan: Plan,
    rows: Rows,
    at_nodes: jax.Array,
    noise: Noise,
    signal: jax.Array,
    *,
    static: Encoder,
    kinds: tuple[int, ...],
) -> tuple[State, Answer]:
    """Add one image and infer; `weights` are the encoder's arrays, `static` is what else it holds."""
    encoder = eqx.combine(weights, static)
    state = encoders.update(encoder.basis, state, voxel_coefficients(encoder.basis, kinds, rows, at_nodes), signal)
    return state, answer(encoder, plan, state, noise)


def _padded(values: np.ndarray, index: int, block: int) -> np.ndarray:
    """(.., voxel, ..) -> one block along axis 1 (axis 0 leads), the last one padded with copies of its last voxel."""
    n = values.shape[1]
    return values[:, np.minimum(np.arange(index * block, (index + 1) * block), n - 1)]


def _disagree(audit: Audit) -> bool:
    return max(audit.m1_median, audit.m2_median) > MEDIAN_BOUND or audit.fraction_over_4 > OVER_4_BOUND


def _bounded(value: float | np.floating) -> float:
    """A distance that is not finite is as good as infinite: JSON knows neither."""
    return float(value) if np.isfinite(value) else 1e6


def engine_maker(encoder: str | None) -> Callable[[Scan, list[str]], Reference | Encoded]:
    """What computes a session's posteriors, by the command line's `--encoder`.

    `none`: the reference. A file: that encoder, refused if it belongs to another scan or other maps. Nothing: the encoder that is shipped with
    the scan; the reference if there is none, or if it does not fit, which is said.

    Raises
    ------
    InputError
        The file is not an encoder.
    """
    given = None if encoder in (None, "none") else load(Path(encoder))

    def make(scan: Scan, mapped: list[str]) -> Reference | Encoded:
        if given is not None:
            return Encoded(scan, mapped, given)
        trained = shipped(scan) if encoder is None else None
        if trained is None:
            return Reference(scan, mapped)
        try:
            return Encoded(scan, mapped, trained)
        except InputError as error:
            reference = Reference(scan, mapped)
            reference.said = f"{error} The reference decides."
            return reference

    return make
