"""The virtual sequence controller: before every repetition it asks what to do, and obeys: continue, play another pulse, stop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from scansteer.protocols.scan import SaturationBlock, Scan
from scansteer.realtime.controller import Advice
from scansteer.realtime.messages import Pulse


class Adviser(Protocol):
    """What `realtime.controller.Controller` offers a sequence."""

    def advise(self, repetition: int, deadline_s: float) -> Advice: ...

    def played(self, repetition: int, pulse: Pulse, *, next_pulse_in_ms: float | None = None) -> None: ...


@dataclass
class SequenceController:
    """Turns advice into blocks.

    A decision that is late or void (`valid_until_repetition`) reaches it as *continue*: then the approved schedule is played.
    """

    scan: Scan
    adviser: Adviser
    advice: list[Advice] = field(default_factory=list)
    """What it was told before each repetition."""

    def next_block(self, repetition: int, deadline_s: float) -> SaturationBlock | None:
        """The block to play in a repetition; none: the scan is over."""
        if repetition >= len(self.scan.schedule):
            return None
        advice = self.adviser.advise(repetition, deadline_s)
        while advice.action == "pause":
            advice = self.adviser.advise(repetition, deadline_s)
        self.advice.append(advice)
        if advice.action in ("stop", "abort"):
            return None
        if advice.pulse is not None:
            return SaturationBlock(**advice.pulse.model_dump(include={"b1_ut", "offset_ppm", "t_sat_s", "t_rec_s"}))
        return self.scan.schedule[repetition]

    def report(self, repetition: int, block: SaturationBlock) -> None:
        """Tell what was really played."""
        self.adviser.played(repetition, Pulse(**block.model_dump()))

    @property
    def stopped_by(self) -> Advice | None:
        """The advice that ended the scan before its schedule did."""
        return self.advice[-1] if self.advice and self.advice[-1].action in ("stop", "abort") else None
