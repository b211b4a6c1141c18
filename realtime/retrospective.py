"""A finished replay looked back upon twice: as it was decided, image by image, and as the published analysis has it (`core.retrospective`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from scansteer.core import dictionary, grid_posterior, lattice, nuisance, region, resolution, retrospective
from scansteer.core.nuisance import Measured
from scansteer.core.region import Summary
from scansteer.protocols import forward, tissue_model
from scansteer.protocols.scan import Range, SaturationBlock, Scan, bounds
from scansteer.realtime.images import Frame
from scansteer.realtime.messages import Decision, RegionReport

N_VOXELS = 64
"""Voxels that the curves are of, spread over the region."""
FEWEST_IMAGES = 4
"""Of fewer there is nothing to look back upon."""
MOST_ON_MAPS = 1024
"""Voxels of the shown slice; of a larger one every second, third, .."""
BATCH = 64
MAPS_AT = (0.1, 0.2, 0.35, 0.6, 1.0)
"""Shares of the images at which maps are drawn."""


class Course(NamedTuple):
    """How estimates and their uncertainty went; the number of images n is the first axis, from 1."""

    area: Float[np.ndarray, " n"]
    """Of the 95 % confidence region [f x 1/s], NaN where undefined. Causal: the medians over all voxels of each region, as decisions report them,
    averaged over regions by their voxels; by the whole scan: the median over the same voxels as the other curves."""
    estimate: Float[np.ndarray, "n voxel 2"]
    halfwidth: Float[np.ndarray, "n voxel 2"]
    """Of the 95 % intervals."""
    on_maps: Float[np.ndarray, "shown place 2"]
    """Estimates at the places that maps show, at the numbers of images that they show."""

    @property
    def error(self) -> Float[np.ndarray, "n 2"]:
        """Mean absolute difference from the last estimate, over that estimate."""
        last = np.where(self.estimate[-1] > 0, self.estimate[-1], np.nan)
        return np.nanmean(np.abs(self.estimate - last) / last, axis=1)

    @property
    def bounded(self) -> Float[np.ndarray, " 2"]:
        """Share of (voxel, n = 3 .. N - 1) whose difference from the last estimate is within the half-width."""
        rows = slice(2, len(self.estimate) - 1)
        return np.mean(np.abs(self.estimate[rows] - self.estimate[-1]) <= self.halfwidth[rows], axis=(0, 1))


class Comparison(NamedTuple):
    parameters: tuple[str, str]
    causal: Course
    whole: Course
    """Normalised by the whole scan."""
    shown_at: tuple[int, ...]
    """Numbers of images at which maps are drawn."""
    places: Int[np.ndarray, "place 2"]
    """Row and column of the voxels on the maps."""
    n_voxels: int
    """Behind the curves, but for the causal area, which is of all."""
    pulses: tuple[SaturationBlock, ...]
    """Before each image that counts."""


class TooFewImages(NamedTuple):
    """Why a scan was not looked back upon."""

    n_images: int
    """That counted."""


class Recorder:
    """Notes what a replay needs to be looked back upon."""

    def __init__(self, scan: Scan) -> None:
        self.scan = scan
        self._curve = self._shown = np.zeros(0, int)
        self._shape = (1, 1, 1)
        self._blocks: list[int] = []
        self._signals: list[np.ndarray] = []
        self._areas: list[float] = []
        self._bounds: list[np.ndarray] = []

    def note(self, frame: Frame, decision: Decision, maps: Mapping[str, np.ndarray]) -> None:
        """After each decision; images that were left out are passed over."""
        if decision.n_images != len(self._signals) + 1:
            return
        if not self._signals:
            self._choose(maps["nrmse"])
        voxels = np.concatenate([self._curve, self._shown])
        self._blocks.append(frame.repetition)
        self._signals.append(frame.pixels.reshape(-1)[voxels])
        stacked = [np.stack([maps[f"{name}_{kind}"].reshape(-1)[voxels] for name in self.scan.parameter_names], axis=1) for kind in _KINDS]
        self._bounds.append(np.stack(stacked))
        self._areas.append(_mean_area(decision.regions))

    def compare(self, auxiliaries: Mapping[str, np.ndarray]) -> Comparison | TooFewImages:
        """Both views, of `FEWEST_IMAGES` images or more.

        Parameters
        ----------
        auxiliaries
            Maps by the scan's names, in its units, shape (z, y, x).
        """
        n = len(self._signals)
        if n < FEWEST_IMAGES:
            return TooFewImages(n)
        shown_at = tuple(sorted({max(3, round(share * n)) for share in MAPS_AT}))
        voxels = np.concatenate([self._curve, self._shown])
        signals, values = np.stack(self._signals, axis=1), np.stack(self._bounds)
        own = {name: each.reshape(-1)[voxels] for name, each in auxiliaries.items()}
        m = len(self._curve)
        rows = np.array(shown_at) - 1
        estimate, lower, upper = values[:, 0], values[:, 1], values[:, 2]
        causal = Course(np.array(self._areas), estimate[:, :m], 0.5 * (upper - lower)[:, :m], estimate[rows][:, m:])
        whole = Published(self.scan, self._blocks).course(signals, own, m, rows)
        _, y, x = self._shape
        places = np.stack(np.divmod(self._shown % (y * x), x), axis=1)
        pulses = tuple(self.scan.schedule[repetition] for repetition in self._blocks)
        return Comparison(self.scan.parameter_names, causal, whole, shown_at, places, m, pulses)

    def _choose(self, known: np.ndarray) -> None:
        self._shape = known.shape
        flat = np.flatnonzero(np.isfinite(known))
        self._curve = flat[np.linspace(0, len(flat) - 1, min(N_VOXELS, len(flat))).astype(int)]
        z, size = int(np.argmax(np.isfinite(known).sum(axis=(1, 2)))), known[0].size
        in_slice = flat[flat // size == z]
        self._shown = in_slice[:: -(-len(in_slice) // MOST_ON_MAPS)]


def _mean_area(regions: Sequence[RegionReport]) -> float:
    """Of the regions whose median area is defined, by their voxels; NaN if it is of none [f x 1/s]."""
    known = [(each.cr_area_median, each.n_voxels) for each in regions if each.cr_area_median is not None]
    areas, sizes = np.reshape(known, (-1, 2)).T
    return float(np.average(areas, weights=sizes)) if known else float("nan")


_KINDS = ("map", "lower", "upper")


class Published:
    """The published analysis of one scan: nuisances at their mapped value, or in the middle of their range."""

    def __init__(self, scan: Scan, repetitions: Sequence[int]) -> None:
        """Simulate the schedule; `repetitions` are those whose images count."""
        self.scan = scan
        self._model = forward.model(scan)
        box = forward.prior(scan, resolution.FINE).box
        self._prior = grid_posterior.make_prior(box.lower, box.upper, box.n_points, ("uniform", "uniform"))
        self._expected = self._simulate(repetitions)
        self._posteriors = jax.jit(retrospective.log_posteriors)
        self._summarise = jax.jit(region.summarise)

    def course(
        self, signals: Float[np.ndarray, "voxel image"], auxiliaries: Mapping[str, np.ndarray], n_curve: int, shown: Int[np.ndarray, " shown"]
    ) -> Course:
        """Of the first `n_curve` voxels everything at every n, of the others the estimates at the rows `shown`."""
        summaries, on_maps = [], []
        for start in range(0, len(signals), BATCH):
            part = np.minimum(start + np.arange(BATCH), len(signals) - 1)
            dictionaries = self._dictionaries({name: values[part] for name, values in auxiliaries.items()})
            posteriors = self._posteriors(jnp.asarray(signals[part]), dictionaries)
            n_here = min(BATCH, len(signals) - start)
            if start < n_curve:
                each = [self._summary(posterior) for posterior in posteriors]
                summaries.append(jax.tree.map(lambda *leaves: np.stack(leaves), *each))
            on_maps.append(self._best(np.asarray(posteriors[shown]))[:, :n_here])
        joined: Summary = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1)[:, :n_curve], *summaries)
        area = np.median(joined.cr_area, axis=1)
        return Course(area, np.asarray(joined.map), 0.5 * np.asarray(joined.upper - joined.lower), np.concatenate(on_maps, axis=1)[:, n_curve:])

    def _summary(self, posterior: jnp.ndarray) -> Summary:
        box = self._prior.box
        return self._summarise(posterior.astype(jnp.float32).reshape(-1, *box.n_points), self._prior.log_density, box)

    def _best(self, posteriors: Float[np.ndarray, "n voxel cell"]) -> Float[np.ndarray, "n voxel 2"]:
        box = self._prior.box
        steps = np.divmod(np.argmax(posteriors, axis=-1), box.n_points[1])
        return np.stack([np.asarray(box.value(axis, jnp.asarray(step, jnp.float64))) for axis, step in enumerate(steps)], axis=-1)

    def _simulate(self, repetitions: Sequence[int]) -> Float[np.ndarray, "image node point"]:
        """Every repetition is played, and those that count are read."""
        play, block_map = jax.jit(dictionary.play), jax.jit(dictionary.block_map)
        read = jax.jit(dictionary.reading)(self._model.forward)
        state = jax.jit(dictionary.start)(self._model.forward)
        dummies = self.scan.first_state.n_dummies
        blocks = [self.scan.schedule[0]] * dummies + list(self.scan.schedule[: max(repetitions) + 1])
        blocks[0] = blocks[0].model_copy(update={"t_rec_s": 0.0})
        expected = []
        for block in blocks:
            state, signals = play(self._model.forward, read, state, block_map(self._model.forward, tissue_model.saturation(self.scan, block)))
            expected.append(np.asarray(signals))
        return np.stack([expected[dummies + repetition] for repetition in repetitions])

    def _dictionaries(self, auxiliaries: Mapping[str, np.ndarray]) -> jnp.ndarray:
        """Signals of a batch's voxels at the lattice cells, (voxel, image, cell)."""
        mapped = [axis.name for axis in self._model.axes if axis.name in auxiliaries]
        n = BATCH if mapped else 1
        weights = np.stack([self._weights({name: float(auxiliaries[name][voxel]) for name in mapped}) for voxel in range(n)])
        return lattice.upsample(jnp.asarray(np.einsum("vn,inx->vix", weights, self._expected)), self._prior.box.n_points)

    def _weights(self, values: Mapping[str, float]) -> Float[np.ndarray, " node"]:
        known = {axis.name: Measured(values.get(axis.name, 0.5 * (axis.lower + axis.upper)), 1.0) for axis in self._model.axes}
        lower, upper = bounds(self.scan.readout.offset)
        return nuisance.with_offset(nuisance.columns(self._model.axes, known), 0.5 * (lower + upper), 0.0)[0, 0]


def clipped(values: np.ndarray, span: Range) -> np.ndarray:
    """A map within the range that the scan allows it."""
    return np.clip(np.nan_to_num(values, nan=span.centre), span.lower, span.upper)
