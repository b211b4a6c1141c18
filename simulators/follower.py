"""Posteriors of many small scenes at once: what a session does, without its messages, for closed-loop studies.

The same core functions on the same lattice; where nothing is mapped, the nuisance nodes are the star of `core.predictive`, which gives the same
columns as the session's tensor grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scansteer.core import design, dictionary, grid_posterior, lattice, likelihood, nuisance, prediction, predictive, region, resolution
from scansteer.core.design import Question
from scansteer.core.dictionary import Magnetisation
from scansteer.core.grid_posterior import Info, LogPosterior, Prior
from scansteer.core.likelihood import Noise, Sums
from scansteer.core.noise import NoiseEstimate
from scansteer.core.nuisance import Measured
from scansteer.core.prediction import Prediction
from scansteer.core.region import Summary
from scansteer.core.signal import LongitudinalMap
from scansteer.protocols import forward, tissue_model
from scansteer.protocols.prospect import Prospect, Rows
from scansteer.protocols.scan import SaturationBlock, Scan, bounds

jax.config.update("jax_enable_x64", True)  # the physics and the running sums need it; core leaves the choice to its user

N_FINE = 96
"""Cells per side on which a truth's place in its posterior is looked up."""


@dataclass(frozen=True)
class Followed:
    """One scene so far; voxels are blocks of one where maps tell them apart, else one block."""

    state: Magnetisation
    sums: tuple[Sums, ...]
    weights: tuple[Array, ...]
    measured: tuple[dict[str, Measured], ...]
    n_images: int = 0
    log_posterior: Float[np.ndarray, "voxel cell"] | None = None
    """After the latest image, on the lattice."""
    power: float = 0.0
    """As in `region.summarise`."""


class Place(NamedTuple):
    """Where a voxel's truth lies in its posterior."""

    credibility: Float[np.ndarray, " voxel"]
    """Mass of what is more probable: the truth is inside the 95 % region below 0.95."""
    log_ratio: Float[np.ndarray, " voxel"]
    """Log of posterior over prior; the anytime region holds the truth above log 0.05."""


class Follower:
    """Follows scenes of one scan; everything is compiled for one number of voxels per scene."""

    def __init__(self, scan: Scan, mapped: tuple[str, ...]) -> None:
        self.scan = scan
        self.mapped = mapped
        if mapped:
            model = forward.model(scan)
            self._forward, self._axes, self._star = model.forward, model.axes, None
        else:
            self._star, self._forward = forward.coarse(scan, at_most=99, n_points=lattice.N_NODES)
            self._axes = self._star.axes
        self._reading = jax.jit(dictionary.reading)(self._forward)
        self._block_map = jax.jit(dictionary.block_map)
        self._start = jax.jit(dictionary.start)(self._forward)
        self._play, self._step, self._place, self._foresee = jax.jit(_play), jax.jit(_step), jax.jit(_place), jax.jit(_foresee)
        self._maps: dict[SaturationBlock, LongitudinalMap] = {}
        self._offset = nuisance.of_range(*bounds(scan.readout.offset))
        self.prior: Prior = forward.prior(scan, resolution.n_points(self._foreseen(), scan.noise.discrepancy))

    def begin(self, maps: dict[str, np.ndarray], n_voxels: int) -> Followed:
        """Before the first image; dummies have been played."""
        if self.mapped:
            measured = tuple({name: self.measured(name, maps[name][voxel]) for name in self.mapped} for voxel in range(n_voxels))
        else:
            measured = ({},)
        weights = tuple(jnp.asarray(self._columns(each)) for each in measured)
        n_mixture, n_columns, _ = weights[0].shape
        empty = likelihood.init(n_voxels // len(measured), n_mixture, n_columns, self.prior.box.n_cells)
        return Followed(self._after_dummies(), (empty,) * len(measured), weights, measured)

    def absorb(self, followed: Followed, block: SaturationBlock, signal: np.ndarray, noise: NoiseEstimate) -> tuple[Followed, Info]:
        """Play a block and absorb the image it led to."""
        first = followed.n_images == 0 and not self.scan.first_state.n_dummies
        state, expected = self._played(followed.state, block, first=first)
        known = Noise(jnp.asarray(noise.sigma), jnp.asarray(noise.dof), jnp.asarray(self.scan.noise.discrepancy))
        parts = np.split(np.asarray(signal, float), len(followed.sums))
        steps = [
            self._step(sums, weights, expected, part, known, self.prior)
            for sums, weights, part in zip(followed.sums, followed.weights, parts, strict=True)
        ]
        info, log_posterior = jax.tree.map(lambda *leaves: np.concatenate(leaves), *((info, posterior) for _, info, posterior in steps))
        sums = tuple(sums for sums, _, _ in steps)
        n, power = followed.n_images + 1, float(noise.dof) + followed.n_images
        return replace(followed, state=state, sums=sums, n_images=n, log_posterior=log_posterior, power=power), info

    def question(self, followed: Followed, info: Info, prospect: Prospect, noise: NoiseEstimate) -> tuple[Question, Rows]:
        """What the prospect is asked, all voxels counting the same."""
        summary, box = info.summary, self.prior.box
        seed = design.seed_of(self.scan.name, followed.n_images - 1)
        assert followed.log_posterior is not None
        drawn = design.draw(followed.log_posterior, summary.mean, summary.covariance, box, seed)
        size = len(drawn.cells) // len(followed.sums)
        cells = np.split(drawn.cells, len(followed.sums))
        at = [likelihood.at_cells(sums, np.arange(size), each) for sums, each in zip(followed.sums, cells, strict=True)]
        gram, projection, energy = (np.concatenate(each) for each in zip(*at, strict=True))
        n_voxels, n_columns = len(drawn.cells), gram.shape[-1]
        question = Question(
            weights=np.repeat(np.stack([prospect.columns(maps) for maps in followed.measured]), size, axis=0),
            gram=gram,
            projection=projection,
            energy=energy,
            n_images=jnp.asarray(float(followed.n_images)),
            shift=np.zeros((n_voxels, n_columns - 1)),
            draw_weights=drawn.weights,
            mean_weights=drawn.mean_weights,
            contrast=drawn.contrast,
            importance=np.full(n_voxels, 1 / n_voxels),
            variance=jnp.asarray(noise.sigma**2),
            dof=jnp.asarray(float(noise.dof)),
            discrepancy=jnp.asarray(self.scan.noise.discrepancy**2),
        )
        return question, design.rows(drawn.cells, box.n_points)

    def foresee(self, signals: Float[np.ndarray, "node 1 point"], question: Question, rows: Rows) -> Prediction:
        """What an image should read, whose signals the prospect gives (`Prospect.read`)."""
        mean, variance = self._foresee(signals, question, rows)
        return prediction.of_region(np.asarray(mean, float), np.asarray(variance, float), float(question.variance) ** 0.5)

    def told(self, beyond: Float[np.ndarray, " nuisance"]) -> dict[str, float]:
        """How far beyond its range (`design.Answer`) each nuisance lies of which the images can tell."""
        names = [*nuisance.coefficients(self._axes, self.mapped), *(["offset"] if self._offset[1] > 0 else [])]
        return nuisance.told(self._axes, self.mapped, dict(zip(names, map(float, beyond), strict=True)))

    def place(self, followed: Followed, info: Info, truth: Float[np.ndarray, "voxel 2"]) -> Place:
        """Where truths lie."""
        at = jnp.asarray(truth, jnp.float64), jnp.asarray(followed.power)
        return Place(*map(np.asarray, self._place(info.summary, followed.log_posterior, *at, self.prior)))

    def _foreseen(self) -> Iterator[np.ndarray]:
        """As `Reference` foresees its lattice."""
        weights = self._columns({axis.name: self.measured(axis.name, axis.middle) for axis in self._axes if axis.name in self.mapped})[0]
        state = self._after_dummies()
        for index, block in enumerate(self.scan.schedule):
            state, signals = self._played(state, block, first=index == 0 and not self.scan.first_state.n_dummies)
            yield weights @ np.asarray(signals)

    def _after_dummies(self) -> Magnetisation:
        state = self._start
        for index in range(self.scan.first_state.n_dummies):
            state = self._played(state, self.scan.schedule[0], first=index == 0)[0]
        return state

    def _played(self, state: Magnetisation, block: SaturationBlock, *, first: bool) -> tuple[Magnetisation, Array]:
        played = block.model_copy(update={"t_rec_s": 0.0}) if first else block
        if played not in self._maps:
            self._maps[played] = self._block_map(self._forward, tissue_model.saturation(self.scan, played))
        place = None if self._star is None else tuple(map(jnp.asarray, self._star.place))
        return self._play(self._forward, self._reading, state, self._maps[played], place)

    def _columns(self, measured: dict[str, Measured]) -> np.ndarray:
        columns = nuisance.columns(self._axes, measured) if self._star is None else predictive.columns(self._star, measured)
        return nuisance.with_offset(columns, *self._offset)

    def measured(self, name: str, value: float) -> Measured:
        """What a map says of one voxel."""
        described = self.scan.auxiliaries[name]  # type: ignore[index]
        floor = 1e-3 * (described.upper - described.lower)
        return Measured(float(value), max(float(np.hypot(described.map_error, described.map_error_relative * value)), floor))


def _play(model, reading, state, block, place):
    state, signals = dictionary.play(model, reading, state, block)
    if place is None:
        return state, signals
    chain, tissue = place
    return state, jnp.concatenate([signals[chain * state.mz.shape[2] + tissue], signals[-1:]])


def _step(sums: Sums, weights, expected, signal, noise: Noise, prior: Prior) -> tuple[Sums, Info, LogPosterior]:
    sums, posterior = grid_posterior.step(sums, grid_posterior.expected_columns(weights, expected, prior.box), signal, noise, prior)
    return sums, grid_posterior.describe(posterior, prior)[0], posterior.log_posterior


def _foresee(signals, question: Question, rows: Rows):
    return prediction.predict(question, predictive.at_draws(signals, rows))


def _place(
    summary: Summary, log_posterior: LogPosterior, truth: Float[Array, "voxel 2"], power: Float[Array, ""], prior: Prior
) -> tuple[Array, Array]:
    """By a fine grid over five standard deviations either way, interpolated as `region.summarise` does it."""
    box = prior.box
    relative = log_posterior - jnp.max(log_posterior, axis=1, keepdims=True)
    misfit = region.to_misfit(relative, power).reshape(-1, *box.n_points)
    share = (jnp.arange(N_FINE) + 0.5) / N_FINE
    positions, at, areas, log_prior = [], [], [], jnp.zeros(len(truth))
    for axis in (0, 1):
        sd = jnp.sqrt(summary.covariance[:, axis, axis])
        ends = [box.position(axis, summary.mean[:, axis] + way * 5 * sd) for way in (-1, 1)]
        positions.append(ends[0][:, None] + (ends[1] - ends[0])[:, None] * share)
        areas.append(box.slope(axis, positions[axis]) * ((ends[1] - ends[0]) / N_FINE)[:, None])
        at.append(box.position(axis, truth[:, axis])[:, None])
        log_prior = log_prior + jnp.interp(at[axis][:, 0], jnp.arange(box.n_points[axis]), prior.log_density[axis])
    fine, there = (region.from_misfit(region.interpolate(misfit, (where[0], where[1])), power) for where in (positions, at))
    there = there[:, 0, 0]
    top = jnp.max(fine, axis=(1, 2))
    mass = jnp.exp(fine - top[:, None, None]) * areas[0][:, :, None] * areas[1][:, None]
    total = jnp.sum(mass, axis=(1, 2))
    above = jnp.sum(jnp.where(fine > there[:, None, None], mass, 0.0), axis=(1, 2))
    return above / total, there - top - jnp.log(total) - log_prior
