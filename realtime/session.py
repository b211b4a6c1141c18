"""A session: images of one scan in, a decision after each out. A deterministic function of the images; no sockets.

server -> session -> posterior -> stopping -> design -> Decision
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from scansteer.core import lack_of_fit, noise, nuisance, stopping
from scansteer.core.errors import InputError
from scansteer.core.grid_posterior import Info
from scansteer.protocols import forward
from scansteer.protocols.scan import SaturationBlock, Scan, bounds
from scansteer.realtime import maps as map_files
from scansteer.realtime import roi, screening
from scansteer.realtime.advisor import Advice, Advisor
from scansteer.realtime.encoded import Encoded
from scansteer.realtime.images import Frame, Geometry, check_usable
from scansteer.realtime.messages import (
    Decision,
    Gains,
    LackOfFit,
    Latency,
    MeanReport,
    Message,
    Pulse,
    SuggestedPulse,
)
from scansteer.realtime.reference import Reference
from scansteer.realtime.region_means import RegionMeans
from scansteer.realtime.region_report import Reporter, finite
from scansteer.realtime.roi import Region
from scansteer.realtime.screening import Foresight, Screen
from scansteer.realtime.worker import Setup

AUXILIARIES = {"t1": "t1_s", "t2": "t2_s", "b0": "b0_ppm", "b1": "b1_relative", "fss": "fss", "kssw": "kssw"}
"""Role of an image -> the scan's name of the quantity."""


class LatencyPercentiles(Message):
    p50: float
    p99: float


class Summary(Message):
    """What `summary.json` holds."""

    scan: str
    n_images: int
    would_stop_at: int | None
    nrmse_median: float | None
    latency_ms: LatencyPercentiles | None
    ready_s: float
    versions: dict[str, str]


class Voxels(NamedTuple):
    """The voxels that are followed, frozen with the first usable image."""

    geometry: Geometry
    index: np.ndarray
    """Flat indices into (z, y, x), ascending."""
    regions: tuple[Region, ...]
    places: tuple[np.ndarray, ...]
    """Of each region's voxels among `index`."""


class Files(NamedTuple):
    """Region and maps that lie in NIfTI files; read when the first image says where its voxels are."""

    roi: Path | None = None
    maps: dict[str, Path] = {}  # noqa: RUF012 - never changed
    """Role -> file; used where no such map came as an image."""

    def check(self) -> None:
        """
        Raises
        ------
        InputError
            Unknown role, or no such file.
        """
        for role in self.maps:
            if role not in AUXILIARIES:
                raise InputError(f"Unknown auxiliary map {role!r}; known are {', '.join(AUXILIARIES)}.")
        for file in (self.roi, *self.maps.values()):
            if file is not None and not file.is_file():
                raise InputError(f"There is no file {file}.")


MakeEngine = Callable[[Scan, list[str]], Reference | Encoded]


class Session:
    """One scan of one subject."""

    def __init__(self, setup: Setup, files: Files | None = None, make_engine: MakeEngine = Reference) -> None:
        """Compile everything and simulate the schedule: seconds.

        Parameters
        ----------
        make_engine
            What computes posteriors, from the scan and the names of the mapped auxiliaries: the reference, or an encoder that it audits.

        Raises
        ------
        InputError
            The scan, the region or an auxiliary map cannot be used.
        """
        started = time.perf_counter()
        self.scan: Scan = setup.scan
        self._setup = setup
        self._files = files or Files()
        mapped, self._opening_warnings = _usable_roles(setup.scan, [*setup.auxiliaries, *self._files.maps])
        self._roles = mapped
        with ThreadPoolExecutor(1) as side_by_side:  # both compile for long
            advisor = side_by_side.submit(Advisor, self.scan)
            self._reference = make_engine(self.scan, [AUXILIARIES[role] for role in mapped])
            self._advisor = advisor.result()
        self._opening_warnings += [self._reference.said] if self._reference.said else []
        self._reference.said = None
        self._reference.reserve(self._most_voxels())
        with ThreadPoolExecutor(1) as side_by_side:
            means = side_by_side.submit(RegionMeans, self._reference.exact)
            self._advisor.rehearse(self._reference.exact)
            self._means = means.result()
        self._rule = rule_of(self.scan)
        self._stopping = stopping.init()
        self._reporter = Reporter(self.scan.parameter_names, self._rule)
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="scansteer-beside")
        self._of_means: list[MeanReport] = []
        self._screen = Screen()
        self._record = lack_of_fit.init()
        self._fit = lack_of_fit.Check(None, True)
        self._unexplained = np.zeros(0, bool)
        self._n_shared = n_shared(self.scan, [AUXILIARIES[role] for role in mapped])
        self._voxels: Voxels | None = None
        self._n_counted = 0
        self._energy = np.zeros(0)
        self._info: Info | None = None
        self._estimate = noise.NoiseEstimate(1.0, 1.0)
        self._latencies_ms: list[float] = []
        self._n_played = 0
        self._n_decisions = 0
        self._last: Decision | None = None
        self.ready_s = time.perf_counter() - started

    def absorb(self, frame: Frame, *, received_at: float, pulse: Pulse | None = None, deadline: float | None = None) -> Decision:
        """Update with one repetition's volume, if it should count, and decide; see `worker.Session`."""
        begun = time.perf_counter()
        left_out = self._screen.declared(frame)
        if left_out is not None and self._voxels is None:
            raise InputError(left_out)
        check_usable(frame)
        block = self._block(frame.repetition, pulse)
        warnings = list(self._opening_warnings) if self._voxels is None else []
        voxels = self._voxels or self._begin(frame, warnings)
        if (difference := voxels.geometry.difference(frame.geometry)) is not None:
            raise InputError(f"The image of repetition {frame.repetition} does not match the first one: {difference}; it is left out.")
        self._skip_to(frame.repetition)
        signal = frame.pixels.reshape(-1)[voxels.index]
        foresight = self._foresee(block)
        left_out = left_out or self._screen.look(frame, signal, foresight, self._fit.passed)
        if left_out is not None:
            self._play(block)
            warnings.append(left_out)
        else:
            warnings += self._count(frame, block, signal, foresight)
        updated = time.perf_counter()
        decision = self._decide(frame.repetition, voxels, left_out, tuple(warnings))
        done = time.perf_counter()
        latency = Latency(
            receive=1e3 * (begun - received_at), update=1e3 * (updated - begun), decide=1e3 * (done - updated), total=1e3 * (done - received_at)
        )
        self._latencies_ms.append(latency.total)
        margin = None if deadline is None else 1e3 * (deadline - done)
        self._last = decision.model_copy(update={"latency_ms": latency, "margin_ms": margin})
        return self._last

    def absorb_missing(self, repetition: int, pulse: Pulse | None = None) -> None:
        """No usable image of this repetition exists, but its pulse was played: carry the magnetisation on."""
        block = self._block(repetition, pulse)
        self._skip_to(repetition)
        self._play(block)

    def confirm_stop(self) -> Decision:
        """The operator agrees to the stop that the latest decision proposed; see `worker.Session`."""
        if self._last is None or (self._last.cause, self._last.action) != ("operator", "continue"):
            raise InputError("There is no stop to confirm: the latest decision proposes none.")
        self._stopping = stopping.confirm(self._stopping)
        update = {"action": "stop", "next_pulse": None, "reason": "The operator has confirmed the stop."}
        self._last = self._last.model_copy(update={**update, "sequence_number": self._n_decisions})
        self._n_decisions += 1
        return self._last

    def maps(self) -> dict[str, np.ndarray]:
        """Name -> (z, y, x) float32, NaN outside the region."""
        if self._voxels is None or self._info is None:
            raise InputError(f"Session {self._setup.session_id!r} has no maps yet: no usable image has arrived.")
        summary = self._info.summary
        values = {"nrmse": self._info.nrmse}
        for axis, name in enumerate(self.scan.parameter_names):
            values |= {f"{name}_map": summary.map[:, axis], f"{name}_lower": summary.lower[:, axis], f"{name}_upper": summary.upper[:, axis]}
        drawn = self._reference.draw() if isinstance(self._reference, Encoded) else None
        if drawn is not None:
            values |= {f"{name}_draw": drawn[:, axis] for axis, name in enumerate(self.scan.parameter_names)}
        return {name: self._painted(value) for name, value in values.items()}

    def summary(self) -> Summary:
        """What is to be said of the whole session so far."""
        latencies = self._latencies_ms
        return Summary(
            scan=self.scan.name,
            n_images=self._n_counted,
            would_stop_at=self._stopping.would_stop_at,
            nrmse_median=None if self._info is None else finite(np.median(self._info.nrmse)),
            latency_ms=LatencyPercentiles(p50=float(np.percentile(latencies, 50)), p99=float(np.percentile(latencies, 99))) if latencies else None,
            ready_s=self.ready_s,
            versions=versions(),
        )

    @property
    def n_candidates(self) -> tuple[int, int]:
        """As in `Advisor`."""
        return self._advisor.n_candidates

    def close(self) -> None:
        """Let the threads go."""
        self._beside.shutdown(wait=False)
        self._means.close()
        self._reference.close()

    def _most_voxels(self) -> int:
        """That the region can have, as far as is known before the first image."""
        if self._setup.region is not None:
            return int(np.count_nonzero(self._setup.region.pixels))
        return math.prod(self.scan.matrix or (0,))

    def _block(self, repetition: int, pulse: Pulse | None) -> SaturationBlock:
        if pulse is not None:
            return SaturationBlock(b1_ut=pulse.b1_ut, offset_ppm=pulse.offset_ppm, t_sat_s=pulse.t_sat_s, t_rec_s=pulse.t_rec_s)
        if repetition >= len(self.scan.schedule):
            raise InputError(
                f"Repetition {repetition} lies beyond the {len(self.scan.schedule)} blocks of scan {self.scan.name!r}; say which pulse was played."
            )
        return self.scan.schedule[repetition]

    def _skip_to(self, repetition: int) -> None:
        """Play the schedule up to a repetition whose predecessors were never spoken of."""
        if repetition < self._n_played:
            raise InputError(f"Repetition {repetition} comes after repetition {self._n_played - 1}: images must come in order, each once.")
        while self._n_played < repetition:
            self._play(self._block(self._n_played, None))

    def _foresee(self, block: SaturationBlock) -> Foresight | None:
        """What the next image should read."""
        foreseen = self._advisor.foresee(block)
        return None if foreseen is None else Foresight(self._reference.among_all(foreseen[0]), foreseen[1])

    def _count(self, frame: Frame, block: SaturationBlock, signal: np.ndarray, foresight: Foresight | None) -> list[str]:
        """Absorb an image that counts; what there is to say about it."""
        self._screen.keep(frame, signal)
        if foresight is not None:
            self._record = lack_of_fit.update(self._record, screening.surprise(foresight, signal))
        self._n_counted += 1
        self._energy = self._energy + signal.astype(float) ** 2
        self._estimate = self._noise()
        expected = self._play(block)
        steady = self._screen.history[-1]  # where a voxel departed, what was expected of it
        means = self._beside.submit(self._means.absorb, expected, steady, self._estimate)
        self._info = self._reference.absorb(expected, signal, self._estimate)
        self._of_means = self._reporter.of_means(means.result(), self._means.n_independent)
        return [self._reference.said] if self._reference.said else []

    def _play(self, block: SaturationBlock) -> jax.Array:
        """Carry the magnetisation through one repetition; the signals expected, (node, point) of the dictionary."""
        expected = self._reference.play(block, first=self._n_played == 0)
        self._advisor.play(block)
        self._n_played += 1
        return expected

    def _begin(self, frame: Frame, warnings: list[str]) -> Voxels:
        """Freeze the region from the first usable image and the auxiliary maps."""
        expected = self.scan.matrix
        if expected is not None and frame.geometry.matrix != expected:
            raise InputError(f"The images have matrix {frame.geometry.matrix}, scan {self.scan.name!r} expects {expected}; choose the right scan.")
        if not frame.geometry.is_oriented:
            warnings.append("The image header has no valid direction cosines; identity is assumed.")
        auxiliaries = self._auxiliary_frames(frame.geometry)
        regions, said = roi.where_mapped(self._regions(frame, auxiliaries), {role: auxiliaries[role].pixels for role in self._roles})
        warnings.extend(said)
        index = np.unique(np.concatenate([region.voxels for region in regions]))
        places = tuple(np.searchsorted(index, region.voxels) for region in regions)
        voxels = Voxels(frame.geometry, index, tuple(regions), places)
        maps = {
            AUXILIARIES[role]: auxiliaries[role].pixels.reshape(-1)[index] * to_scan_unit(role, self.scan.larmor_hz_per_ppm) for role in self._roles
        }
        brightness = frame.pixels.reshape(-1)[index]
        warnings.extend(_without_signal(regions, [float(brightness[at].mean()) for at in places]))
        self._reference.begin(maps, brightness, places)
        self._means.begin(maps, places)
        self._screen.begin(len(index))
        self._energy, self._unexplained = np.zeros(len(index)), np.zeros(len(index), bool)
        warnings.extend(self._outside_range(maps))
        self._voxels = voxels
        return voxels

    def _auxiliary_frames(self, geometry: Geometry) -> dict[str, Frame]:
        """All maps, those that came as images first, each on the images' voxels."""
        frames = {role: map_files.from_file(role, file, geometry) for role, file in self._files.maps.items()} | self._setup.auxiliaries
        for role, auxiliary in frames.items():
            if (difference := geometry.difference(auxiliary.geometry)) is not None:
                raise InputError(f"The {role} map does not match the images: {difference}; give a map of the same geometry.")
        return frames

    def _regions(self, frame: Frame, auxiliaries: dict[str, Frame]) -> list[Region]:
        if self._setup.region is not None:
            return roi.from_frame(self._setup.region, frame.geometry, self._setup.region_names)
        if self._files.roi is not None:
            return roi.from_labels(self._files.roi, frame.geometry)
        return [roi.automatic(frame.pixels, {role: auxiliary.pixels for role, auxiliary in auxiliaries.items()})]

    def _outside_range(self, maps: dict[str, np.ndarray]) -> list[str]:
        said = []
        for name, values in maps.items():
            span = self.scan.auxiliaries[name]  # type: ignore[index]
            share = float(np.mean((values < span.lower) | (values > span.upper)))
            if share > 0:
                said.append(f"{share:.1%} of the region's {name} values lie outside {span.lower:g} .. {span.upper:g} and are clipped.")
        return said

    def _noise(self) -> noise.NoiseEstimate:
        if self.scan.noise.sigma is not None:
            return noise.NoiseEstimate(self.scan.noise.sigma, 1e4)
        return self._screen.noise(self.scan.noise.effective_voxel_fraction)

    def _decide(self, repetition: int, voxels: Voxels, left_out: str | None, warnings: tuple[str, ...]) -> Decision:
        """After an image that counts, or that was left out for a reason."""
        info, n = self._info, self._n_counted
        assert info is not None
        if left_out is None:
            said = self._judge_fit(info, voxels)
            warnings = (*warnings, said) if said else warnings
        moved = self._screen.moved
        reports = self._reporter.report(voxels.regions, voxels.places, info, moved, self._unexplained, self._of_means)
        independent = self.scan.noise.effective_voxel_fraction
        progress = [
            stopping.Region(each.name, each.fraction_converged, independent * each.n_voxels * (1 - each.fraction_moved)) for each in reports
        ]
        meets_targets = not stopping.behind(self._rule, progress)
        is_enough = meets_targets and self._stopping.would_stop_at is None and self._record.refused_at is None
        steady = [at[~moved[at]] for at in voxels.places] if not moved.all() else voxels.places
        advice = self._advisor.advise(*self._reference.for_advice(info, steady), self._estimate, repetition, is_enough)
        may_stop = meets_targets or stopping.is_futile(self._rule, advice.remaining_gain)
        told = {}
        if (may_stop or not self._fit.passed) and left_out is None:
            told = self._reference.exact.told(advice.beyond)
            self._fit = lack_of_fit.within_ranges(self._fit, told)
            self._record = lack_of_fit.judged(self._record, self._fit, n)
        veto = left_out or _misfit(self._fit, self._record) or _doubt(told) or self._screen.doubt or self._reference.veto
        self._stopping, verdict = stopping.update(self._rule, self._stopping, n, progress, veto, advice.remaining_gain)
        self._n_decisions += 1
        return Decision(
            session_id=self._setup.session_id,
            sequence_number=self._n_decisions - 1,
            repetition=repetition,
            n_images=n,
            n_planned=len(self.scan.schedule),
            action="stop" if verdict.stop else "continue",
            reason=verdict.reason,
            cause=verdict.cause,
            would_stop_at=self._stopping.would_stop_at,
            regions=reports,
            next_pulse=None if verdict.stop else _suggestion(advice),
            gains=_gains(advice),
            lack_of_fit=LackOfFit(**self._fit._replace(outside=self._record.outside, region=self._record.region)._asdict()),
            posterior_source=self._reference.source,
            audit=self._reference.audit,
            valid_until_repetition=repetition + 1,
            latency_ms=Latency(receive=0.0, update=0.0, decide=0.0, total=0.0),
            margin_ms=None,
            warnings=warnings,
        )

    def _judge_fit(self, info: Info, voxels: Voxels) -> str | None:
        """Of all voxels together and of each region, those that moved left out; a sentence if more have moved than before."""
        residual = info.nrmse.astype(float) ** 2 * self._energy
        described, n = self.scan.noise, self._n_counted
        self._unexplained = lack_of_fit.unexplained(residual, info.amplitude, self._estimate.sigma, described.discrepancy, n)
        said = self._screen.judge(self._unexplained)
        steady = ~self._screen.moved if not self._screen.moved.all() else np.ones(len(residual), bool)

        def checked(at: np.ndarray) -> lack_of_fit.Check:
            left = residual[at], info.amplitude[at], self._estimate.sigma, described.discrepancy, n
            return lack_of_fit.check(*left, self._record, n_shared=self._n_shared, independent=described.effective_voxel_fraction)

        self._fit = checked(np.flatnonzero(steady))
        for region, at in zip(voxels.regions, voxels.places, strict=True):
            if self._fit.passed and steady[at].any() and not (found := checked(at[steady[at]])).passed:
                self._fit = found._replace(region=region.name)
        self._record = lack_of_fit.judged(self._record, self._fit, n)
        return said

    def _painted(self, values: np.ndarray) -> np.ndarray:
        assert self._voxels is not None
        volume = np.full(self._voxels.geometry.shape, np.nan, np.float32)
        volume.reshape(-1)[self._voxels.index] = values
        return volume


def _without_signal(regions: Sequence[Region], means: Sequence[float]) -> list[str]:
    """A sentence on each region whose first image has no positive mean."""
    return [
        f"Region {region.name!r} holds no signal: its mean is {mean:g}; nothing can be known of it."
        for region, mean in zip(regions, means, strict=True)
        if mean <= 0
    ]


def _suggestion(advice: Advice) -> SuggestedPulse | None:
    return None if advice.block is None else SuggestedPulse(**advice.block.model_dump(), expected_gain=advice.gain)


def _gains(advice: Advice) -> Gains:
    return Gains(best=finite(advice.best_gain), scheduled=finite(advice.scheduled_gain), remaining=finite(advice.remaining_gain))


def rule_of(scan: Scan) -> stopping.Rule:
    """The scan's own stop rule."""
    first, second = scan.parameters.values()
    stop = scan.stop
    targets = (first.target_halfwidth_relative, second.target_halfwidth_relative)
    rule = stopping.Rule(targets, stop.fraction_converged, stop.n_min, stop.confirmations, stop.plateau_nat, stop.operator_confirmation)
    limits = {"beta": stopping.BETA_PRIOR_LIMIT}
    limit = limits.get(first.prior, stopping.PRIOR_LIMIT), limits.get(second.prior, stopping.PRIOR_LIMIT)
    return rule._replace(prior_sd=(first.prior_sd, second.prior_sd), prior_limit=limit)


def n_shared(scan: Scan, mapped: Sequence[str]) -> int:
    """Nuisances that are not measured voxel by voxel."""
    axes = (*forward.chain_axes(scan), *forward.tissue_axes(scan))
    lower, upper = bounds(scan.readout.offset)
    return sum(name not in mapped for name in nuisance.coefficients(axes, mapped)) + (upper > lower)


def _misfit(fit: lack_of_fit.Check, record: lack_of_fit.Record) -> str | None:
    """Why a model that does not fit, or did not at an earlier image, forbids a stop."""
    if record.refused_at is None:
        return None
    said = [] if record.region is None else [f"region {record.region!r} by itself"]
    said += [] if record.outside is None else [f"{record.outside} lies beyond the range that the scan states (widen it, or give a map)"]
    if record.region is None or fit.region is not None:  # else the figures are of all regions together, and may look well
        said += [] if fit.statistic is None else [f"residual variance {fit.statistic:.1f} x noise"]
        said += [] if fit.prediction is None else [f"prediction errors {fit.prediction:.1f} x expected"]
    return f"The model does not fit since image {record.refused_at}: {', '.join(said)}; continue the approved schedule."


def _doubt(told: dict[str, float]) -> str | None:
    """Why a stop waits for what may lie beyond its range."""
    name = lack_of_fit.doubtful(told)
    return name and f"{name} may lie beyond the range that the scan states, by {told[name]:.1f} standard deviations: a stop waits until images tell."


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {name: metadata.version(name) for name in ("scansteer", "jax", "jaxlib", "numpy")}


def _usable_roles(scan: Scan, roles: list[str]) -> tuple[list[str], list[str]]:
    """Roles of the maps that the scan can make use of, and a sentence on each of the others."""
    usable: list[str] = []
    said: list[str] = []
    for role in dict.fromkeys(roles):
        span = scan.auxiliaries.get(AUXILIARIES[role])  # type: ignore[call-overload]
        if span is None or span.lower == span.upper:
            said.append(f"The {role} map is not used: scan {scan.name!r} gives no range for {AUXILIARIES[role]}.")
        else:
            usable.append(role)
    return usable, said


def to_scan_unit(role: str, larmor_hz_per_ppm: float) -> float:
    """Factor from the unit in which a map travels (ms, Hz, relative) to that of the scan (s, ppm, relative)."""
    return {"t1": 1e-3, "t2": 1e-3, "b0": 1 / larmor_hz_per_ppm}.get(role, 1.0)
