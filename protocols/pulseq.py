"""Pulseq files (versions 1.2 to 1.4) read as far as spins care: RF with its shapes, delays, spoilers, acquisitions, definitions.

A reader of its own, because the usual one unpacks a block pulse of seconds into millions of samples and hangs on a file that lacks its
last blank line. Compressed shapes are kept as runs of equal values, so that block pulses stay single steps.

Layer K et al. Pulseq. Magn Reson Med 77 (2017), doi:10.1002/mrm.26235; file format specification 1.2-1.4.1 (pulseq.github.io).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from scansteer.core.errors import InputError

SUPPORTED = ((1, 2), (1, 3), (1, 4))
RF_RASTER_S = 1e-6
GRADIENT_RASTER_S = 1e-5
BLOCK_RASTER_S = 1e-5
EQUAL = 1e-8
"""Values of a shape closer than this are one: compression stores rounded differences."""
SILENT_HZ = 1e-6
"""RF weaker than this is none."""
MAX_CHARACTERS = 256 * 2**20
MAX_SAMPLES = 50_000_000
MAX_STEPS = 5_000_000
"""Samples of a shape, and values in it that differ from their neighbours."""


@dataclass(frozen=True)
class Shape:
    """A shape as runs of equal values."""

    values: np.ndarray
    counts: np.ndarray

    @property
    def n_samples(self) -> int:
        return int(self.counts.sum())

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Values at sample numbers."""
        return self.values[np.searchsorted(np.cumsum(self.counts), positions, side="right")]


@dataclass(frozen=True)
class Pulse:
    """One RF event: amplitude [Hz] and phase [rad] in steps of constant RF, after a delay [s]; silence at the end is left out."""

    delay_s: float
    duration_s: np.ndarray
    amplitude_hz: np.ndarray
    shape_phase_rad: np.ndarray
    frequency_hz: float
    phase_rad: float
    dwell_s: float
    """Spacing of the shape's samples [s]."""
    key: tuple
    """Equal for pulses of the same steps."""

    @property
    def length_s(self) -> float:
        return float(self.duration_s.sum())


@dataclass(frozen=True)
class Block:
    """One block of a sequence; what it does is decided in this order: acquire, pulse, spoil, wait."""

    duration_s: float
    pulse: Pulse | None
    spoils: bool
    acquires: bool


@dataclass(frozen=True)
class Sequence:
    """What a Pulseq file plays."""

    definitions: dict[str, str]
    blocks: list[Block]
    version: tuple[int, int, int] = (1, 4, 0)

    @property
    def n_acquired(self) -> int:
        return sum(block.acquires for block in self.blocks)

    def offsets_ppm(self) -> list[float | None] | None:
        """Saturation offset of each acquisition, where the file defines one per acquisition.

        Old files leave the offset of an unsaturated image that comes first (`run_m0_scan`) out of the list: it is `M0_offset`, or none.
        """
        listed = self._numbers("offsets_ppm") or self._numbers("offset_ppm")
        if listed and len(listed) + 1 == self.n_acquired and any(self._numbers("run_m0_scan")):
            return [*(self._numbers("M0_offset")[:1] or [None]), *listed]
        return [*listed] if listed and len(listed) == self.n_acquired else None

    def _numbers(self, definition: str) -> list[float]:
        """The numbers of a definition; empty where it is absent or anything else."""
        try:
            return [_number(word) for word in self.definitions.get(definition, "").split()]
        except ValueError:
            return []


def load(path: str | Path) -> Sequence:
    """Read a .seq file.

    Raises
    ------
    InputError
        The file cannot be read or is not a sequence of a supported version; one sentence.
    """
    try:
        with Path(path).open(encoding="utf-8-sig", errors="replace") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except OSError as error:
        raise InputError(f"Cannot read sequence {path}: {error.strerror or error}.") from error
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"Sequence {path} is longer than the {MAX_CHARACTERS} characters that can be read; export fewer repetitions.")
    return parse(text, str(path))


def parse(text: str, source: str = "sequence") -> Sequence:
    """`load` on text."""
    try:
        return _Reader(_sections(text, source), source).read()
    except KeyError as error:
        missing = error.args[0]
        said = f"it refers to a block or event number {missing}, which it does not hold" if isinstance(missing, int) else f"{missing} is missing"
    except IndexError:
        said = "a line has too few numbers"
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        said = " ".join(str(error).split())[:100]
    raise InputError(f"{source} is damaged: {said}; export it again.")


def _number(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{word[:40]!r} is not a finite number")
    return value


def _integer(word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise ValueError(f"{word[:40]!r} is not a whole number") from None


def _sections(text: str, source: str) -> dict[str, list[str]]:
    """Lines of each [SECTION], without comments."""
    sections: dict[str, list[str]] = {}
    lines: list[str] | None = None
    for raw in text.splitlines():
        line = raw.split("#", 1)[0].strip()
        if match := re.fullmatch(r"\[(\w+)\]", line):
            lines = sections.setdefault(match[1].upper(), [])
        elif lines is not None:
            lines.append(line)
        elif line:
            raise InputError(f"{source} is not a Pulseq file: {line[:40]!r} stands before the first [SECTION].")
    if "VERSION" not in sections or "BLOCKS" not in sections:
        missing = "VERSION" if "VERSION" not in sections else "BLOCKS"
        raise InputError(f"{source} is not a Pulseq file: section [{missing}] is missing.")
    return sections


@dataclass
class _Reader:
    sections: dict[str, list[str]]
    source: str
    pulses: dict[int, Pulse] = field(default_factory=dict)

    def read(self) -> Sequence:
        self.version = self._version()
        self.definitions = dict(_pair(line) for line in self.sections.get("DEFINITIONS", []) if line)
        self.raster = self._raster("RadiofrequencyRasterTime", RF_RASTER_S)
        self.shapes = self._shapes()
        self.delays = {_integer(row[0]): _number(row[1]) * 1e-6 for row in self._rows("DELAYS")}
        self.adcs = {_integer(row[0]) for row in self._rows("ADC")}
        self.gradients = {**self._trapezoids(), **self._arbitrary_gradients()}
        self.rf = {_integer(row[0]): row for row in self._rows("RF")}
        blocks = [self._block(row) for row in self._rows("BLOCKS")]
        if not blocks:
            raise InputError(f"{self.source} has no blocks; nothing to simulate.")
        return Sequence(self.definitions, blocks, self.version)

    def _rows(self, name: str) -> list[list[str]]:
        return [line.split() for line in self.sections.get(name, []) if line]

    def _version(self) -> tuple[int, int, int]:
        numbers = dict(_pair(line) for line in self.sections["VERSION"] if line)
        major, minor = _integer(numbers["major"]), _integer(numbers["minor"])
        if (major, minor) not in SUPPORTED:
            raise InputError(f"{self.source} is Pulseq version {major}.{minor}; 1.2, 1.3 and 1.4 can be read, export it as one of them.")
        revision = re.match(r"\d+", numbers.get("revision", "0"))
        return major, minor, int(revision[0]) if revision else 0

    def _raster(self, name: str, default: float) -> float:
        value = float(self.definitions.get(name, default))
        if not 0 < value < math.inf:
            raise InputError(f"{self.source}: definition {name} is {value:g} s; a raster time must be positive.")
        return value

    def _shapes(self) -> dict[int, Shape]:
        shapes, number, n_samples, values = {}, None, 0, []

        def close():
            if number is not None:
                shapes[number] = self._decompress(number, np.asarray(values, float), n_samples)

        for line in self.sections.get("SHAPES", []):
            word = line.lower().split()
            if not word:
                continue
            if word[0] == "shape_id":
                close()
                number, values = _integer(word[1]), []
            elif word[0] == "num_samples":
                n_samples = _integer(word[1])
            else:
                values.append(_number(word[0]))
        close()
        return shapes

    def _decompress(self, number: int, packed: np.ndarray, n_samples: int) -> Shape:
        """Undo the run-length code of the differences: two equal numbers are followed by how many more there are."""
        if not 0 < n_samples <= MAX_SAMPLES:
            raise InputError(f"{self.source}: shape {number} has {n_samples} samples; expected 1 to {MAX_SAMPLES}.")
        if self.version >= (1, 4, 0) and packed.size == n_samples:
            return _runs(packed, np.ones(packed.size, int))
        steps, counts, place = [], [], 0
        while place < packed.size:
            if place + 2 < packed.size and packed[place] == packed[place + 1]:
                more = packed[place + 2]
                if more < 0 or more != int(more):
                    raise InputError(f"{self.source}: shape {number} is damaged: {more:g} is not a number of repetitions.")
                steps.append(packed[place])
                counts.append(int(more) + 2)
                place += 3
            else:
                steps.append(packed[place])
                counts.append(1)
                place += 1
        if sum(counts) != n_samples:
            raise InputError(f"{self.source}: shape {number} unpacks to {sum(counts):g} samples where it announces {n_samples}; the file is damaged.")
        distinct = sum(count for step, count in zip(steps, counts, strict=True) if abs(step) >= EQUAL)
        if distinct > MAX_STEPS:
            raise InputError(f"{self.source}: shape {number} has {distinct} different values; at most {MAX_STEPS} can be read.")
        return _integrate(np.asarray(steps), np.asarray(counts))

    def _trapezoids(self) -> dict[int, float]:
        """Duration of each trapezoid [s]."""
        return {_integer(row[0]): 1e-6 * sum(_duration(word) for word in row[2:6]) for row in self._rows("TRAP")}

    def _arbitrary_gradients(self) -> dict[int, float]:
        durations = {}
        raster = self._raster("GradientRasterTime", GRADIENT_RASTER_S)
        timed = self.version >= (1, 4, 0)
        for row in self._rows("GRADIENTS"):
            delay = _duration(row[4 if timed else 3]) * 1e-6 if len(row) > (4 if timed else 3) else 0.0
            time_shape = _integer(row[3]) if timed else 0
            length = float(self.shapes[time_shape].values[-1]) if time_shape else self.shapes[_integer(row[2])].n_samples
            durations[_integer(row[0])] = delay + length * raster
        return durations

    def _block(self, row: list[str]) -> Block:
        first, rf, gx, gy, gz, adc = (_integer(row[column]) for column in range(1, 7))
        gradients = [self.gradients[number] for number in (gx, gy, gz) if number]
        pulse = self._pulse(rf) if rf else None
        if self.version >= (1, 4, 0):
            duration = first * self._raster("BlockDurationRaster", BLOCK_RASTER_S)
        else:
            ends = [self.delays[first] if first else 0.0, *gradients]
            duration = max(ends + ([self._end(rf)] if pulse else []))
        if adc and adc not in self.adcs:
            raise InputError(f"{self.source}: block {row[0]} names acquisition {adc}, which is not in section [ADC].")
        if duration < 0:
            raise InputError(f"{self.source}: block {row[0]} lasts {duration:g} s; times must not be negative.")
        return Block(duration, pulse, spoils=gz != 0, acquires=adc != 0)

    def _end(self, number: int) -> float:
        """End of an RF event with its trailing zeros [s], versions before 1.4."""
        row = self.rf[number]
        return _duration(row[4]) * 1e-6 + self.shapes[_integer(row[2])].n_samples * self.raster

    def _pulse(self, number: int) -> Pulse:
        if number not in self.pulses:
            if number not in self.rf:
                raise InputError(f"{self.source}: a block names RF event {number}, which is not in section [RF].")
            self.pulses[number] = self._read_pulse(self.rf[number])
        return self.pulses[number]

    def _read_pulse(self, row: list[str]) -> Pulse:
        timed = self.version >= (1, 4, 0)
        amplitude, magnitude, phase = _number(row[1]), _integer(row[2]), _integer(row[3])
        time = _integer(row[4]) if timed else 0
        delay, frequency, offset = (_number(row[column + timed]) for column in (4, 5, 6))
        if delay < 0:
            raise InputError(f"{self.source}: RF event {row[0]} has a delay of {delay:g} us; times must not be negative.")
        duration, size, angle, dwell = self._steps(magnitude, phase, time)
        sounding = np.flatnonzero(np.abs(amplitude * size) > SILENT_HZ)
        stop = sounding[-1] + 1 if sounding.size else 0
        key = (amplitude, magnitude, phase, time)
        return Pulse(delay * 1e-6, duration[:stop], amplitude * size[:stop], angle[:stop], frequency, offset, dwell, key)

    def _steps(self, magnitude: int, phase: int, time: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """Durations, relative amplitudes and phases [rad] of the steps of constant RF, and the dwell."""
        size = self.shapes[magnitude]
        angle = self.shapes[phase] if phase else Shape(np.zeros(1), np.array([size.n_samples]))
        dwell = self.raster
        if time:
            size, angle, dwell = self._timed(size, angle, self.shapes[time])
        if size.n_samples != angle.n_samples:
            raise InputError(f"{self.source}: shapes {magnitude} and {phase} of one RF event differ in length.")
        ends = np.union1d(np.cumsum(size.counts), np.cumsum(angle.counts))
        starts = np.concatenate([[0], ends[:-1]])
        values, turns = size.at(starts), angle.at(starts)
        return (ends - starts) * dwell, values, 2 * np.pi * turns, dwell

    def _timed(self, size: Shape, angle: Shape, time: Shape) -> tuple[Shape, Shape, float]:
        """Shapes given at times of their own: held where these are the centres of equal intervals, else joined by straight lines."""
        if not time.n_samples == size.n_samples == angle.n_samples:
            raise InputError(f"{self.source}: a time shape has {time.n_samples} samples and its RF shape {size.n_samples}; they must agree.")
        times = time.values * self.raster
        if times.size < 2 or times.size < time.n_samples or np.any(np.diff(times) <= 0) or times[0] < 0:
            raise InputError(f"{self.source}: a time shape must rise from 0 or later and have two samples at least.")
        values, turns = np.repeat(size.values, size.counts), np.repeat(angle.values, angle.counts)
        dwell = times[1] - times[0]
        if np.allclose(times, dwell * (np.arange(times.size) + 0.5), rtol=0, atol=1e-3 * dwell):
            return size, angle, dwell
        if np.ptp(values) < EQUAL and np.ptp(turns) < EQUAL:
            one = np.array([1])
            lead = round(times[0] / self.raster)
            if lead == 0:
                return Shape(values[:1], one), Shape(turns[:1], one), float(times[-1])
        if times[-1] > MAX_STEPS * self.raster:
            raise InputError(f"{self.source}: an RF pulse with a time shape lasts {times[-1]:g} s; {MAX_STEPS * self.raster:g} s can be read.")
        centres = self.raster * (np.arange(max(round(times[-1] / self.raster), 1)) + 0.5)
        inside = np.interp(centres, times, values, left=0.0, right=0.0), np.interp(centres, times, turns)
        ones = np.ones(centres.size, int)
        return _runs(inside[0], ones), _runs(inside[1], ones), self.raster


def _duration(word: str) -> float:
    value = _number(word)
    if value < 0:
        raise ValueError(f"a time of {word} us is negative")
    return value


def _pair(line: str) -> tuple[str, str]:
    name, _, value = line.partition(" ")
    return name.strip(), value.strip()


def _integrate(steps: np.ndarray, counts: np.ndarray) -> Shape:
    """Runs of values from runs of differences."""
    ends = np.cumsum(steps * counts)
    flat = np.abs(steps) < EQUAL
    values, lengths = [], []
    for step, count, end, still in zip(steps, counts, ends, flat, strict=True):
        values.append([end] if still else end - step * np.arange(count - 1, -1, -1))
        lengths.append([count] if still else np.ones(count, int))
    return _runs(np.concatenate(values), np.concatenate(lengths).astype(int))


def _runs(values: np.ndarray, counts: np.ndarray) -> Shape:
    """Join neighbours of equal value."""
    values = np.asarray(values, float)
    starts = np.concatenate([[True], np.abs(np.diff(values)) > EQUAL])
    first = np.flatnonzero(starts)
    return Shape(values[first], np.add.reduceat(counts, first))
