"""A session: images of one scan in, a decision after each out. A deterministic function of the images; no sockets.

server -> session -> posterior -> stopping -> design -> Decision
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scansteer.core import lack_of_fit, noise, stopping
from scansteer.core.errors import InputError
from scansteer.core.grid_posterior import Info
from scansteer.protocols.scan import SaturationBlock, Scan
from scansteer.realtime import maps as map_files
from scansteer.realtime import roi
from scansteer.realtime.advisor import Advice, Advisor
from scansteer.realtime.encoded import Encoded
from scansteer.realtime.images import Frame, Geometry, check_usable
from scansteer.realtime.messages import (
    Decision,
    LackOfFit,
    Latency,
    Message,
    ParameterReport,
    Pulse,
    RegionReport,
    SuggestedPulse,
)
from scansteer.realtime.reference import Reference
from scansteer.realtime.roi import Region
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
        self._reference = make_engine(self.scan, [AUXILIARIES[role] for role in mapped])
        self._opening_warnings += [self._reference.said] if self._reference.said else []
        self._reference.said = None
        self._reference.reserve(self._most_voxels())
        self._advisor = Advisor(self.scan)
        self._advisor.rehearse(self._reference.auditor if isinstance(self._reference, Encoded) else self._reference)
        targets = [parameter.target_halfwidth_relative for parameter in self.scan.parameters.values()]
        stop = self.scan.stop
        self._rule = stopping.Rule((targets[0], targets[1]), stop.fraction_converged, stop.n_min, stop.confirmations, stop.plateau_nat)
        self._stopping = stopping.init()
        self._voxels: Voxels | None = None
        self._signals: list[np.ndarray] = []
        self._info: Info | None = None
        self._areas: dict[str, float | None] = {}
        self._latencies_ms: list[float] = []
        self._n_played = 0
        self._last: Decision | None = None
        self.ready_s = time.perf_counter() - started

    def absorb(self, frame: Frame, *, received_at: float, pulse: Pulse | None = None, deadline: float | None = None) -> Decision:
        """Update with one repetition's volume and decide; see `worker.Session`."""
        begun = time.perf_counter()
        check_usable(frame)
        block = self._block(frame.repetition, pulse)
        warnings = list(self._opening_warnings) if self._voxels is None else []
        voxels = self._voxels or self._begin(frame, warnings)
        if (difference := voxels.geometry.difference(frame.geometry)) is not None:
            raise InputError(f"The image of repetition {frame.repetition} does not match the first one: {difference}; it is left out.")
        self._skip_to(frame.repetition)
        self._signals.append(frame.pixels.reshape(-1)[voxels.index])
        estimate = self._noise()
        self._info = self._reference.absorb(self._signals[-1], estimate, block, first=self._n_played == 0)
        self._advisor.play(block)
        self._n_played += 1
        updated = time.perf_counter()
        warnings += [self._reference.said] if self._reference.said else []
        decision = self._decide(frame.repetition, voxels, self._info, estimate, tuple(warnings))
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

    def maps(self) -> dict[str, np.ndarray]:
        """Name -> (z, y, x) float32, NaN outside the region."""
        if self._voxels is None or self._info is None:
            raise InputError(f"Session {self._setup.session_id!r} has no maps yet: no usable image has arrived.")
        summary = self._info.summary
        values = {"nrmse": self._info.nrmse}
        for axis, name in enumerate(self.scan.parameter_names):
            values |= {f"{name}_map": summary.map[:, axis], f"{name}_lower": summary.lower[:, axis], f"{name}_upper": summary.upper[:, axis]}
        return {name: self._painted(value) for name, value in values.items()}

    def summary(self) -> Summary:
        """What is to be said of the whole session so far."""
        latencies = self._latencies_ms
        return Summary(
            scan=self.scan.name,
            n_images=len(self._signals),
            would_stop_at=self._stopping.would_stop_at,
            nrmse_median=None if self._info is None else _finite(np.median(self._info.nrmse)),
            latency_ms=LatencyPercentiles(p50=float(np.percentile(latencies, 50)), p99=float(np.percentile(latencies, 99))) if latencies else None,
            ready_s=self.ready_s,
            versions=versions(),
        )

    @property
    def n_candidates(self) -> int:
        """Pulses weighed against each other after every image."""
        return len(self._advisor.candidates)

    def close(self) -> None:
        """Let the threads go."""
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

    def _play(self, block: SaturationBlock) -> None:
        """A repetition without an image that counts."""
        self._reference.play(block, first=self._n_played == 0)
        self._advisor.play(block)
        self._n_played += 1

    def _begin(self, frame: Frame, warnings: list[str]) -> Voxels:
        """Freeze the region from the first usable image and the auxiliary maps."""
        expected = self.scan.matrix
        if expected is not None and frame.geometry.matrix != expected:
            raise InputError(f"The images have matrix {frame.geometry.matrix}, scan {self.scan.name!r} expects {expected}; choose the right scan.")
        if not frame.geometry.is_oriented:
            warnings.append("The image header has no valid direction cosines; identity is assumed.")
        auxiliaries = self._auxiliary_frames(frame.geometry)
        regions = self._regions(frame, auxiliaries)
        index = np.unique(np.concatenate([region.voxels for region in regions]))
        places = tuple(np.searchsorted(index, region.voxels) for region in regions)
        voxels = Voxels(frame.geometry, index, tuple(regions), places)
        maps = {
            AUXILIARIES[role]: auxiliaries[role].pixels.reshape(-1)[index] * _to_scan_unit(role, self.scan.larmor_hz_per_ppm) for role in self._roles
        }
        self._reference.begin(maps, frame.pixels.reshape(-1)[index])
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
        images = np.stack(self._signals)
        return noise.from_images(images @ images.T, images.shape[1], self.scan.noise.effective_voxel_fraction)

    def _decide(self, repetition: int, voxels: Voxels, info: Info, estimate: noise.NoiseEstimate, warnings: tuple[str, ...]) -> Decision:
        n = len(self._signals)
        summary = info.summary
        halfwidth = stopping.relative_halfwidth(summary.map, summary.lower, summary.upper)
        converged = stopping.converged(self._rule, halfwidth, summary.edge_mass)
        residual = info.nrmse.astype(float) ** 2 * np.sum(np.square(self._signals), axis=0)
        fit = lack_of_fit.check(residual, info.amplitude, estimate.sigma, self.scan.noise.discrepancy, n)
        veto = None if fit.passed else f"The model does not fit: residual variance {fit.statistic:.1f} x noise; continue the approved schedule."
        veto = veto or self._reference.veto
        independent = self.scan.noise.effective_voxel_fraction
        progress = [
            stopping.Region(region.name, float(np.mean(converged[at])), independent * len(at))
            for region, at in zip(voxels.regions, voxels.places, strict=True)
        ]
        advice = self._advisor.advise(*self._reference.for_advice(info, voxels.places), estimate, repetition)
        self._stopping, verdict = stopping.update(self._rule, self._stopping, n, progress, veto, advice.remaining_gain)
        reports = tuple(
            self._report(region.name, info, at, halfwidth[at], float(np.mean(converged[at])))
            for region, at in zip(voxels.regions, voxels.places, strict=True)
        )
        return Decision(
            session_id=self._setup.session_id,
            sequence_number=n - 1,
            repetition=repetition,
            n_images=n,
            n_planned=len(self.scan.schedule),
            action="stop" if verdict.stop else "continue",
            reason=verdict.reason,
            would_stop_at=self._stopping.would_stop_at,
            regions=reports,
            next_pulse=None if verdict.stop else _suggestion(advice),
            lack_of_fit=LackOfFit(statistic=fit.statistic, passed=fit.passed),
            posterior_source=self._reference.source,
            audit=self._reference.audit,
            valid_until_repetition=repetition + 1,
            latency_ms=Latency(receive=0.0, update=0.0, decide=0.0, total=0.0),
            margin_ms=None,
            warnings=warnings,
        )

    def _report(self, name: str, info: Info, at: np.ndarray, halfwidth: np.ndarray, fraction_converged: float) -> RegionReport:
        summary = info.summary
        area = _finite(np.median(summary.cr_area[at]))
        before, self._areas[name] = self._areas.get(name), area
        parameters = {
            parameter: ParameterReport(
                median=_finite(np.median(summary.map[at, axis])),
                ci_lower=_finite(np.median(summary.lower[at, axis])),
                ci_upper=_finite(np.median(summary.upper[at, axis])),
                ci_halfwidth_relative=_finite(np.median(halfwidth[:, axis])),
                fraction_prior_limited=float(np.mean(summary.edge_mass[at, axis] > stopping.PRIOR_LIMIT)),
            )
            for axis, parameter in enumerate(self.scan.parameter_names)
        }
        return RegionReport(
            name=name,
            n_voxels=len(at),
            parameters=parameters,
            cr_area_median=area,
            cr_area_p90=_finite(np.percentile(summary.cr_area[at], 90)),
            cr_shrinkage=area / before if area is not None and before else None,
            anytime_area_median=_finite(np.median(summary.anytime_area[at])),
            fraction_converged=fraction_converged,
        )

    def _painted(self, values: np.ndarray) -> np.ndarray:
        assert self._voxels is not None
        volume = np.full(self._voxels.geometry.shape, np.nan, np.float32)
        volume.reshape(-1)[self._voxels.index] = values
        return volume


def _suggestion(advice: Advice) -> SuggestedPulse | None:
    return None if advice.block is None else SuggestedPulse(**advice.block.model_dump(), expected_gain=advice.gain)


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {name: metadata.version(name) for name in ("scansteer", "jax", "jaxlib", "numpy")}


def _finite(value: float | np.floating) -> float | None:
    return float(value) if np.isfinite(value) else None


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


def _to_scan_unit(role: str, larmor_hz_per_ppm: float) -> float:
    """Factor from the unit in which a map travels (ms, Hz, relative) to that of the scan (s, ppm, relative)."""
    return {"t1": 1e-3, "t2": 1e-3, "b0": 1 / larmor_hz_per_ppm}.get(role, 1.0)
