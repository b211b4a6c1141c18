"""What may be played: amplitude, ranges, duty cycle, and B1rms over sliding windows that include what was already played.

A window of 10 s or 6 min may end anywhere; the mean of B1^2 over it is largest where it ends with a pulse or begins with one, so
only those places are looked at. They give the largest amplitude that every window allows to a block of one timing (t_sat, t_rec):

    b1^2 U(e) + H(e) <= W limit^2   with   U: RF time of the block, H: energy already played, within the window that ends at e

Pulse amplitudes are continuous-wave equivalents (for a shaped pulse its rms over the pulse), as in `SaturationBlock.b1_ut`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from scansteer.protocols.scan import Limits, Range, SaturationBlock, Scan, Train

WINDOWS_S = (10.0, 360.0)
"""Lengths of the sliding windows of `Limits.b1rms_10s_ut` and `Limits.b1rms_6min_ut` [s]."""
_CEILINGS = ("b1rms_10s_ut", "b1rms_6min_ut")
_RANGES = {"offset_ppm": "ppm", "t_sat_s": "s", "t_rec_s": "s"}
"""With their units."""
_ROUNDING = 1e-9


class Blocks(NamedTuple):
    """Saturation blocks as arrays, one entry each; fields as in `SaturationBlock`."""

    b1_ut: Float[np.ndarray, " block"]
    offset_ppm: Float[np.ndarray, " block"]
    t_sat_s: Float[np.ndarray, " block"]
    t_rec_s: Float[np.ndarray, " block"]

    def __len__(self) -> int:  # type: ignore[override]
        """Number of blocks, not of fields."""
        return len(self.b1_ut)

    def block(self, index: int) -> SaturationBlock:
        """One of them."""
        return SaturationBlock(**{name: float(values[index]) for name, values in self._asdict().items()})

    def take(self, which: np.ndarray) -> Blocks:
        """Some of them."""
        return Blocks(*(values[which] for values in self))

    @property
    def duration_s(self) -> Float[np.ndarray, " block"]:
        return self.t_sat_s + self.t_rec_s


class Played(NamedTuple):
    """A block and when it began (its recovery, not its RF) [s]."""

    start_s: float
    block: SaturationBlock

    @property
    def end_s(self) -> float:
        return self.start_s + self.block.duration_s


def blocks(described: Sequence[SaturationBlock]) -> Blocks:
    """The same as arrays."""
    return Blocks(*(np.array([getattr(block, name) for block in described], dtype=float) for name in Blocks._fields))


def back_to_back(described: Sequence[SaturationBlock], start_s: float = 0.0) -> list[Played]:
    """Blocks played without any pause: the densest, hence the most cautious, history where true times are not known."""
    ends = start_s + np.cumsum([0.0, *(block.duration_s for block in described)])
    return [Played(float(start), block) for start, block in zip(ends, described, strict=False)]


def allowed(
    limits: Limits, train: Train, history: Sequence[Played], candidates: Blocks, *, start_s: float | None = None
) -> Bool[np.ndarray, " block"]:
    """Which candidates may be played next.

    Parameters
    ----------
    history
        What was played so far, in order; blocks that ended more than six minutes ago do not matter.
    start_s
        When the candidate would begin [s]; none: at once, when the last block of the history has ended.

    Notes
    -----
    Windows that end before the candidate's RF begins contain nothing of it and are not asked; a block without RF passes even
    where the history alone exceeds a window: nothing better can be played.
    """
    start = start_s if start_s is not None else history[-1].end_s if history else 0.0
    timings, place = _timings(candidates)
    largest = largest_amplitude(limits, train, history, timings, start)[place]
    return within_ranges(limits, train, candidates) & ((candidates.b1_ut == 0) | (candidates.b1_ut <= largest * (1 + _ROUNDING)))


def within_ranges(limits: Limits, train: Train, candidates: Blocks) -> Bool[np.ndarray, " block"]:
    """Amplitude, offset, times and duty cycle: what does not depend on the history."""
    inside = candidates.b1_ut <= limits.b1_max_ut * (1 + _ROUNDING)
    for name in _RANGES:
        inside &= _within(getattr(limits, name), getattr(candidates, name))
    rf_time = rf_fraction(train) * candidates.t_sat_s
    return inside & ((candidates.b1_ut == 0) | (rf_time <= limits.duty_cycle_max * candidates.duration_s * (1 + _ROUNDING)))


def largest_amplitude(
    limits: Limits, train: Train, history: Sequence[Played], timings: Float[np.ndarray, "timing 2"], start_s: float
) -> Float[np.ndarray, " timing"]:
    """Largest amplitude [uT] that the windows allow to a block of each timing (t_sat, t_rec) [s] that begins at `start_s`."""
    return np.min(_largest_by_window(limits, train, history, timings, start_s), axis=1)


def _largest_by_window(
    limits: Limits, train: Train, history: Sequence[Played], timings: Float[np.ndarray, "timing 2"], start_s: float
) -> Float[np.ndarray, "timing window"]:
    played = _RfHistory.of(train, history, after_s=start_s - max(WINDOWS_S))
    windows = tuple(zip(WINDOWS_S, (getattr(limits, name) for name in _CEILINGS), strict=True))
    squares = [
        [_largest_square(played, _pulses(train, start_s + t_rec, t_sat), window, ceiling) for window, ceiling in windows] for t_sat, t_rec in timings
    ]
    return np.sqrt(np.maximum(np.reshape(squares, (-1, len(windows))), 0.0))


def check_schedule(scan: Scan) -> list[str]:
    """What of a scan's own schedule lies outside its limits: of each repetition the first such limit and the value, no full stop; empty: nothing.

    Dummies count; pauses for readouts, which would only help, do not.
    """
    dummies = (scan.schedule[0],) * scan.first_state.n_dummies
    history = back_to_back((*dummies, *scan.schedule))
    said = []
    for number, block in enumerate(scan.schedule):
        before = history[: len(dummies) + number]
        complaint = _range_left(scan.limits, scan.train, block) or _window_exceeded(scan.limits, scan.train, before, block)
        if complaint is not None:
            said.append(f"repetition {number} ({_named(block)}) {complaint}")
    return said


def rf_fraction(train: Train) -> float:
    """RF time over t_sat: a train begins and ends with a pulse."""
    return train.n_pulses / _pulse_lengths(train)


class _RfHistory(NamedTuple):
    """Energy played up to each edge of a pulse; linear in between."""

    edges_s: np.ndarray
    energy: np.ndarray
    """[uT^2 s]"""
    starts_s: np.ndarray

    @classmethod
    def of(cls, train: Train, history: Sequence[Played], after_s: float) -> _RfHistory:
        recent = [one for one in history if one.end_s > after_s and one.block.b1_ut > 0]
        if not recent:
            return cls(np.zeros(1), np.zeros(1), np.zeros(0))
        pulses = [_pulses(train, one.start_s + one.block.t_rec_s, one.block.t_sat_s) for one in recent]
        starts, ends = (np.concatenate(each) for each in zip(*pulses, strict=True))
        squares = np.repeat([one.block.b1_ut**2 for one in recent], train.n_pulses)
        edges = np.stack([starts, ends], axis=1).reshape(-1)
        steps = np.stack([np.zeros_like(starts), squares * (ends - starts)], axis=1).reshape(-1)
        return cls(edges, np.cumsum(steps), starts)

    def since(self, time_s: np.ndarray) -> np.ndarray:
        return self.energy[-1] - np.interp(time_s, self.edges_s, self.energy)


def _largest_square(played: _RfHistory, pulses: tuple[np.ndarray, np.ndarray], window: float, ceiling: float) -> float:
    """min over window ends e of (W limit^2 - H(e)) / U(e)."""
    starts, ends = pulses
    opening = np.concatenate([played.starts_s, starts]) + window
    at = np.concatenate([starts[:1], ends, opening[(opening > starts[0]) & (opening < ends[-1])]])
    edges = np.stack([starts, ends], axis=1).reshape(-1)
    rf_time = np.cumsum(np.stack([np.zeros_like(starts), ends - starts], axis=1).reshape(-1))
    own = np.interp(at, edges, rf_time) - np.interp(at - window, edges, rf_time)
    left = window * ceiling**2 - played.since(at - window)
    if np.any(left[own == 0] < 0):  # the history alone exceeds the window in which the RF would begin
        return 0.0
    return float(np.min(left[own > 0] / own[own > 0], initial=np.inf))


def _pulses(train: Train, rf_start_s: float, t_sat_s: float) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of a block's pulses [s]."""
    length = t_sat_s / _pulse_lengths(train)
    starts = rf_start_s + np.arange(train.n_pulses) * (length / train.duty_cycle)
    return starts, starts + length


def _pulse_lengths(train: Train) -> float:
    """t_sat in pulse lengths."""
    return train.n_pulses + (train.n_pulses - 1) * (1 / train.duty_cycle - 1)


def _timings(candidates: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """The distinct (t_sat, t_rec), and which of them each candidate has; as one complex number, ten times faster than by rows."""
    distinct, place = np.unique(candidates.t_sat_s + 1j * candidates.t_rec_s, return_inverse=True)
    return np.stack([distinct.real, distinct.imag], axis=1), place


def _within(box: Range, values: np.ndarray) -> np.ndarray:
    slack = _ROUNDING * max(1.0, abs(box.lower), abs(box.upper))
    return (values >= box.lower - slack) & (values <= box.upper + slack)


def _range_left(limits: Limits, train: Train, block: SaturationBlock) -> str | None:
    """The first limit, of those that do not depend on the history, that a block leaves; None where `within_ranges` has it inside."""
    if within_ranges(limits, train, blocks([block]))[0]:
        return None
    if block.b1_ut > limits.b1_max_ut * (1 + _ROUNDING):
        return f"has {block.b1_ut:g} uT, above limits.b1_max_ut = {limits.b1_max_ut:g} uT"
    for name, unit in _RANGES.items():
        box, value = getattr(limits, name), getattr(block, name)
        if not _within(box, value):
            return f"has {name} = {value:g} {unit}, outside limits.{name} = {box.lower:g} .. {box.upper:g} {unit}"
    share = rf_fraction(train) * block.t_sat_s / block.duration_s
    return f"has RF during {share:.3g} of its time, above limits.duty_cycle_max = {limits.duty_cycle_max:g}"


def _window_exceeded(limits: Limits, train: Train, before: Sequence[Played], block: SaturationBlock) -> str | None:
    """The B1rms window that a block exceeds by most; None if it keeps both."""
    start = before[-1].end_s if before else 0.0
    most = _largest_by_window(limits, train, before, np.array([[block.t_sat_s, block.t_rec_s]]), start)[0]
    tightest = int(np.argmin(most))
    if block.b1_ut == 0 or block.b1_ut <= most[tightest] * (1 + _ROUNDING):
        return None
    name = _CEILINGS[tightest]
    return f"has {block.b1_ut:g} uT, where limits.{name} = {getattr(limits, name):g} uT leaves {most[tightest]:.3g} uT after what is played before it"


def _named(block: SaturationBlock) -> str:
    return f"{block.b1_ut:g} uT at {block.offset_ppm:g} ppm for {block.t_sat_s:g} s after {block.t_rec_s:g} s"
