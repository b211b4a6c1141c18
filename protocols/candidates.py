"""The pulses among which the next one is chosen: a fixed lattice over what the scan's limits allow, the schedule aside."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
from jaxtyping import Float

from scansteer.protocols.limits import Blocks, allowed, within_ranges
from scansteer.protocols.scan import Range, Scan

AT_LEAST = 500
"""Pulses to choose from, whatever the limits leave free."""
NEAR_WATER_PPM = 1.0
"""Closer to water than this nothing is offered: its direct saturation tells of B0 and T2, and drowns the rest."""
N_PROBE_OFFSETS, N_PROBE_AMPLITUDES = 6, 6
"""Of the probes: offsets on each side of water, and amplitudes."""
_LEVELS = {"b1_ut": 10, "offset_ppm": 6, "t_sat_s": 3, "t_rec_s": 3}
_LARGEST_LATTICE = 20_000


def candidates(scan: Scan, at_least: int = AT_LEAST) -> Blocks:
    """Amplitudes x offsets x saturation times x recoveries within the limits, and images without saturation.

    The unsaturated ones (b1 = 0) come first, one per recovery, with the shortest t_sat. Amplitudes are denser where they are
    small (power 1.5), times are even in the logarithm; offsets are the ends of the range, the solutes' shifts and their mirror
    images, then the middle of the widest gap, again and again, but none close to water. Where a range has no width the others are
    cut finer, until there are `at_least` (fewer if the duty cycle leaves next to no RF, none where every pulse would last no time). Deterministic.
    """
    levels = dict(_LEVELS)
    free = ["b1_ut", *(name for name in ("t_sat_s", "t_rec_s", "offset_ppm") if _is_wide(getattr(scan.limits, name)))]
    levels |= dict.fromkeys(set(levels) - set(free), 1)
    turn = 0
    while len(made := _lattice(scan, levels)) < at_least and math.prod(levels.values()) < _LARGEST_LATTICE:
        name = free[turn % len(free)]
        levels[name] = -(-5 * levels[name] // 4)
        turn += 1
    return made


def what_is_lacking(scan: Scan) -> str | None:
    """Which pulses no suggestion can be, even before anything was played, as half a sentence; none where all is well."""
    offered = candidates(scan)
    if not len(offered):
        return "leave no pulse at all that lasts any time"
    is_pulse = allowed(scan.limits, scan.train, [], offered) & (offered.b1_ut > 0) & (offered.t_sat_s > 0)
    return None if is_pulse.any() else "leave no pulse that saturates, only images without saturation"


def probes(scan: Scan) -> Blocks:
    """Pulses that put the description of the scan to the test: on either side of water, at offsets even in the logarithm, long and dense.

    A pool that the description lacks, a field that is off or another lineshape shows at offsets and amplitudes where nothing was played yet.
    Where the limits leave none, an image without saturation; none at all where they do not leave that either.
    """
    limits = scan.limits
    t_sat = limits.t_sat_s.upper
    t_rec = np.clip(t_sat * (1 / limits.duty_cycle_max - 1), limits.t_rec_s.lower, limits.t_rec_s.upper)
    amplitudes = limits.b1_max_ut * np.arange(1, N_PROBE_AMPLITUDES + 1) / N_PROBE_AMPLITUDES
    rows = np.array([(b1, offset, t_sat, t_rec) for b1 in amplitudes for offset in _both_sides(limits.offset_ppm)])
    made = Blocks(*rows.T)
    is_inside = within_ranges(limits, scan.train, made) & (made.duration_s > 0)
    if is_inside.any():
        return made.take(is_inside)
    offered = candidates(scan)
    return offered.take(np.arange(min(1, len(offered))))


def _both_sides(box: Range) -> np.ndarray:
    """Offsets from the one nearest to water, but not too near, to the end of the range; on its negative side, then on its positive one."""
    sides = [(-1.0, -box.upper, -box.lower), (1.0, box.lower, box.upper)]
    made = [sign * np.geomspace(max(near, NEAR_WATER_PPM), far, N_PROBE_OFFSETS) for sign, near, far in sides if far > NEAR_WATER_PPM]
    return np.concatenate(made) if made else np.array([box.lower, box.upper])


def distances(blocks: Blocks, played: Blocks, b1_max_ut: float) -> Float[np.ndarray, "block played"]:
    """How unlike pulses are: octaves of offset, 1 for the other side of water, half of the range of amplitudes, a quarter of the log of t_sat."""
    one, other = (Blocks(*(np.reshape(each, shape) for each in which)) for which, shape in ((blocks, (-1, 1)), (played, (1, -1))))
    octaves = np.abs(np.log2(_apart(one.offset_ppm)) - np.log2(_apart(other.offset_ppm)))
    sides = np.sign(one.offset_ppm) != np.sign(other.offset_ppm)
    durations = np.abs(np.log(_apart(one.t_sat_s)) - np.log(_apart(other.t_sat_s)))
    return octaves + sides + 0.5 * np.abs(one.b1_ut - other.b1_ut) / b1_max_ut + 0.25 * durations


def _apart(value: np.ndarray) -> np.ndarray:
    """Its size, not too small for a logarithm."""
    return np.maximum(np.abs(value), 0.1)


def _lattice(scan: Scan, levels: dict[str, int]) -> Blocks:
    limits = scan.limits
    t_sat, t_rec = _times(limits.t_sat_s, levels["t_sat_s"]), _times(limits.t_rec_s, levels["t_rec_s"])
    offsets = _offsets(scan, levels["offset_ppm"])
    n = levels["b1_ut"]
    amplitudes = limits.b1_max_ut * (np.arange(1, n + 1) / n) ** 1.5
    unsaturated = [(0.0, offsets[0], t_sat[0], recovery) for recovery in t_rec]
    rows = np.array([*unsaturated, *product(amplitudes, offsets, t_sat, t_rec)])
    made = Blocks(*rows.T)
    return made.take(within_ranges(limits, scan.train, made) & (made.duration_s > 0))


def _is_wide(box: Range) -> bool:
    return box.upper > box.lower


def _times(box: Range, n: int) -> np.ndarray:
    if n == 1 or not _is_wide(box):
        return np.array([box.upper])
    spaced = np.geomspace if box.lower > 0 else np.linspace
    return np.clip(spaced(box.lower, box.upper, n), box.lower, box.upper)


def _offsets(scan: Scan, n: int) -> np.ndarray:
    box = scan.limits.offset_ppm
    shifts = [sign * pool.offset_ppm for pool in scan.pools if pool.kind == "solute" for sign in (1, -1)]
    chosen = sorted({box.lower, box.upper, *(shift for shift in shifts if box.lower <= shift <= box.upper)})
    while len(chosen) < n and _is_wide(box):
        middles = 0.5 * (np.array(chosen[1:]) + chosen[:-1])
        gaps = np.where(np.abs(middles) < NEAR_WATER_PPM, 0.0, np.diff(chosen))
        if not gaps.any():
            break
        chosen.insert(int(np.argmax(gaps)) + 1, float(middles[np.argmax(gaps)]))
    return np.array(chosen)


def coordinates(scan: Scan, blocks: Blocks) -> Float[np.ndarray, "block 4"]:
    """Where pulses lie within the limits, each coordinate 0 .. 1; images without saturation differ by their recovery only."""
    limits = scan.limits
    boxes = (Range(lower=0.0, upper=limits.b1_max_ut), limits.offset_ppm, limits.t_sat_s, limits.t_rec_s)
    widths = np.array([box.upper - box.lower if _is_wide(box) else 1.0 for box in boxes])
    placed = (np.stack(blocks, axis=1) - [box.lower for box in boxes]) / widths
    placed[blocks.b1_ut == 0, :3] = -1.0
    return placed
