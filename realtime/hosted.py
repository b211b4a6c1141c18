"""One session as the service holds it: journal, order, decisions, and the jobs it gives to its actor.

State is a function of the journal: a live message is checked, appended, then applied; recovery applies the same messages again.
Nothing here knows of sockets.
"""

from __future__ import annotations

import logging
import math
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgpack

from scansteer.protocols.scan import Scan
from scansteer.realtime.attendance import Attendance
from scansteer.realtime.codec import Bytes, ProtocolError, decode
from scansteer.realtime.config import Limits
from scansteer.realtime.journal import Damage, Entry, Journal, JournalError, Record
from scansteer.realtime.messages import (
    Close,
    Control,
    Decision,
    Image,
    Missing,
    Open,
    Played,
    SessionMessage,
    SessionState,
    SessionStatus,
    Subscribe,
    WireMessage,
)
from scansteer.realtime.order import Sequencer
from scansteer.realtime.received import Received
from scansteer.realtime.request import Request
from scansteer.realtime.session_folder import SessionFolder
from scansteer.realtime.worker import (
    Actor,
    Decided,
    Event,
    Failed,
    Job,
    MakeSession,
    Ready,
    Setup,
    Summarised,
    Warned,
)

log = logging.getLogger("scansteer.session")

Submit = Callable[[Job, bool], None]
"""Hands a job to the worker; the flag says that it is slow."""

_MAX_WARNINGS = 20
_MAX_JOBS = 64


@dataclass
class Times:
    """When things were received (`time.perf_counter`), for latencies and margins; never part of the state."""

    received: dict[int, float] = field(default_factory=dict)
    deadline: dict[int, float] = field(default_factory=dict)


class Arrival(NamedTuple):
    """An image that was checked and is not written down yet."""

    message: Image
    request: Request
    received_at: float
    """`time.perf_counter()`."""


class HostedSession:
    """A session of the service."""

    def __init__(
        self, opening: Open, folder: SessionFolder, journal: Journal, make: MakeSession, submit: Submit, limits: Limits
    ) -> None:
        self.opening = opening
        self.folder = folder
        self.scan = Scan.model_validate(opening.scan)
        self.state: SessionState = "opening"
        self.summary: dict[str, Any] = {}
        self.decisions: list[Decision] = []
        self.warnings: list[str] = []
        self.received = Received(opening.n_slices, limits)
        self.attendance = Attendance()
        self.commands: set[str] = set()
        self._excluded: set[int] = set()
        self.paused = False
        self.is_durable = True
        """False: the disk failed in writing the journal through, and nobody knows what it holds."""
        self.advice_only = False
        """The operator has taken the acting role away, for good."""
        self.sequencer = Sequencer(opening.n_slices)
        self.times = Times()
        self._journal = journal
        self._limits = limits
        self._submit_job = submit
        self._n_jobs = 0
        self._n_builds = 0
        self._lacks_records = False
        """Its journal was damaged."""
        self._n_logged = self._n_announced = folder.count_decisions()
        setup = Setup(opening.session_id, self.scan, region_names=opening.region_names, use_encoder=opening.use_encoder)
        self._actor = Actor(setup, journal.read, make, limits.max_voxels)

    @classmethod
    def create(
        cls, opening: Open, frames: Sequence[Bytes], folder: SessionFolder, make: MakeSession, submit: Submit, limits: Limits
    ) -> HostedSession:
        """A new session: its folder, and a journal that begins with the `Open`."""
        folder.begin()
        journal = Journal.create(folder.journal)
        try:
            journal.append(frames)
        except JournalError:
            journal.close()
            raise
        session = cls(opening, folder, journal, make, submit, limits)
        session.note("opened", scan=session.scan.name)
        session._build_if_complete()
        return session

    @classmethod
    def recover(cls, folder: SessionFolder, make: MakeSession, submit: Submit, limits: Limits) -> HostedSession:
        """A session that a crash or a shutdown left open, brought to where its journal says it was.

        Raises
        ------
        JournalError, InputError
            The journal's beginning is not legible.
        """
        journal, entries, damages = Journal.reopen(folder.journal)
        if not entries or entries[0].sequence != 0:
            raise JournalError(f"The beginning of journal {folder.journal} is damaged; the session cannot go on.")
        opening, _ = decode(journal.read(entries[0]))
        if not isinstance(opening, Open):
            raise JournalError(f"Journal {folder.journal} does not begin with the opening of a session.")
        session = cls(opening, folder, journal, make, submit, limits)
        folder.mend_decisions()
        session._n_logged = session._n_announced = folder.count_decisions()
        session.note("recovered", records=len(entries))
        session._report_damage(damages)
        session._build_if_complete()
        for entry in entries[1:]:
            message, _ = decode(journal.read(entry))
            if isinstance(message, SessionMessage):
                session.apply(message, entry)
        if damages or folder.has_lost_a_tail:
            session._lacks_records = True
            session.sequencer.give_up_reports()
            session._give()
        return session

    # Messages: check, append, apply.

    def check_image(self, message: Image, body: Bytes) -> None:
        """Refuse an image that cannot belong to this session, before it is written down.

        Raises
        ------
        ProtocolError
            With the reason.
        """
        self.check_open()
        if message.role == "mask" and self.received.is_underway:
            self._check_not_busy()
        self.received.check(message, body)

    @property
    def waits_or_ended(self) -> bool:
        """Whether a controller's reports need not be asked for: images wait for them already, or never will."""
        return self.sequencer.waits_for_played or self.advice_only or self.state in ("closing", "closed")

    def check_open(self) -> None:
        if self.state in ("closing", "closed"):
            raise ProtocolError("closed", f"Session {self.opening.session_id} is closed.")

    def check_played(self, message: Played) -> None:
        self.check_open()
        known = self.sequencer.played(message.repetition)
        if known is not None and known != message.pulse:
            raise ProtocolError("conflict", f"Repetition {message.repetition} was reported as played otherwise before.")

    def check_control(self, message: Control) -> None:
        self.check_open()
        if message.command == "exclude":
            self._check_not_busy()
        latest = len(self.decisions) - 1
        if message.decision is not None and message.decision != latest:
            made = f"the latest is {latest}" if self.decisions else "there is none yet"
            raise ProtocolError("conflict", f"Decision {message.decision} cannot be confirmed: {made}.")
        if message.command == "confirm" and not self.scan.stop.operator_confirmation:
            raise ProtocolError("conflict", f"There is no stop to confirm: scan {self.scan.name!r} asks for none (stop.operator_confirmation).")

    def append(self, frames: Sequence[Bytes]) -> Entry:
        """Write a message down. Durable after `sync`."""
        self._check_room(sum(map(len, frames)))
        return self._journal.append(frames)

    def add_images(self, arrivals: Sequence[Arrival]) -> list[Entry]:
        """Write images down that were checked, all or none, and let them take effect.

        Raises
        ------
        ProtocolError, JournalError
            There is no room for them; nothing has changed.
        """
        records: list[Record] = []
        n_bytes = 0
        for message, (_, (envelope, body), _), _ in arrivals:
            records.append(Record((envelope, body), (zlib.crc32(envelope), message.crc32)))
            n_bytes += len(envelope) + len(body)
        self._check_room(n_bytes)
        entries = self._journal.append_all(records)
        for (message, _, received_at), entry in zip(arrivals, entries, strict=True):
            self.times.received[message.repetition] = received_at
            self._apply_image(message, entry)
        self._give()
        return entries

    def sync(self) -> None:
        """Make everything appended durable."""
        if self.state == "closed":
            return
        try:
            self._journal.sync()
        except JournalError:
            self.is_durable = False
            raise

    def release(self) -> None:
        """Let go of the journal, as it is; the session goes on when it is recovered."""
        if self.state != "closed":
            self._journal.close()

    def apply(self, message: WireMessage, entry: Entry) -> None:
        """Change the state as a message that is written down says. The same for a live message and for recovery."""
        match message:
            case Image():
                self._apply_image(message, entry)
            case Missing():
                for repetition in message.repetitions:
                    self.sequencer.declare_missing(repetition)
            case Played():
                self._apply_played(message)
            case Subscribe():
                self.sequencer.waits_for_played = True
            case Control():
                self._apply_control(message)
            case Close():
                self._apply_close()
            case _:
                log.warning("journal of %s: a message of kind %s has no effect", self.opening.session_id, type(message).__name__)
        self._give()

    # What the actor said.

    def take(self, event: Event) -> None:
        """Change the state as a finished job says."""
        match event:
            case Ready(build=build):
                if self.state == "opening" and build == self._n_builds:
                    self.state = "ready"
            case Failed(reason=reason):
                if self.state not in ("closing", "closed"):  # those are final: closing twice would close another session's file
                    self.state = "failed"
                self.warn(reason)
            case Warned(reason=reason):
                self.warn(reason)
            case Decided(decision=decision):
                self.decisions.append(decision)
            case Summarised(summary=summary):
                self.state, self.summary = "closed", summary
                self._log_decisions()
                self.folder.write_closed(summary)
                self._journal.close()
            case _:
                pass

    def is_news(self, decision: Decision) -> bool:
        """Whether a decision was not yet published before a restart; it is then written to decisions.jsonl.

        Known by that file: after a full disk and a restart, decisions that it does not hold are published again, with their old numbers.
        """
        if decision.sequence_number < self._n_announced:
            return False
        self._n_announced += 1
        self._log_decisions()
        return True

    def _log_decisions(self) -> None:
        """The latest decision, and before it those that a full disk has kept out of the file."""
        for decision in self.decisions[self._n_logged :]:
            if not self.folder.write_decision(decision.model_dump_json()):
                return
            self._n_logged += 1

    def job_done(self) -> None:
        """A job that was submitted has said what it had to say."""
        self._n_jobs -= 1

    def make_maps(self, requester: object) -> None:
        self._submit(lambda: self._actor.maps(requester), False)

    def status(self) -> SessionStatus:
        return SessionStatus(
            session_id=self.opening.session_id,
            state=self.state,
            n_accepted=len(self.received),
            n_decisions=len(self.decisions),
            waiting=self.sequencer.n_waiting,
            n_jobs=self._n_jobs,
            gaps=self.sequencer.gaps(),
            paused=self.paused,
            controllers=len(self.attendance.controllers),
            warnings=tuple(self.warnings),
        )

    def note(self, event: str, **details: Any) -> None:
        """Write a line into the audit log."""
        self.folder.note(event, **details)

    def warn(self, sentence: str) -> None:
        """Remember the latest warnings for the status."""
        self.warnings = [*self.warnings, sentence[:1000]][-_MAX_WARNINGS:]
        self.note("warning", reason=sentence)

    def _submit(self, job: Job, slow: bool) -> None:
        self._n_jobs += 1
        self._submit_job(lambda: self._actor.run(job), slow)

    def _check_not_busy(self) -> None:
        """Refuse what absorbs everything again while much is waiting already."""
        if self._n_jobs >= _MAX_JOBS:
            raise ProtocolError("busy", f"{self._n_jobs} jobs of session {self.opening.session_id} wait already; try again later.")

    def _check_room(self, n_bytes: int) -> None:
        if self._journal.end + n_bytes > self._limits.max_session_bytes:
            raise ProtocolError("limit", f"The journal of session {self.opening.session_id} is full.")

    # Applying.

    def _apply_image(self, message: Image, entry: Entry) -> None:
        self.received.add(message, entry)
        if message.role != "image":
            self._apply_side_image(message)
            return
        self._build()
        if not self.sequencer.add(message.repetition, message.slice, entry):
            self.warn(
                f"The image of repetition {message.repetition} came after it had been declared missing; it is kept, not used."
            )

    def _apply_side_image(self, message: Image) -> None:
        if not self.received.is_underway:
            if self._n_builds:
                self._submit_build()
            else:
                self._build_if_complete()
        elif self.received.completes_a_mask(message):
            side = self.received.side_images()
            self._submit(lambda: self._actor.change_region(side), True)

    def _apply_played(self, message: Played) -> None:
        late = message.repetition < self.sequencer.next_repetition
        if late and self.sequencer.played(message.repetition) is None and not self._as_scheduled(message):
            self._submit(lambda: self._actor.correct_pulse(message.repetition, message.pulse), True)
        self.sequencer.report_played(message.repetition, message.pulse)
        if self._lacks_records:
            self.sequencer.give_up_reports()

    def _as_scheduled(self, message: Played) -> bool:
        if message.repetition >= len(self.scan.schedule):
            return False
        block, pulse = self.scan.schedule[message.repetition], message.pulse
        return all(
            math.isclose(getattr(block, name), getattr(pulse, name), rel_tol=1e-6, abs_tol=1e-9)
            for name in type(pulse).model_fields
        )

    def _apply_control(self, message: Control) -> None:
        self.commands.add(message.command_id)
        match message.command:
            case "exclude":
                repetition = message.repetition
                if repetition is not None and repetition not in self._excluded:
                    self._excluded.add(repetition)
                    self._submit(lambda: self._actor.exclude(repetition), True)
            case "confirm":
                self._submit(lambda: self._actor.confirm_stop(message.decision), False)
            case "advice":
                self.advice_only = True
                self.sequencer.waits_for_played = False
            case "pause" | "resume":
                self.paused = message.command == "pause"
            case _:
                pass

    def _apply_close(self) -> None:
        self._build()
        self.sequencer.give_up_gaps()
        self._give()
        if self.sequencer.n_waiting:
            self.warn(f"{self.sequencer.n_waiting} repetitions were not used: incomplete, or nobody reported what was played.")
        self.state = "closing"
        self._submit(self._actor.close, False)

    def _give(self) -> None:
        """Hand everything that is in order to the posterior."""
        if self.state in ("closing", "closed"):
            return
        for step in self.sequencer.take():
            self.received.is_underway = True
            received = self.times.received.pop(step.repetition, None) or time.perf_counter()
            deadline = self.times.deadline.pop(step.repetition, None)
            self._submit(
                lambda step=step, received=received, deadline=deadline: self._actor.absorb(step, received, deadline), False
            )

    def _build_if_complete(self) -> None:
        if self.received.n_auxiliary >= self.opening.n_auxiliary:
            self._build()

    def _build(self) -> None:
        if not self._n_builds:
            self._submit_build()

    def _submit_build(self) -> None:
        """Compile with the maps and masks so far; while they come one after the other, only the last build is carried out."""
        side = self.received.side_images()
        self._n_builds += 1
        number = self._n_builds
        if self.state in ("ready", "failed") and self.is_durable:
            self.state = "opening"  # a map may be what a scan that could not be compiled had lacked
        self._submit(lambda: self._actor.build(side, number) if number == self._n_builds else [], True)

    def _report_damage(self, damages: Sequence[Damage]) -> None:
        for damage in damages:
            self.warn(
                f"{damage.n_bytes} bytes of the journal at {damage.offset} are damaged. Images among them are asked for again, the "
                "schedule stands in for lost reports of what was played; commands of the operator have to be given again."
            )


def same_opening(first: Open, second: Open) -> bool:
    """Whether two `Open` ask for the same, request ids apart."""
    return msgpack.packb(first.model_dump(exclude={"request_id"})) == msgpack.packb(second.model_dump(exclude={"request_id"}))
