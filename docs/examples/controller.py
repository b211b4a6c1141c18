"""A sequence controller for a Pulseq interpreter: advice before every repetition, a report after it. Adapt `play` and the limit.

    python controller.py SESSION SCAN [acting]
"""

import sys

from scansteer.protocols.scan import SaturationBlock, Scan, load
from scansteer.realtime.controller import Controller

DEADLINE_S = 0.3  # how long the sequence can wait at the end of a readout


def play(block: SaturationBlock, repetition: int) -> float:
    """Give the block to the interpreter; returns the milliseconds until the next repetition's first pulse."""
    print(f"repetition {repetition}: {block.b1_ut:g} uT at {block.offset_ppm:g} ppm for {block.t_sat_s:g} s")
    return 1000.0 * block.t_rec_s


def run(session_id: str, scan: Scan, mode: str) -> None:
    def refuse(pulse):
        return "The coil allows 5 uT." if pulse.b1_ut > 5 else None

    with Controller(session_id, mode=mode, refuse=refuse, on_command=lambda name: print("operator:", name)) as service:
        service.wait_connected(5)  # not there? then every advice below is the approved schedule
        for repetition, planned in enumerate(scan.schedule):
            advice = service.advise(repetition, DEADLINE_S)
            while advice.action == "pause":
                advice = service.advise(repetition, 1.0)
            print(advice.reason)
            if advice.action in ("stop", "abort"):
                break
            block = planned if advice.pulse is None else SaturationBlock(**advice.pulse.model_dump(exclude={"expected_gain"}))
            next_pulse_in_ms = play(block, repetition)
            service.played(repetition, block, next_pulse_in_ms=next_pulse_in_ms)


if __name__ == "__main__":
    run(sys.argv[1], load(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "advice")
