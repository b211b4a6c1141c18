"""The reference posterior of a whole region: `core` compiled once, run over blocks of voxels on all cores.

Everything is compiled, and every scheduled pulse simulated, when the object is made. Blocks have a fixed size and are padded, so the
number of voxels, known only with the first image, compiles nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from scansteer.core import blocks, dictionary, grid_posterior, likelihood, nuisance, resolution
from scansteer.core.code_generation import for_blocks_of_voxels, for_large_programs
from scansteer.core.errors import InputError
from scansteer.core.grid_posterior import Info, OnLattice
from scansteer.core.lattice import Box
from scansteer.core.likelihood import Noise, Sums
from scansteer.core.noise import NoiseEstimate
from scansteer.core.nuisance import Measured
from scansteer.core.signal import LongitudinalMap
from scansteer.protocols import forward, tissue_model
from scansteer.protocols.scan import SaturationBlock, Scan, bounds
from scansteer.realtime.messages import Audit

jax.config.update("jax_enable_x64", True)  # the physics and the running sums need it; core leaves the choice to its user

BLOCK = 64
"""Voxels per block: its running sums stay in cache while they are evaluated."""
MAX_BYTES = 6 * 2**30
"""Memory that the running sums may take."""
RESERVED_BYTES = 2**29
"""Of it, what is taken before the first image."""


class Running(NamedTuple):
    """What the images so far sum up to at a few lattice cells of a few voxels."""

    gram: Float[np.ndarray, "voxel draw mixture column column"]
    projection: Float[np.ndarray, "voxel draw mixture column"]
    energy: Float[np.ndarray, " voxel"]
    n_images: float
    maps: list[dict[str, Measured]]
    """Of each voxel's block: where its signals are linearised."""
    shift: Float[np.ndarray, "voxel nuisance"]
    """Known means of the nuisances' coefficients, 0 where they were not measured."""


class Linearised(NamedTuple):
    """How some voxels' columns follow from the dictionary."""

    measured: dict[str, Measured]
    """Where signals are linearised."""
    weights: Float[jax.Array, "mixture column node"]
    shift: Float[jax.Array, "nuisance voxel"] | None
    """Known means of the nuisances' coefficients; none: nothing was measured."""


class Reference:
    """The posterior of every voxel of a region, one image at a time."""

    source: Literal["reference", "encoder"] = "reference"
    """Which posterior decides. These four change where an encoder answers (realtime.encoded)."""
    audit: Audit | None = None
    said: str | None = None
    """What happened at the latest image that a person should know."""
    veto: str | None = None
    """Why a stop is out of the question; none: nothing speaks against it."""

    def __init__(self, scan: Scan, mapped: Sequence[str], n_points: tuple[int, int] | None = None, n_slices: int = 1) -> None:
        """Compile and simulate the schedule: seconds.

        Parameters
        ----------
        mapped
            Names of the auxiliaries (`t1_s`, ..) that come as maps; the others are marginalised over their ranges.
        n_points
            Lattice over the box of (f, k); none: as many points as the scan's posteriors need (core.resolution).
        n_slices
            Into how many slices the range of everything unmeasured is cut: a finer quadrature, to check the plain one against.
        """
        self.scan = scan
        self.model = forward.model(scan, n_slices)
        self.mapped = frozenset(mapped) & {axis.name for axis in self.model.axes}
        """Auxiliaries that come as maps."""
        lower, upper = bounds(scan.readout.offset)
        self._coefficients = [*nuisance.coefficients(self.model.axes, self.mapped), *(["offset"] if upper > lower else [])]
        self._n_mixture = math.prod(axis.n_slices for axis in self.model.axes if axis.name not in self.mapped)
        self._discrepancy = jnp.asarray(scan.noise.discrepancy)
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="scansteer-posterior")
        self._block_map = jax.jit(dictionary.block_map, compiler_options=for_large_programs())
        self._play = jax.jit(dictionary.play)
        self._reading = jax.jit(dictionary.reading)(self.model.forward)
        self._columns = jax.jit(grid_posterior.expected_columns, compiler_options=for_large_programs())
        self._step: Callable[..., tuple[Sums, OnLattice]] = jax.jit(grid_posterior.step, donate_argnums=0, compiler_options=for_blocks_of_voxels())
        self._describe = jax.jit(grid_posterior.describe, compiler_options=for_blocks_of_voxels())
        self._maps: dict[tuple[float, ...], LongitudinalMap] = {}
        self._state = self._initial_state()
        for index, block in enumerate(scan.schedule):
            self._map_of(block, first=index == 0 and not scan.first_state.n_dummies)
        self.prior = forward.prior(scan, n_points or resolution.n_points(self._foreseen(), scan.noise.discrepancy))
        self._place = np.zeros((0, BLOCK), int)
        self._where = np.zeros(0, int)
        self._measured_in: list[dict[str, Measured]] = []
        self.expected = jnp.zeros(0)
        """Signals at every node of the dictionary after the latest block that was played."""
        self._weights: list[jnp.ndarray] = []
        self._shifts: list[jnp.ndarray | None] = []
        self._sums: list[Sums] = []
        self._log_posteriors: list[jnp.ndarray] = []
        self._spare: list[Sums] = []
        self.rehearsal = self._rehearse()
        """What made-up voxels lead to: for others to compile with."""

    def begin(
        self, maps: dict[str, Float[np.ndarray, " voxel"]], brightness: Float[np.ndarray, " voxel"], regions: Sequence[np.ndarray] = ()
    ) -> None:
        """Fix the voxels.

        Parameters
        ----------
        maps
            Auxiliary values of its voxels, by name and in the scan's units.
        brightness
            Their first image: a block's voxels are of like amplitude, and of like auxiliary values.
        regions
            Indices of each region's voxels. The reference treats all alike; the audit of an encoder looks into every region.

        Raises
        ------
        InputError
            More voxels than memory allows.
        """
        n_voxels = len(brightness)
        n_blocks = -(-n_voxels // BLOCK)
        block_bytes = self._block_bytes
        if n_blocks * block_bytes > MAX_BYTES:
            raise InputError(
                f"The region has {n_voxels} voxels, the reference posterior holds at most {BLOCK * (MAX_BYTES // block_bytes)} of this scan; "
                "give a smaller region with --roi or a trained encoder with --encoder."
            )
        used = {name: maps[name] for name in self._coefficients if name in self.mapped}
        self._place = blocks.of_like_voxels([*used.values(), 1 + np.maximum(brightness, 0.0)], BLOCK)
        self._where = np.empty(n_voxels, int)
        self._where[self._place.reshape(-1)] = np.arange(self._place.size)
        members = [{name: values[place] for name, values in used.items()} for place in self._place]
        described = [self.linearised(each) for each in members] if used else [self.linearised({})] * n_blocks
        self._measured_in = [each.measured for each in described]
        self._weights = [each.weights for each in described]
        self._shifts = [each.shift for each in described]
        self._sums = [self._spare.pop() if self._spare else self.empty(BLOCK) for _ in self._place]
        self._spare = []
        self._log_posteriors = [jnp.zeros(0)] * len(self._place)

    def reserve(self, n_voxels: int) -> None:
        """Hold memory for so many voxels before the first image says how many there are: fresh memory costs as much as an update."""
        n_blocks = min(-(-n_voxels // BLOCK), RESERVED_BYTES // self._block_bytes)
        self._spare = jax.block_until_ready([self.empty(BLOCK) for _ in range(n_blocks)])

    def absorb(self, expected: Float[jax.Array, "node point"], signal: Float[np.ndarray, " voxel"], noise: NoiseEstimate) -> Info:
        """Add one image whose expected signals `play` has given, and infer; NumPy leaves over all voxels."""
        noise_now = Noise(jnp.asarray(noise.sigma), jnp.asarray(noise.dof), self._discrepancy)
        shared = None if self.mapped else self.columns(self._weights[0], expected)

        def one(index: int) -> Info:
            values = jnp.asarray(signal[self._place[index]], dtype=jnp.float64)
            columns = self.columns(self._weights[index], expected) if shared is None else shared
            self._sums[index], posterior = self._step(self._sums[index], columns, values, noise_now, self.prior, self._shifts[index])
            self._log_posteriors[index] = posterior.log_posterior
            return jax.block_until_ready(self._describe(posterior, self.prior))[0]

        infos = list(self._pool.map(one, range(len(self._sums))))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[self._where], *infos)

    def log_posterior(self, voxels: Int[np.ndarray, " voxel"]) -> Float[np.ndarray, "voxel cell"]:
        """After the latest image, of some voxels: on the lattice, up to a constant per voxel; float32."""
        numbers, places = np.divmod(self._where[voxels], BLOCK)
        return np.stack([np.asarray(self._log_posteriors[number])[place] for number, place in zip(numbers, places, strict=True)])

    def running(self, voxels: Int[np.ndarray, " voxel"], cells: Int[np.ndarray, "voxel draw"]) -> Running:
        """The running sums at some cells of some voxels, for the choice of the next pulse."""
        numbers, places = np.divmod(self._where[voxels], BLOCK)
        order = np.argsort(numbers, kind="stable")
        parts = []
        for number in np.unique(numbers):
            here = numbers == number
            known = self._shifts[number]
            shift = np.zeros((len(self._coefficients), BLOCK)) if known is None else np.asarray(known)
            parts.append((*likelihood.at_cells(self._sums[number], places[here], cells[here]), shift[:, places[here]].T))
        gram, projection, energy, shift = (np.concatenate(each)[np.argsort(order)] for each in zip(*parts, strict=True))
        maps = [self._measured_in[number] for number in numbers]
        return Running(gram, projection, energy, float(self._sums[0].n_images), maps, shift)

    def play(self, block: SaturationBlock, *, first: bool) -> jnp.ndarray:
        """Carry the magnetisation through one repetition, whether or not its image counts; the signals expected at every node."""
        begun = self._map_of(block, first=first and not self.scan.first_state.n_dummies)
        self._state, self.expected = jax.block_until_ready(self._play(self.model.forward, self._reading, self._state, begun))
        return self.expected

    def told(self, beyond: Float[np.ndarray, " nuisance"]) -> dict[str, float]:
        """How far beyond its range (`design.Answer`) each nuisance lies of which the images can tell."""
        return nuisance.told(self.model.axes, self.mapped, dict(zip(self._coefficients, map(float, beyond), strict=True)))

    @property
    def exact(self) -> Reference:
        """The reference itself; where an encoder answers, the one that audits it."""
        return self

    def linearised(self, maps: dict[str, Float[np.ndarray, " voxel"]]) -> Linearised:
        """The columns of voxels of like auxiliary values, by name and in the scan's units."""
        measured = {name: self._measured(name, values) for name, values in maps.items()}
        columns = nuisance.columns(self.model.axes, measured)
        weights = jnp.asarray(nuisance.with_offset(columns, *nuisance.of_range(*bounds(self.scan.readout.offset))))
        if not measured:
            return Linearised(measured, weights, None)
        known = {name: (self.clipped(name, maps[name]) - each.centre) / each.sd for name, each in measured.items()}
        none = np.zeros(len(next(iter(known.values()))))
        return Linearised(measured, weights, jnp.asarray(np.stack([known.get(name, none) for name in self._coefficients])))

    def columns(
        self, weights: Float[jax.Array, "mixture column node"], expected: Float[jax.Array, "node point"], box: Box | None = None
    ) -> jax.Array:
        """The likelihood's columns of one image, (column, mixture, cell); on the reference's own lattice or another."""
        return self._columns(weights, expected, box or self.prior.box)

    def empty(self, n_voxels: int, box: Box | None = None) -> Sums:
        """Running sums without any image, on the same lattice as `columns`."""
        return likelihood.init(n_voxels, self._n_mixture, len(self._coefficients) + 1, (box or self.prior.box).n_cells)

    @cached_property
    def _block_bytes(self) -> int:
        """Of a block's running sums."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(lambda: self.empty(BLOCK))))

    def clipped(self, name: str, values: np.ndarray) -> np.ndarray:
        """An auxiliary's values, within its range."""
        described = self.scan.auxiliaries[name]  # type: ignore[index]
        return np.clip(values, described.lower, described.upper)

    def among_all(self, voxels: Int[np.ndarray, " voxel"]) -> Int[np.ndarray, " voxel"]:
        """Indices among the region's voxels of those that `for_advice` speaks of."""
        return voxels

    def for_advice(self, info: Info, regions: Sequence[np.ndarray]) -> tuple[Reference, Info, Sequence[np.ndarray]]:
        """Running sums to ask about the next pulse, the posterior that belongs to them, and each region's voxels therein."""
        return self, info, regions

    def close(self) -> None:
        self._pool.shutdown(wait=False)

    def _initial_state(self) -> dictionary.Magnetisation:
        state = jax.jit(dictionary.start)(self.model.forward)
        block = self.scan.schedule[0]
        for index in range(self.scan.first_state.n_dummies):
            state, _ = self._play(self.model.forward, self._reading, state, self._map_of(block, first=index == 0))
        return state

    def _foreseen(self) -> Iterator[np.ndarray]:
        """The columns of every image of the schedule at the simulated nodes, where maps give the middle of their ranges."""
        weights = self.linearised({axis.name: np.array([axis.middle]) for axis in self.model.axes if axis.name in self.mapped}).weights[0]
        begun = self._state
        for index, block in enumerate(self.scan.schedule):
            yield np.asarray(weights @ self.play(block, first=index == 0))
        self._state = begun

    def _map_of(self, block: SaturationBlock, *, first: bool) -> LongitudinalMap:
        """The first block of all skips its recovery: the first state is that just before the saturation."""
        played = block.model_copy(update={"t_rec_s": 0.0}) if first else block
        key = (played.b1_ut, played.offset_ppm, played.t_sat_s, played.t_rec_s)
        if key not in self._maps:
            if len(self._maps) > 2 * len(self.scan.schedule) + 64:  # an adaptive scan without end must not fill the memory
                self._maps.pop(next(iter(self._maps)))
            self._maps[key] = jax.block_until_ready(self._block_map(self.model.forward, tissue_model.saturation(self.scan, played)))
        return self._maps[key]

    def _measured(self, name: str, values: np.ndarray) -> Measured:
        """Where a block's signals are linearised, and how wrong its map may be."""
        described = self.scan.auxiliaries[name]  # type: ignore[index]
        centre = float(np.mean(self.clipped(name, values)))
        floor = 1e-3 * (described.upper - described.lower)  # the unit of the shifts, also where a map is said to be exact
        return Measured(centre, max(float(np.hypot(described.map_error, described.map_error_relative * centre)), floor))

    def _rehearse(self) -> Info:
        """Run everything once on made-up voxels, then forget them."""
        axes = {axis.name: axis for axis in self.model.axes}
        self.begin({name: np.full(BLOCK + 1, axes[name].lower) for name in self.mapped}, np.full(BLOCK + 1, 100.0))
        state, signal, noise = self._state, np.full(BLOCK + 1, 100.0), NoiseEstimate(1.0, 1.0)
        twice = [self.absorb(self.play(self.scan.schedule[0], first=first), signal, noise) for first in (True, False)]
        self._state = state
        return twice[1]
