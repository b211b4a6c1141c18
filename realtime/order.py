"""In which order images reach the posterior, whatever order they came in.

The rule: repetition n is given to the posterior when all its images are here and all repetitions before it have been given. A
repetition that stays away is asked for, and nothing is given in its place until its images come or the sender declares it
missing; its pulse, which was played all the same, is then still simulated. In a session whose controller reports what it
played, a repetition also waits for that report: a wrong pulse would be worse than a late decision, and late means the approved
schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

from scansteer.realtime.journal import Entry
from scansteer.realtime.messages import Pulse


@dataclass(frozen=True)
class Step:
    """What the posterior is given next."""

    repetition: int
    entries: tuple[Entry, ...]
    """The journal's records of the images, by slice; empty: declared missing."""
    pulse: Pulse | None
    """As it was played; none: as it was scheduled."""
    report_is_lost: bool = False
    """What was played was reported, perhaps, and cannot be read any more: the schedule is assumed."""


class Sequencer:
    """Puts the images of one session in order. A function of the calls made to it, in their order."""

    def __init__(self, n_slices: int = 1) -> None:
        self.n_slices = n_slices
        self.next_repetition = 0
        self.waits_for_played = False
        self._images: dict[int, dict[int, Entry]] = {}
        self._missing: set[int] = set()
        self._played: dict[int, Pulse] = {}
        self._lost_reports: set[int] = set()

    @property
    def n_waiting(self) -> int:
        """Repetitions of which something is here and which were not given yet."""
        return len(self._images)

    def add(self, repetition: int, slice_: int, entry: Entry) -> bool:
        """Take an image in; False: too late, its repetition was declared missing and decisions have gone on."""
        if repetition < self.next_repetition or repetition in self._missing:
            return False
        self._images.setdefault(repetition, {})[slice_] = entry
        return True

    def declare_missing(self, repetition: int) -> None:
        """The images of a repetition will not come. Without effect on one that was given or is complete."""
        if repetition >= self.next_repetition and not self._is_complete(repetition):
            self._missing.add(repetition)
            self._images.pop(repetition, None)

    def report_played(self, repetition: int, pulse: Pulse) -> None:
        self._played[repetition] = pulse

    def give_up_reports(self) -> None:
        """Reports come in order: those before the latest one that are not here were lost, and the schedule stands in for them."""
        self._lost_reports |= set(range(self.next_repetition, max(self._played, default=0))) - self._played.keys()

    def played(self, repetition: int) -> Pulse | None:
        return self._played.get(repetition)

    def take(self) -> list[Step]:
        """Everything that can be given now, in order."""
        steps: list[Step] = []
        while self._can_give(self.next_repetition):
            repetition = self.next_repetition
            images = self._images.pop(repetition, {})
            self._missing.discard(repetition)
            pulse = self._played.get(repetition)
            is_lost = pulse is None and repetition in self._lost_reports
            steps.append(Step(repetition, tuple(images[slice_] for slice_ in sorted(images)), pulse, is_lost))
            self.next_repetition += 1
        return steps

    def gaps(self, limit: int = 64) -> tuple[int, ...]:
        """The first repetitions that are missing although a later one is here."""
        latest = max(self._images, default=-1)
        complete = {repetition for repetition, slices in self._images.items() if len(slices) == self.n_slices}
        return tuple(sorted(set(range(self.next_repetition, latest)) - complete - self._missing)[:limit])

    def give_up_gaps(self) -> None:
        """Declare everything missing that others wait for (the session is being closed)."""
        latest = max((repetition for repetition in self._images if self._is_complete(repetition)), default=-1)
        for repetition in range(self.next_repetition, latest):
            self.declare_missing(repetition)

    def _is_complete(self, repetition: int) -> bool:
        return len(self._images.get(repetition, ())) == self.n_slices

    def _can_give(self, repetition: int) -> bool:
        if not (self._is_complete(repetition) or repetition in self._missing):
            return False
        return not self.waits_for_played or repetition in self._played or repetition in self._lost_reports
