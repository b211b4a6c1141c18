"""A schedule, or one suggested pulse, as a Pulseq file (version 1.4.1): preparation, spoiler and pseudo-acquisition, as pulseq-cest has it.

Needs the extra `pulseq`. The readout is the site's own; it follows where the file has its acquisition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scansteer.core.errors import InputError
from scansteer.core.signal import GAUSS_SIGMA
from scansteer.protocols import limits
from scansteer.protocols.scan import GAMMA_RAD_PER_S_PER_T, SaturationBlock, Scan

GAMMA_HZ_PER_UT = GAMMA_RAD_PER_S_PER_T / (2 * math.pi) * 1e-6
SPOILER_HZ_PER_M, SPOILER_S = 1.0e6, 5.5e-3
TIP_S = 1e-3
RASTER_S = 1e-5


def write_schedule(scan: Scan, path: str | Path, blocks: Sequence[SaturationBlock] | None = None) -> None:
    """Write the scan's schedule, or `blocks` of it, e.g. one suggested pulse.

    The recovery of the first block is written too: a sequence starts from rest.

    Raises
    ------
    InputError
        A block is outside the scan's limits of amplitude, offset, times or duty cycle, pypulseq is not installed, or the file cannot be written.
    """
    pulseq = _pypulseq()
    blocks = scan.schedule if blocks is None else blocks
    system = pulseq.Opts(max_grad=40, grad_unit="mT/m", max_slew=130, slew_unit="T/m/s", rf_dead_time=0, rf_ringdown_time=0)
    sequence = pulseq.Sequence(system=system)
    _check(scan, blocks)
    for block in blocks:
        _add(pulseq, sequence, system, scan, block)
    for name, value in _definitions(scan, blocks).items():
        sequence.set_definition(name, value)
    try:
        sequence.write(str(path), v141_compat=True)
    except OSError as error:
        raise InputError(f"Cannot write sequence {path}: {error.strerror or error}.") from error


def write_pulse(scan: Scan, block: SaturationBlock, path: str | Path) -> None:
    """Write one block, e.g. the service's suggestion."""
    write_schedule(scan, path, (block,))


def _pypulseq() -> Any:
    try:
        import pypulseq
    except ImportError as error:
        raise InputError("Writing Pulseq files needs pypulseq: install scansteer[pulseq].") from error
    return pypulseq


def _check(scan: Scan, blocks: Sequence[SaturationBlock]) -> None:
    inside = limits.within_ranges(scan.limits, scan.train, limits.blocks(blocks))
    for number in np.flatnonzero(~inside).tolist():
        block = blocks[number]
        raise InputError(
            f"Block {number} ({block.b1_ut:g} uT at {block.offset_ppm:g} ppm for {block.t_sat_s:g} s after {block.t_rec_s:g} s) lies outside what "
            f"scan {scan.name!r} allows (limits: amplitude, offset, times, duty cycle); change the block or the limits."
        )


def _definitions(scan: Scan, blocks: Sequence[SaturationBlock]) -> dict[str, Any]:
    return {
        "B0": scan.field_t,
        "offsets_ppm": [block.offset_ppm for block in blocks],
        "B1cwpe": [block.b1_ut for block in blocks],
        "Tsat": [block.t_sat_s for block in blocks],
        "Trec": [block.t_rec_s for block in blocks],
        "num_meas": len(blocks),
        "n_pulses": scan.train.n_pulses,
        "DCsat": scan.train.duty_cycle,
        "Name": scan.name,
    }


def _add(pulseq: Any, sequence: Any, system: Any, scan: Scan, block: SaturationBlock) -> None:
    if block.t_rec_s > 0:
        sequence.add_block(pulseq.make_delay(_on_raster(block.t_rec_s)))
    if block.b1_ut > 0 and block.t_sat_s > 0:
        _add_train(pulseq, sequence, system, scan, block)
    elif block.t_sat_s > 0:
        sequence.add_block(pulseq.make_delay(_on_raster(block.t_sat_s)))
    sequence.add_block(pulseq.make_trapezoid(channel="z", system=system, amplitude=SPOILER_HZ_PER_M, duration=SPOILER_S))
    sequence.add_block(pulseq.make_adc(num_samples=1, duration=1e-3, system=system))


def _add_train(pulseq: Any, sequence: Any, system: Any, scan: Scan, block: SaturationBlock) -> None:
    n, duty = scan.train.n_pulses, scan.train.duty_cycle
    length = _on_raster(block.t_sat_s / (n + (n - 1) * (1 / duty - 1)))
    pause = _on_raster((block.t_sat_s - n * length) / max(n - 1, 1))
    amplitude, offset = block.b1_ut * GAMMA_HZ_PER_UT, block.offset_ppm * scan.larmor_hz_per_ppm
    tip = math.atan2(amplitude, abs(offset)) * (-1 if offset < 0 else 1)
    phase = 0.0
    for pulse in range(n):
        if scan.train.spin_lock:
            _add_tip(pulseq, sequence, system, scan, tip, phase + math.pi / 2)
        sequence.add_block(_saturation(pulseq, system, scan, amplitude, length, offset, phase))
        phase = math.fmod(phase + 2 * math.pi * offset * length, 2 * math.pi)
        if scan.train.spin_lock:
            _add_tip(pulseq, sequence, system, scan, -tip, phase + math.pi / 2)
        if pulse < n - 1 and pause > 0:
            sequence.add_block(pulseq.make_delay(pause))


def _add_tip(pulseq: Any, sequence: Any, system: Any, scan: Scan, angle: float, phase: float) -> None:
    """Turn from z towards the phase axis: RF a quarter turn ahead of it turns the other way round. As short as its limit of amplitude allows."""
    shortest = abs(angle) / (2 * math.pi * GAMMA_HZ_PER_UT * scan.limits.b1_max_ut)
    length = max(TIP_S, math.ceil(shortest / RASTER_S) * RASTER_S)
    turned = _turn(phase if angle < 0 else phase + math.pi)
    pulse = pulseq.make_block_pulse(flip_angle=abs(angle), duration=length, phase_offset=turned, system=system, use="preparation")
    sequence.add_block(pulse)


def _saturation(pulseq: Any, system: Any, scan: Scan, amplitude: float, length: float, offset: float, phase: float) -> Any:
    common = {"freq_offset": offset, "phase_offset": _turn(phase), "system": system, "use": "saturation"}
    if scan.train.shape == "gauss":
        place = (np.arange(round(length / RASTER_S)) + 0.5) / round(length / RASTER_S) - 0.5
        envelope = np.exp(-0.5 * (place / GAUSS_SIGMA) ** 2)
        signal = amplitude * envelope / np.sqrt(np.mean(envelope**2))
        return pulseq.make_arbitrary_rf(signal=signal, flip_angle=1.0, no_signal_scaling=True, dwell=RASTER_S, return_gz=False, **common)
    return pulseq.make_block_pulse(flip_angle=2 * math.pi * amplitude * length, duration=length, **common)


def _turn(phase: float) -> float:
    return phase % (2 * math.pi)


def _on_raster(time: float) -> float:
    return round(time / RASTER_S) * RASTER_S
