"""One session as the service holds it: journal, order, decisions, and the jobs it gives to its actor.

State is a function of the journal: a live message is checked, appended, then applied; recovery applies the same messages again.
Nothing here knows of sockets.
"""

from __future__ import annotations

import json
import logging
import math
import os
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np

from scansteer.core.errors import InputError
from scansteer.protocols.scan import Scan
from scansteer.realtime.codec import Bytes, ProtocolError, decode
from scansteer.realtime.config import Limits
from scansteer.realtime.images import HEADER_BYTES, MAX_META_BYTES, decode_frame
from scansteer.realtime.journal import Damage, Entry, Journal, JournalError
from scansteer.realtime.messages import (
    Accepted,
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
from scansteer.realtime.worker import (
    Actor,
    Decided,
    Event,
    Failed,
    Job,
    MakeSession,
    Ready,
    Setup,
    SideImages,
    Summarised,
    Warned,
)

log = logging.getLogger("scansteer.session")

Submit = Callable[[Job, bool], None]
"""Hands a job to the worker; the flag says that it is slow."""

_BYTES_PER_VALUE = {1: (2,), 2: (2,), 3: (4,), 4: (4, 8), 5: (4,), 6: (8,), 7: (8,), 8: (16,)}
"""By MRD data type; 4 is int32 in the standard, int64 in ismrmrd-python."""
_MAX_WARNINGS = 20

IMAGE_FACTS = struct.Struct("<2xH12x3H12xH62xH4x2H20xH68xQ")
"""Of an MRD image: data_type, matrix x, y, z, channels, slice, repetition, set, image_series_index, length of Meta. The layout is
`ismrmrd.ImageHeader`'s (a test compares); read in one go because this is done for every image while the others wait."""


class ImageRecord(NamedTuple):
    """An accepted image, remembered to recognise it when it comes again."""

    sequence: int
    crc32: int


@dataclass
class Folder:
    """Where a session lies on disk."""

    path: Path

    @property
    def journal(self) -> Path:
        return self.path / "journal"

    @property
    def decisions(self) -> Path:
        return self.path / "decisions.jsonl"

    @property
    def audit(self) -> Path:
        return self.path / "audit.jsonl"

    @property
    def closed(self) -> Path:
        return self.path / "closed.json"


@dataclass
class Times:
    """When things were received (`time.perf_counter`), for latencies and margins; never part of the state."""

    received: dict[int, float] = field(default_factory=dict)
    deadline: dict[int, float] = field(default_factory=dict)


class HostedSession:
    """A session of the service."""

    def __init__(
        self, opening: Open, folder: Folder, journal: Journal, make: MakeSession, submit: Submit, limits: Limits
    ) -> None:
        self.opening = opening
        self.folder = folder
        self.scan = Scan.model_validate(opening.scan)
        self.state: SessionState = "opening"
        self.reason = ""
        self.summary: dict[str, Any] = {}
        self.decisions: list[Decision] = []
        self.warnings: list[str] = []
        self.images: dict[tuple[str, int, int, int, int], ImageRecord] = {}
        self.commands: set[str] = set()
        self.paused = False
        self.advice_only = False
        """The operator has taken the acting role away, for good."""
        self.sequencer = Sequencer(opening.n_slices)
        self.times = Times()
        self._journal = journal
        self._limits = limits
        self._submit_job = submit
        self._n_jobs = 0
        self._side: dict[str, dict[int, Entry]] = {}
        self._mask_count: dict[tuple[int, int, int], int] = {}
        self._n_auxiliary = 0
        self._built = False
        self._given = False
        self._dynamic: tuple[int, int] | None = None
        self._n_logged = count_lines(folder.decisions)
        setup = Setup(opening.session_id, self.scan, region_names=opening.region_names, use_encoder=opening.use_encoder)
        self._actor = Actor(setup, journal.read, make, limits.max_voxels)

    @classmethod
    def create(
        cls, opening: Open, frames: Sequence[Bytes], folder: Folder, make: MakeSession, submit: Submit, limits: Limits
    ) -> HostedSession:
        """A new session: its folder, and a journal that begins with the `Open`."""
        try:
            folder.path.mkdir(mode=0o700)
        except OSError as error:
            raise JournalError(f"Cannot make the folder of session {opening.session_id}: {error.strerror}.") from error
        journal = Journal.create(folder.journal)
        session = cls(opening, folder, journal, make, submit, limits)
        journal.append(frames)
        session.note("opened", scan=session.scan.name)
        session._build_if_complete()
        return session

    @classmethod
    def recover(cls, folder: Folder, make: MakeSession, submit: Submit, limits: Limits) -> HostedSession:
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
        trim_torn_line(folder.decisions)
        session._n_logged = count_lines(folder.decisions)
        session.note("recovered", records=len(entries))
        session._report_damage(damages)
        session._build_if_complete()
        for entry in entries[1:]:
            message, _ = decode(journal.read(entry))
            if isinstance(message, SessionMessage):
                session.apply(message, entry)
        return session

    # Messages: check, append, apply.

    def find_image(self, message: Image) -> Accepted | None:
        """The answer to an image that was accepted before; none if it is new.

        Raises
        ------
        ProtocolError
            Another image was accepted under the same identity.
        """
        known = self.images.get(_identity(message))
        if known is None:
            return None
        if known.crc32 != message.crc32:
            raise ProtocolError(
                "conflict",
                f"Another image of repetition {message.repetition} (series {message.series}, slice {message.slice}, "
                f"set {message.set}) was accepted before; an image is never replaced.",
            )
        return Accepted(
            session_id=message.session_id, sequence_number=known.sequence, repetition=message.repetition, duplicate=True
        )

    def check_image(self, message: Image, body: Bytes) -> None:
        """Refuse an image that cannot belong to this session, before it is written down.

        Raises
        ------
        ProtocolError
            With the reason.
        """
        self.check_open()
        check_body(message, body, self._limits)
        if message.role != "image":
            self._check_side_image(message, body)
            return
        if message.repetition >= self._limits.max_repetitions:
            raise ProtocolError(
                "limit", f"Repetition {message.repetition} is beyond the {self._limits.max_repetitions} accepted."
            )
        if message.slice >= self.opening.n_slices:
            raise ProtocolError(
                "conflict", f"Slice {message.slice} of a session that was opened with {self.opening.n_slices} slices."
            )
        if self._dynamic is not None and self._dynamic != (message.series, message.set):
            series, set_ = self._dynamic
            raise ProtocolError(
                "conflict", f"Series {message.series}, set {message.set} are not this session's (series {series}, set {set_})."
            )

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

    def append(self, frames: Sequence[Bytes], body_crc32: int | None = None) -> Entry:
        """Write a message down; the checksum of its body, if it was computed already. Durable after `sync`."""
        if self._journal.end + sum(map(len, frames)) > self._limits.max_session_bytes:
            raise ProtocolError("limit", f"The journal of session {self.opening.session_id} is full.")
        return self._journal.append(frames, body_crc32)

    def sync(self) -> None:
        """Make everything appended durable."""
        if self.state != "closed":
            self._journal.sync()

    def release(self) -> None:
        """Let go of the journal, as it is; the session goes on when it is recovered."""
        if self.state != "closed":
            self._journal.close()

    def apply(self, message: WireMessage, entry: Entry) -> None:
        """Change the state as a message that is written down says. The same for a live message and for recovery."""
        match message:
            case Image(role="image"):
                self._apply_image(message, entry)
            case Image():
                self._apply_side_image(message, entry)
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
            case Ready():
                if self.state == "opening":
                    self.state = "ready"
            case Failed(reason=reason):
                self.state, self.reason = "failed", reason
                self.warn(reason)
            case Warned(reason=reason):
                self.warn(reason)
            case Decided(decision=decision):
                self.decisions.append(decision)
            case Summarised(summary=summary):
                self.state, self.summary = "closed", summary
                self._write_closed(summary)
                self._journal.close()
            case _:
                pass

    def is_news(self, decision: Decision) -> bool:
        """Whether a decision was not yet published before a restart; it is then written to decisions.jsonl."""
        if decision.sequence_number < self._n_logged:
            return False
        self._append_line(self.folder.decisions, decision.model_dump_json())
        self._n_logged += 1
        return True

    def job_done(self) -> None:
        """A job that was submitted has said what it had to say."""
        self._n_jobs -= 1

    def make_maps(self, requester: object) -> None:
        self._submit(lambda: self._actor.maps(requester), False)

    def status(self, n_controllers: int) -> SessionStatus:
        return SessionStatus(
            session_id=self.opening.session_id,
            state=self.state,
            n_accepted=sum(key[0] == "image" for key in self.images),
            n_decisions=len(self.decisions),
            waiting=self.sequencer.n_waiting,
            n_jobs=self._n_jobs,
            gaps=self.sequencer.gaps(),
            paused=self.paused,
            controllers=n_controllers,
            warnings=tuple(self.warnings),
        )

    def note(self, event: str, **details: Any) -> None:
        """Write a line into the audit log."""
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **details}
        self._append_line(self.folder.audit, json.dumps(line))

    def warn(self, sentence: str) -> None:
        """Remember the latest warnings for the status."""
        self.warnings = [*self.warnings, sentence[:1000]][-_MAX_WARNINGS:]
        self.note("warning", reason=sentence)

    def _submit(self, job: Job, slow: bool) -> None:
        self._n_jobs += 1
        self._submit_job(job, slow)

    # Applying.

    def _apply_image(self, message: Image, entry: Entry) -> None:
        self.images[_identity(message)] = ImageRecord(entry.sequence, message.crc32)
        self._dynamic = self._dynamic or (message.series, message.set)
        self._build()
        if not self.sequencer.add(message.repetition, message.slice, entry):
            self.warn(
                f"The image of repetition {message.repetition} came after it had been declared missing; it is kept, not used."
            )

    def _apply_side_image(self, message: Image, entry: Entry) -> None:
        self.images[_identity(message)] = ImageRecord(entry.sequence, message.crc32)
        self._side.setdefault(message.role, {})[message.slice] = entry
        self._n_auxiliary += 1
        if self._given:
            self._change_region(message)
        elif self._built:
            self._submit_build()
        else:
            self._build_if_complete()

    def _change_region(self, message: Image) -> None:
        """A new mask takes effect when all its slices are here."""
        key = (message.series, message.repetition, message.set)
        self._mask_count[key] = self._mask_count.get(key, 0) + 1
        if self._mask_count[key] == self.opening.n_slices:
            side = self._side_images()
            self._submit(lambda: self._actor.change_region(side), True)

    def _apply_played(self, message: Played) -> None:
        late = message.repetition < self.sequencer.next_repetition
        if late and self.sequencer.played(message.repetition) is None and not self._as_scheduled(message):
            self._submit(lambda: self._actor.correct_pulse(message.repetition, message.pulse), True)
        self.sequencer.report_played(message.repetition, message.pulse)

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
                if repetition is not None:
                    self._submit(lambda: self._actor.exclude(repetition), True)
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
            self._given = True
            received = self.times.received.pop(step.repetition, None) or time.perf_counter()
            deadline = self.times.deadline.pop(step.repetition, None)
            self._submit(
                lambda step=step, received=received, deadline=deadline: self._actor.absorb(step, received, deadline), False
            )

    def _build_if_complete(self) -> None:
        if self._n_auxiliary >= self.opening.n_auxiliary:
            self._build()

    def _build(self) -> None:
        if not self._built:
            self._built = True
            self._submit_build()

    def _submit_build(self) -> None:
        side = self._side_images()
        self._submit(lambda: self._actor.build(side), True)

    def _side_images(self) -> SideImages:
        return {role: tuple(slices[index] for index in sorted(slices)) for role, slices in self._side.items()}

    def _check_side_image(self, message: Image, body: Bytes) -> None:
        if self._given and message.role != "mask":
            raise ProtocolError(
                "conflict", f"A {message.role} map came after image 0 was used; send maps before the first image."
            )
        try:
            with np.errstate(invalid="ignore"):
                role = decode_frame(body, max_voxels=self._limits.max_voxels).role
        except InputError as error:
            raise ProtocolError("malformed", str(error)) from error
        if role != message.role:
            raise ProtocolError("malformed", f"The message says {message.role!r}, the image's Meta says {role!r}.")

    # Files beside the journal. They are derived from it: trouble with them is said, and stops nothing.

    def _append_line(self, path: Path, line: str) -> None:
        try:
            with open(path, "a", encoding="utf-8", opener=_private) as file:
                file.write(line + "\n")
        except OSError as error:
            log.warning("cannot write %s: %s", path, error.strerror)

    def _write_closed(self, summary: dict[str, Any]) -> None:
        try:
            with open(self.folder.closed, "w", encoding="utf-8", opener=_private) as file:
                json.dump({"closed": datetime.now(UTC).isoformat(timespec="seconds"), "summary": summary}, file)
        except OSError as error:
            log.warning("cannot write %s: %s", self.folder.closed, error.strerror)

    def _report_damage(self, damages: Sequence[Damage]) -> None:
        for damage in damages:
            self.warn(f"{damage.n_bytes} bytes of the journal at {damage.offset} are damaged; what they held is asked for again.")


def check_body(message: Image, body: Bytes, limits: Limits) -> None:
    """Compare an image's bytes with what its header, its envelope and the limits say; nothing is decoded yet.

    Raises
    ------
    ProtocolError
        With the reason.
    """
    if len(body) > limits.max_image_bytes:
        raise ProtocolError("too-large", f"The image has {len(body)} bytes, more than the {limits.max_image_bytes} accepted.")
    if len(body) < HEADER_BYTES + 8:
        raise ProtocolError("malformed", f"The image has {len(body)} bytes, fewer than an MRD image header.")
    if zlib.crc32(body) != message.crc32:
        raise ProtocolError("malformed", "The image's bytes do not give the checksum that its message declares.")
    data_type, x, y, z, channels, slice_, repetition, set_, series, n_meta = IMAGE_FACTS.unpack_from(body)
    n_values = channels * x * y * z
    if not 1 <= n_values <= limits.max_voxels:
        raise ProtocolError("too-large", f"The image's header declares {n_values} values; 1 to {limits.max_voxels} are accepted.")
    n_data = len(body) - HEADER_BYTES - 8 - n_meta
    if n_meta > MAX_META_BYTES or n_data not in [n_values * size for size in _BYTES_PER_VALUE.get(data_type, ())]:
        raise ProtocolError("malformed", f"The image has {n_data} bytes of data (type {data_type}), not as its header declares.")
    declared = (series, slice_, repetition, set_)
    if declared != (message.series, message.slice, message.repetition, message.set):
        raise ProtocolError(
            "malformed", f"Series, slice, repetition and set are {declared} in the image's header, not in its message."
        )


def count_lines(path: Path) -> int:
    """Complete lines of a file; 0 if there is none."""
    try:
        with path.open("rb") as file:
            return sum(line.endswith(b"\n") for line in file)
    except FileNotFoundError:
        return 0


def trim_torn_line(path: Path) -> None:
    """Cut off a last line that a crash left incomplete."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    if not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def same_opening(first: Open, second: Open) -> bool:
    """Whether two `Open` ask for the same, request ids apart."""
    return msgpack.packb(first.model_dump(exclude={"request_id"})) == msgpack.packb(second.model_dump(exclude={"request_id"}))


def _identity(message: Image) -> tuple[str, int, int, int, int]:
    return message.role, message.series, message.slice, message.repetition, message.set


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
