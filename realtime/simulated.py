"""Simulated scans with their exact posteriors: what encoders are trained and calibrated on.

A simulated scan plays pulses of its own choice, draws voxels from the scan's priors (f, k, and all that was not measured), adds noise, and
keeps for every voxel and every number of images the encoder's state and the reference's mean and covariance.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from scansteer.core import agreement, dictionary, lattice, likelihood, nuisance, resolution, signal_basis, voxel_columns
from scansteer.core import coordinate as coordinates
from scansteer.core.encoder import Gaussian
from scansteer.core.likelihood import Noise
from scansteer.core.nuisance import Measured
from scansteer.core.signal_basis import Basis
from scansteer.protocols import forward, tissue_model
from scansteer.protocols.scan import SaturationBlock, Scan, bounds

jax.config.update("jax_enable_x64", True)

GROUP = 64
"""Voxels that share their mapped values; the reference's likelihood is evaluated for so many at a time."""
N_EXTRA_PULSES = 10
"""Random pulses within the scan's limits, simulated beside the schedule's."""
SIGMA_RANGE = (1.5e-3, 4e-2)
"""Noise of simulated scans [fraction of M0], log-uniform."""
SHORT_SIGMA_RANGE = (1.5e-3, 1.5e-2)
"""The same of short scans: few images with little noise leave narrow curved ridges, the hardest posteriors of all."""
DOF_RANGE = (8.0, 5e3)
"""Degrees of freedom behind the noise, log-uniform."""
MISFIT_RANGE = (0.0, 0.025)
"""Error that the model does not know, of half of the training scans [fraction of M0]; a pattern over the images for each voxel."""
SPREADS = (1.0, 1.0, 1.8)
"""What training scans stretch the priors by: real voxels lie at the box's edge and beyond the nuisances' ranges, too."""


class Conditions(NamedTuple):
    """What one simulated scan is like."""

    blocks: Sequence[SaturationBlock]
    sigma: float
    """Noise that the posterior is told [fraction of M0]; each voxel's true one differs as its degrees of freedom say."""
    dof: float
    misfit: float = 0.0
    spread: float = 1.0
    """Factor by which truths and nuisances spread further than their priors; 1 where truth is to be covered."""


class Drawn(NamedTuple):
    """Voxels of one simulated scan."""

    truth: Float[np.ndarray, "voxel 2"]
    """z of (f, k)."""
    signals: Float[np.ndarray, "image voxel"]
    maps: dict[str, Float[np.ndarray, " group"]]
    """Values of the mapped auxiliaries, shared by the voxels of a group."""


class Simulator:
    """Simulates scans with the pulses of a schedule, in any order, and a few others."""

    def __init__(self, scan: Scan, mapped: Sequence[str], seed: int = 0) -> None:
        """Simulate every distinct pulse: tens of seconds."""
        self.scan = scan
        self.model = forward.model(scan)
        self.mapped = tuple(axis.name for axis in self.model.axes if axis.name in mapped)
        fraction, rate = scan.parameters.values()
        self.prior = forward.prior(scan, resolution.FINE)
        box = self.prior.box
        self.coordinate = coordinates.Coordinate(box.lower, box.upper, (fraction.prior, rate.prior))
        self.offset = nuisance.of_range(*bounds(scan.readout.offset))
        self.columns = voxel_columns.make(self.model.axes, self.mapped, self.offset)
        self._everything = voxel_columns.make(self.model.axes, [axis.name for axis in self.model.axes], (0.0, 0.0))
        self._play = jax.jit(dictionary.play)
        self._block_map = jax.jit(dictionary.block_map)
        self._reading = jax.jit(dictionary.reading)(self.model.forward)
        self._start = jax.jit(dictionary.start)(self.model.forward)
        self._maps: dict = {}
        self.extra = tuple(_random_pulse(scan, np.random.default_rng([seed, index])) for index in range(N_EXTRA_PULSES))
        self._targets = jax.jit(self._posteriors)

    def random_order(self, rng: np.random.Generator) -> tuple[SaturationBlock, ...]:
        """The schedule's pulses shuffled, each replaced by another one with probability 0.15; the first stays the first half of the time."""
        order = list(rng.permutation(len(self.scan.schedule)))
        if rng.random() < 0.5:
            order.remove(0)
            order.insert(0, 0)
        return tuple(self.extra[rng.integers(len(self.extra))] if rng.random() < 0.15 else self.scan.schedule[i] for i in order)

    def expected(self, blocks: Sequence[SaturationBlock]) -> Float[np.ndarray, "image node point"]:
        """Signals of a played sequence at every nuisance node and simulated point of (f, k); the last nuisance node reads 1."""
        state, signals = self._start, []
        for index in range(self.scan.first_state.n_dummies):
            state, _ = self._play(self.model.forward, self._reading, state, self._map_of(blocks[0], index == 0))
        for index, block in enumerate(blocks):
            first = index == 0 and not self.scan.first_state.n_dummies
            state, signal = self._play(self.model.forward, self._reading, state, self._map_of(block, first))
            signals.append(np.asarray(signal))
        return np.stack(signals)

    def draw(self, rng: np.random.Generator, conditions: Conditions, n_groups: int, expected: np.ndarray) -> Drawn:
        """Voxels from the scan's priors, and their noisy signals; the amplitude is 1, for the likelihood knows no scale."""
        n = n_groups * GROUP
        axes = {axis.name: axis for axis in self.model.axes}
        maps = {name: _uniform(axes[name], rng.random(n_groups)) for name in self.mapped}
        stretch = 1 + 0.75 * (conditions.spread - 1)
        values = {name: _spread(axis, 0.5 + stretch * (rng.random(n) - 0.5)) for name, axis in axes.items()}
        for name, each in maps.items():
            value = np.repeat(each, GROUP)
            values[name] = value + conditions.spread * self.map_error(name, value) * rng.standard_normal(n)
        truth = np.clip(conditions.spread * rng.standard_normal((n, 2)), -coordinates.REACH, coordinates.REACH)
        at = [np.asarray(self.coordinate.place(axis, jnp.asarray(truth[:, axis]))) for axis in (0, 1)]
        points = signal_basis.node_weights(at[0], at[1])
        weights = voxel_columns.of_voxels(self._everything, values, {name: np.zeros(n) for name in axes}, held=False)[0]
        signals = np.stack([np.sum((weights @ image[:-1]) * points, axis=1) for image in expected])
        lower, upper = bounds(self.scan.readout.offset)
        signals += rng.uniform(lower, upper, n)
        signals += np.hypot(conditions.misfit, self.scan.noise.discrepancy) * rng.standard_normal(signals.shape)
        sigma = conditions.sigma * np.sqrt(conditions.dof / rng.chisquare(conditions.dof, n))
        return Drawn(truth, signals + sigma * rng.standard_normal(signals.shape), maps)

    def coefficients(
        self, basis: Basis, expected: np.ndarray, maps: dict[str, np.ndarray]
    ) -> Float[np.ndarray, "image group function"]:
        """Every image's coefficients in the basis, for each value of the maps."""
        weights = self.voxel_weights(maps)
        return np.stack([image_coefficients(self.columns, basis, image, weights) for image in expected])

    def voxel_weights(self, maps: dict[str, np.ndarray]) -> Float[np.ndarray, "kind voxel node"]:
        """See `voxel_columns.of_voxels`."""
        return voxel_columns.of_voxels(self.columns, maps, {name: self.map_error(name, maps[name]) for name in self.mapped})

    def map_error(self, name: str, values: np.ndarray) -> np.ndarray:
        """Standard deviation of a map."""
        described = self.scan.auxiliaries[name]  # type: ignore[index]
        return np.hypot(described.map_error, described.map_error_relative * values)

    def references(self, drawn: Drawn, conditions: Conditions, expected: np.ndarray, pool: ThreadPoolExecutor) -> Gaussian:
        """Mean and covariance in z of the reference posterior, (image, voxel, ..)."""
        n_groups = drawn.signals.shape[1] // GROUP
        noise = Noise(*(jnp.asarray(each) for each in (conditions.sigma, conditions.dof, self.scan.noise.discrepancy)))

        def one(group: int) -> Gaussian:
            measured = {
                name: Measured(float(each[group]), float(self.map_error(name, each[group]))) for name, each in drawn.maps.items()
            }
            weights = nuisance.with_offset(nuisance.columns(self.model.axes, measured), *self.offset)
            columns = np.einsum("mcn,inx->icmx", weights, expected)
            signals = drawn.signals[:, group * GROUP : (group + 1) * GROUP]
            return jax.block_until_ready(self._targets(jnp.asarray(columns), jnp.asarray(signals), noise))

        return jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *pool.map(one, range(n_groups)))

    def _posteriors(self, columns, signals, noise: Noise) -> Gaussian:
        box = self.prior.box
        n_mixture, n_columns = columns.shape[2], columns.shape[1]

        def image(sums, now):
            nodes, signal = now
            sums = likelihood.update(sums, lattice.upsample(nodes, box.n_points), signal)
            log_posterior = likelihood.fit(sums, noise).log_likelihood.T + self.prior.on_cells()
            power = noise.dof + sums.n_images - 1
            followed = agreement.follow(log_posterior, self.prior, self.coordinate, power)
            return sums, agreement.moments(followed)

        sums = likelihood.init(GROUP, n_mixture, n_columns, box.n_cells)
        return jax.lax.scan(image, sums, (columns, signals))[1]

    def _map_of(self, block: SaturationBlock, first: bool):
        """The first block of all skips its recovery: the first state is that just before the saturation."""
        played = block.model_copy(update={"t_rec_s": 0.0}) if first else block
        if played not in self._maps:
            self._maps[played] = self._block_map(self.model.forward, tissue_model.saturation(self.scan, played))
        return self._maps[played]


def image_coefficients(
    columns: voxel_columns.Columns,
    basis: Basis,
    signals: Float[np.ndarray, "node point"],
    weights: Float[np.ndarray, "kind voxel node"],
) -> Float[np.ndarray, "voxel function"]:
    """One image's coefficients in the basis for every voxel."""
    at_nodes = signal_basis.coefficients(basis, voxel_columns.at_mapped_nodes(columns, signals))
    return np.concatenate(
        [weights[kind] @ at_nodes[:, block] for kind, block in zip(columns.kinds, basis.blocks, strict=True)], axis=1
    )


def sampled_columns(
    simulator: Simulator, rng: np.random.Generator, n_orders: int = 4, n_values: int = 12
) -> list[Float[np.ndarray, "sample node"]]:
    """Columns of the scan's schedule and of other pulses in other orders, at many values of the maps: what a basis is made from."""
    samples: list[list[np.ndarray]] = [[] for _ in range(simulator.columns.n_columns)]
    axes = {axis.name: axis for axis in simulator.model.axes}
    maps = {name: _uniform(axes[name], rng.random(n_values)) for name in simulator.mapped}
    weights = simulator.voxel_weights(maps)
    orders = [simulator.scan.schedule, simulator.extra, *(simulator.random_order(rng) for _ in range(n_orders))]
    for order in orders:
        for image in simulator.expected(order):
            for kind, found, column in zip(
                simulator.columns.kinds, samples, voxel_columns.at_mapped_nodes(simulator.columns, image), strict=True
            ):
                found.append(weights[kind] @ column)
    return [np.concatenate(found) for found in samples]


def _uniform(axis: nuisance.Axis, share: np.ndarray) -> np.ndarray:
    return axis.lower + (axis.upper - axis.lower) * share


def _spread(axis: nuisance.Axis, share: np.ndarray) -> np.ndarray:
    """The same for shares beyond 0 .. 1: a relaxation time stays above half of its range's lower end."""
    values = _uniform(axis, share)
    return np.maximum(values, 0.5 * axis.lower) if axis.logarithmic else values


def _random_pulse(scan: Scan, rng: np.random.Generator) -> SaturationBlock:
    """A pulse within the scan's limits, among the amplitudes and offsets of its schedule or beyond them."""
    limits, like = scan.limits, scan.schedule[rng.integers(len(scan.schedule))]
    return SaturationBlock(
        b1_ut=round(float(rng.uniform(0, limits.b1_max_ut)), 2) if rng.random() < 0.8 else 0.0,
        offset_ppm=round(float(rng.uniform(limits.offset_ppm.lower, limits.offset_ppm.upper)), 1)
        if rng.random() < 0.5
        else like.offset_ppm,
        t_sat_s=like.t_sat_s,
        t_rec_s=round(float(rng.uniform(max(limits.t_rec_s.lower, 0.0), min(limits.t_rec_s.upper, 8.0))), 1)
        if rng.random() < 0.3
        else like.t_rec_s,
    )
