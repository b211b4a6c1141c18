"""The reference posterior of a whole region: `core` compiled once, run over blocks of voxels on all cores.

Everything is compiled, and every scheduled pulse simulated, when the object is made. Blocks have a fixed size and are padded, so the
number of voxels, known only with the first image, compiles nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from scansteer.core import dictionary, grid_posterior, likelihood, nuisance
from scansteer.core.errors import InputError
from scansteer.core.grid_posterior import Info, Prior
from scansteer.core.likelihood import Noise, Sums
from scansteer.core.noise import NoiseEstimate
from scansteer.core.nuisance import Measured
from scansteer.core.signal import LongitudinalMap
from scansteer.protocols import forward, tissue_model
from scansteer.protocols.scan import SaturationBlock, Scan, bounds

jax.config.update("jax_enable_x64", True)  # the physics and the running sums need it; core leaves the choice to its user

BLOCK = 64
"""Voxels per block: its running sums stay in cache while they are evaluated."""
MAX_BYTES = 6 * 2**30
"""Memory that the running sums may take."""


class Reference:
    """The posterior of every voxel of a region, one image at a time."""

    def __init__(self, scan: Scan, mapped: Sequence[str]) -> None:
        """Compile and simulate the schedule: seconds.

        Parameters
        ----------
        mapped
            Names of the auxiliaries (`t1_s`, ..) that come as maps; the others are marginalised over their ranges.
        """
        self.scan = scan
        self.model = forward.model(scan)
        self._mapped = frozenset(mapped) & {axis.name for axis in self.model.axes}
        self._discrepancy = jnp.asarray(scan.noise.discrepancy)
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="scansteer-posterior")
        self._block_map = jax.jit(dictionary.block_map)
        self._play = jax.jit(dictionary.play)
        self._reading = jax.jit(dictionary.reading)(self.model.forward)
        self._step: Callable[..., tuple[Sums, Info]] = jax.jit(_step, donate_argnums=0)
        self._maps: dict[tuple[float, ...], LongitudinalMap] = {}
        self._state = self._initial_state()
        for index, block in enumerate(scan.schedule):
            self._map_of(block, first=index == 0)
        self._place = np.zeros((0, BLOCK), int)
        self._weights: list[jnp.ndarray] = []
        self._sums: list[Sums] = []
        self._warm_up()

    @property
    def prior(self) -> Prior:
        return self.model.prior

    def begin(self, maps: dict[str, Float[np.ndarray, " voxel"]], brightness: Float[np.ndarray, " voxel"]) -> None:
        """Fix the region.

        Parameters
        ----------
        maps
            Auxiliary values of its voxels, by name and in the scan's units.
        brightness
            Their first image: voxels that share their nuisances are grouped into blocks of like amplitude.

        Raises
        ------
        InputError
            More voxels than memory allows.
        """
        n_voxels = len(brightness)
        weights = nuisance_columns(self.scan, self.model.axes, {name: maps[name] for name in self._mapped})
        n_blocks = -(-n_voxels // BLOCK)
        block_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self._empty(weights)))
        if n_blocks * block_bytes > MAX_BYTES:
            raise InputError(
                f"The region has {n_voxels} voxels, the reference posterior holds at most {BLOCK * (MAX_BYTES // block_bytes)} of this scan; "
                "give a smaller region with --roi or a trained encoder with --encoder."
            )
        order = np.argsort(brightness, kind="stable")
        self._place = np.concatenate([order, np.repeat(order[-1:], n_blocks * BLOCK - n_voxels)]).reshape(n_blocks, BLOCK)
        self._weights = [jnp.asarray(weights if len(weights) == 1 else weights[place]) for place in self._place]
        self._sums = [self._empty(weights) for _ in range(n_blocks)]

    def absorb(self, signal: Float[np.ndarray, " voxel"], noise: NoiseEstimate, block: SaturationBlock, *, first: bool) -> Info:
        """Play the block, absorb the image it led to, and infer; NumPy leaves over all voxels."""
        expected = self.play(block, first=first)
        noise_now = Noise(jnp.asarray(noise.sigma), jnp.asarray(noise.dof), self._discrepancy)

        def one(index: int) -> Info:
            values = jnp.asarray(signal[self._place[index]], dtype=jnp.float64)
            self._sums[index], info = self._step(self._sums[index], self._weights[index], expected, values, noise_now, self.model.prior)
            return jax.block_until_ready(info)

        return self._gathered(list(self._pool.map(one, range(len(self._sums)))), len(signal))

    def _gathered(self, infos: list[Info], n_voxels: int) -> Info:
        """Blocks back into the order of the voxels."""
        where = np.empty(n_voxels, int)
        where[self._place.reshape(-1)] = np.arange(self._place.size)
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[where], *infos)

    def play(self, block: SaturationBlock, *, first: bool) -> jnp.ndarray:
        """Carry the magnetisation through one repetition, whether or not its image counts; the signals expected at every node."""
        self._state, expected = self._play(self.model.forward, self._reading, self._state, self._map_of(block, first=first))
        return jax.block_until_ready(expected)

    def close(self) -> None:
        self._pool.shutdown(wait=False)

    def _initial_state(self) -> dictionary.Magnetisation:
        state = jax.jit(dictionary.start)(self.model.forward)
        block = self.scan.schedule[0]
        for index in range(self.scan.first_state.n_dummies):
            state, _ = self._play(self.model.forward, self._reading, state, self._map_of(block, first=index == 0))
        return state

    def _map_of(self, block: SaturationBlock, *, first: bool) -> LongitudinalMap:
        """The first block of all skips its recovery: the first state is that just before the saturation."""
        played = block.model_copy(update={"t_rec_s": 0.0}) if first and not self.scan.first_state.n_dummies else block
        key = (played.b1_ut, played.offset_ppm, played.t_sat_s, played.t_rec_s)
        if key not in self._maps:
            if len(self._maps) > 2 * len(self.scan.schedule) + 64:  # an adaptive scan without end must not fill the memory
                self._maps.pop(next(iter(self._maps)))
            self._maps[key] = jax.block_until_ready(self._block_map(self.model.forward, tissue_model.saturation(self.scan, played)))
        return self._maps[key]

    def _empty(self, weights: np.ndarray) -> Sums:
        n_groups, n_mixture, n_columns, _ = weights.shape
        return likelihood.init(BLOCK, 1 if n_groups == 1 else BLOCK, n_mixture, n_columns, self.model.prior.box.n_cells)

    def _warm_up(self) -> None:
        """Run everything once on made-up voxels, then forget them."""
        axes = {axis.name: axis for axis in self.model.axes}
        self.begin({name: np.full(BLOCK + 1, axes[name].lower) for name in self._mapped}, np.full(BLOCK + 1, 100.0))
        state = self._state
        for number in range(2):
            self.absorb(np.full(BLOCK + 1, 100.0), NoiseEstimate(1.0, 1.0), self.scan.schedule[0], first=number == 0)
        self._state = state


def _step(sums: Sums, weights, expected, signal, noise: Noise, prior: Prior) -> tuple[Sums, Info]:
    columns = grid_posterior.expected_columns(weights, expected)
    sums = likelihood.update(sums, columns, signal)
    return sums, grid_posterior.infer(sums, noise, prior)


def nuisance_columns(scan: Scan, axes: Sequence[nuisance.Axis], maps: dict[str, np.ndarray]) -> np.ndarray:
    """The linear maps from dictionary nodes to the likelihood's columns: (group, mixture, column, node), offset included."""
    columns = nuisance.columns(axes, {name: Measured(values, _map_error(scan, name, values)) for name, values in maps.items()})
    lower, upper = bounds(scan.readout.offset)
    return nuisance.with_offset(columns, 0.5 * (lower + upper), (upper - lower) / 12**0.5)


def _map_error(scan: Scan, name: str, values: np.ndarray) -> np.ndarray:
    described = scan.auxiliaries[name]  # type: ignore[index]
    return np.hypot(described.map_error, described.map_error_relative * values)
