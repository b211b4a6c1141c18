"""The protocol of the service: what comes in, from whom, and what goes out, without a socket.

`handle` takes one message, `finished` what a session's job said, `tick` the passing of time. All return what is to be sent; what
depends on the disk (`Accepted` above all) is held back until `commit` has made the journals durable.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import logging
import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pydantic import ValidationError

from scansteer.core.errors import InputError, ScansteerError
from scansteer.protocols.scan import Scan, explain
from scansteer.realtime import metrics
from scansteer.realtime.codec import Bytes, ProtocolError, decode, encode, encode_answer, encode_arrays
from scansteer.realtime.config import ServeConfig
from scansteer.realtime.hosted import Folder, HostedSession, same_opening
from scansteer.realtime.journal import JournalError, sync_folder
from scansteer.realtime.messages import (
    Accepted,
    Close,
    Closed,
    Command,
    CommandAck,
    CommandOutcome,
    Control,
    Decision,
    DecisionAck,
    DecisionMessage,
    Done,
    Gap,
    GetDecision,
    GetMaps,
    GetMetrics,
    GetStatus,
    Image,
    Maps,
    MetricsText,
    Missing,
    Open,
    Opened,
    Ping,
    Played,
    Pong,
    Refused,
    SessionMessage,
    SessionNotice,
    Status,
    Subscribe,
    Unusable,
    WireMessage,
)
from scansteer.realtime.worker import (
    Decided,
    Event,
    Failed,
    ImageUnusable,
    Job,
    MakeSession,
    MapsMade,
    NotMade,
    Ready,
    Summarised,
)

log = logging.getLogger("scansteer.broker")

VERSION = importlib.metadata.version("scansteer")

_MAX_CLOSED_KEPT = 32
_MAX_MAPS_WANTED = 16


class Outgoing(NamedTuple):
    """Frames for one client, or for every watcher (`identity` None; the first frame is then the session)."""

    identity: bytes | None
    frames: list[Bytes]


class Requester(NamedTuple):
    identity: bytes
    request_id: int


@dataclass
class Controller:
    """A connected controller, as far as the service knows it."""

    acting: bool
    last_heard: float
    acknowledged: int = -1
    """The last decision it has received."""
    answered: int = -1
    """The last decision of which it said what it did with it."""
    sent: int = -1
    sent_at: float = 0.0


@dataclass
class PendingCommand:
    """An operator's command on its way to the controllers."""

    command: Command
    requester: Requester
    issued_at: float
    sent_at: float


@dataclass
class Attendance:
    """Who takes part in a session right now. None of it outlives the process: clients say it again when they reconnect."""

    source: bytes | None = None
    closer: Requester | None = None
    controllers: dict[bytes, Controller] = field(default_factory=dict)
    commands: dict[str, PendingCommand] = field(default_factory=dict)
    maps_wanted: set[Requester] = field(default_factory=set)
    last_heard: float = 0.0
    gap_asked_at: float = 0.0


class Broker:
    """All sessions of one service."""

    def __init__(
        self,
        config: ServeConfig,
        make: MakeSession,
        submit: Callable[[str, Job, bool], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Parameters
        ----------
        submit
            Runs a job of a session (later); what it says comes back through `finished`.
        clock
            Seconds that never jump.

        Raises
        ------
        ScansteerError
            The data folder cannot be used, or another service uses it.
        """
        self.config = config
        self.service_id = uuid.uuid4().hex
        self.publish_endpoint = config.publish_endpoint
        self.metrics = metrics.Metrics()
        self._make = make
        self._submit = submit
        self._clock = clock
        self._sessions: dict[str, HostedSession] = {}
        self._attendance: dict[str, Attendance] = {}
        self._dirty: set[str] = set()
        self._held: list[tuple[str, Outgoing]] = []
        self._lock: int | None = _lock_folder(config)
        self._recover()

    # The three entrances.

    def handle(self, identity: bytes, frames: Sequence[Bytes], user: str = "") -> list[Outgoing]:
        """Answer one message of a client. Never raises for what a peer sends."""
        self.metrics.messages += 1
        try:
            message, bodies = decode(frames, max_body_bytes=self.config.limits.max_image_bytes)
        except ProtocolError as error:
            return [self._refusal(identity, error.request_id, None, error)]
        session_id = message.session_id if isinstance(message, SessionMessage) else None
        try:
            return self._dispatch(identity, message, bodies, frames, user)
        except ProtocolError as error:
            return [self._refusal(identity, message.request_id, session_id, error)]
        except JournalError as error:
            log.error("%s", error)
            refused = ProtocolError("disk", "The disk does not take it; what was accepted before is safe.")
            return [self._refusal(identity, message.request_id, session_id, refused)]
        except Exception:  # a mistake of ours in answering one message must not end the service for all
            log.exception("a message could not be answered")
            refused = ProtocolError("failed", "Internal error; the service's log has the details.")
            return [self._refusal(identity, message.request_id, session_id, refused)]

    def finished(self, session_id: str, events: Sequence[Event]) -> list[Outgoing]:
        """Pass on what a job of a session said when it was done."""
        session = self._sessions.get(session_id)
        if session is None:
            return []
        session.job_done()
        outgoing: list[Outgoing] = []
        for event in events:
            session.take(event)
            outgoing += self._tell(session_id, session, event)
        return outgoing

    def tick(self) -> list[Outgoing]:
        """What is due: repeat what was not acknowledged, ask for gaps, let go of who and what was not heard of."""
        now = self._clock()
        outgoing: list[Outgoing] = []
        for session_id, session in list(self._sessions.items()):
            attendance = self._attendance[session_id]
            self._forget_silent_controllers(session, attendance, now)
            outgoing += self._repeat_decisions(session, attendance, now)
            outgoing += self._repeat_commands(session_id, attendance, now)
            outgoing += self._ask_for_gaps(session_id, session, attendance, now)
            if now - attendance.last_heard > self.config.limits.max_session_idle_s:
                self._let_go(session_id, session)
        return outgoing

    def commit(self) -> list[Outgoing]:
        """Make durable what was appended, and release the answers that waited for it."""
        failed: dict[str, ProtocolError] = {}
        for session_id in self._dirty:
            try:
                if self.config.fsync:
                    self._sessions[session_id].sync()
            except JournalError as error:
                log.error("%s", error)
                self._sessions[session_id].take(Failed("The disk failed."))
                failed[session_id] = ProtocolError("disk", "The disk failed; nothing more is accepted in this session.")
        held, self._held, self._dirty = self._held, [], set()
        return [
            out if session_id not in failed else self._instead(out, session_id, failed[session_id]) for session_id, out in held
        ]

    def close(self) -> None:
        """Give the data folder free. Open sessions stay as their journals say, and go on when the service is started again."""
        if self._lock is None:
            return
        for session in self._sessions.values():
            session.release()
        os.close(self._lock)
        self._lock = None

    @property
    def is_ready(self) -> bool:
        return all(session.state != "opening" for session in list(self._sessions.values()))

    def status(self, request_id: int = 0) -> Status:
        return Status(
            request_id=request_id,
            service_id=self.service_id,
            version=VERSION,
            ready=self.is_ready,
            sessions=tuple(
                session.status(len(self._attendance[session_id].controllers))
                for session_id, session in list(self._sessions.items())
            ),
        )

    def metrics_text(self) -> str:
        return self.metrics.text(self.status())

    # Requests.

    def _dispatch(
        self, identity: bytes, message: WireMessage, bodies: Sequence[Bytes], frames: Sequence[Bytes], user: str
    ) -> list[Outgoing]:
        match message:
            case Image():
                return self._image(identity, message, bodies[0], frames)
            case Ping():
                pong = Pong(request_id=message.request_id, service_id=self.service_id, publish_endpoint=self.publish_endpoint)
                return [_to(identity, pong)]
            case GetStatus():
                return [_to(identity, self.status(message.request_id))]
            case GetMetrics():
                return [_to(identity, MetricsText(request_id=message.request_id, text=self.metrics_text()))]
            case Open():
                return self._open(identity, message, frames, user)
            case Subscribe():
                return self._subscribe(identity, message, frames, user)
            case Played():
                return self._played(identity, message, frames)
            case Missing():
                return self._missing(identity, message, frames, user)
            case Control():
                return self._control(identity, message, frames, user)
            case DecisionAck():
                return self._decision_ack(identity, message, user)
            case CommandAck():
                return self._command_ack(identity, message, user)
            case GetDecision():
                return self._get_decision(identity, message)
            case GetMaps():
                return self._get_maps(identity, message)
            case Close():
                return self._close(identity, message, frames, user)
        raise ProtocolError(
            "unknown-kind", f"A service does not take messages of kind {type(message).model_fields['kind'].default!r}."
        )

    def _image(self, identity: bytes, message: Image, body: Bytes, frames: Sequence[Bytes]) -> list[Outgoing]:
        received = time.perf_counter()
        session = self._session(message)
        self._attendance[message.session_id].source = identity
        known = session.find_image(message)
        if known is not None:
            self.metrics.duplicates += 1
            accepted = known.model_copy(update={"request_id": message.request_id})
            return self._hold(message.session_id, _to(identity, accepted))  # its first copy may not be durable yet
        session.check_image(message, body)
        entry = session.append(frames, message.crc32)
        session.times.received[message.repetition] = received
        session.apply(message, entry)
        self.metrics.images += 1
        accepted = encode_answer(
            Accepted,
            request_id=message.request_id,
            session_id=message.session_id,
            sequence_number=entry.sequence,
            repetition=message.repetition,
        )
        outgoing = self._hold(message.session_id, Outgoing(identity, accepted))
        return outgoing + self._ask_for_gaps(message.session_id, session, self._attendance[message.session_id], self._clock())

    def _open(self, identity: bytes, message: Open, frames: Sequence[Bytes], user: str) -> list[Outgoing]:
        session = self._sessions.get(message.session_id)
        if session is None:
            session = self._create(message, frames)
            session.note("opener", user=user)
        elif not same_opening(session.opening, message):
            raise ProtocolError("conflict", f"Session {message.session_id} is open with another scan or other options.")
        attendance = self._attendance[message.session_id]
        attendance.source, attendance.last_heard = identity, self._clock()
        opened = Opened(request_id=message.request_id, session_id=message.session_id, state=session.state)
        return self._hold(message.session_id, _to(identity, opened))

    def _create(self, message: Open, frames: Sequence[Bytes]) -> HostedSession:
        n_open = sum(session.state != "closed" for session in self._sessions.values())
        if n_open >= self.config.limits.max_sessions:
            raise ProtocolError("limit", f"{n_open} sessions are open, the most that are accepted; close one.")
        try:
            scan = Scan.model_validate(message.scan)
        except ValidationError as error:
            raise ProtocolError("malformed", f"The scan of session {message.session_id}: {explain(error)}"[:1000]) from error
        if len(scan.schedule) > self.config.limits.max_repetitions:
            raise ProtocolError("limit", f"The schedule has {len(scan.schedule)} repetitions, more than are accepted.")
        folder = Folder(self.config.data_dir / message.session_id)
        if folder.path.exists() or message.session_id in _purged(self.config):
            raise ProtocolError("closed", f"Session {message.session_id} was closed before; choose another name.")
        session = HostedSession.create(
            message, frames, folder, self._make, self._submitter(message.session_id), self.config.limits
        )
        sync_folder(self.config.data_dir)
        self._sessions[message.session_id] = session
        self._attendance[message.session_id] = Attendance(last_heard=self._clock())
        self._drop_oldest_closed()
        return session

    def _subscribe(self, identity: bytes, message: Subscribe, frames: Sequence[Bytes], user: str) -> list[Outgoing]:
        session = self._session(message)
        attendance = self._attendance[message.session_id]
        acting = message.mode == "acting"
        if acting and session.advice_only:
            raise ProtocolError("not-allowed", "The operator allows advice only in this session.")
        self._admit_controller(identity, attendance, acting)
        if (acting or message.reports_played) and not session.waits_or_ended:
            session.apply(message, session.append(frames))
        now = self._clock()
        controller = attendance.controllers.get(identity)
        if controller is None:
            session.note("controller", mode=message.mode, user=user)
            controller = attendance.controllers[identity] = Controller(acting, now)
        controller.acting, controller.last_heard = acting, now
        controller.acknowledged = max(controller.acknowledged, message.last_decision)
        outgoing = self._hold(
            message.session_id, _to(identity, Done(request_id=message.request_id, session_id=message.session_id))
        )
        for decision in session.decisions[max(message.last_decision, controller.sent) + 1 :]:
            outgoing.append(self._send_decision(identity, controller, decision, now))
        return outgoing

    def _admit_controller(self, identity: bytes, attendance: Attendance, acting: bool) -> None:
        if acting and any(other.acting for name, other in attendance.controllers.items() if name != identity):
            raise ProtocolError("not-allowed", "Another controller is acting in this session; subscribe for advice.")
        if identity not in attendance.controllers and len(attendance.controllers) >= self.config.limits.max_controllers:
            raise ProtocolError(
                "limit", f"{len(attendance.controllers)} controllers take part already; watchers use the PUB socket."
            )

    def _played(self, identity: bytes, message: Played, frames: Sequence[Bytes]) -> list[Outgoing]:
        session = self._session(message)
        session.check_played(message)
        if message.next_pulse_in_ms is not None:
            session.times.deadline[message.repetition] = time.perf_counter() + message.next_pulse_in_ms * 1e-3
        if session.sequencer.played(message.repetition) is None:
            session.apply(message, session.append(frames))
            session.note("played", repetition=message.repetition, pulse=message.pulse.model_dump())
        return self._done(identity, message)

    def _missing(self, identity: bytes, message: Missing, frames: Sequence[Bytes], user: str) -> list[Outgoing]:
        session = self._session(message)
        session.check_open()
        if max(message.repetitions) >= self.config.limits.max_repetitions:
            raise ProtocolError("limit", f"Repetition {max(message.repetitions)} is beyond what is accepted.")
        session.apply(message, session.append(frames))
        session.note("missing", repetitions=message.repetitions, user=user)
        return self._done(identity, message)

    def _control(self, identity: bytes, message: Control, frames: Sequence[Bytes], user: str) -> list[Outgoing]:
        session = self._session(message)
        if message.command_id in session.commands:
            return self._done(identity, message)
        session.check_open()
        session.apply(message, session.append(frames))
        session.note("command", id=message.command_id, command=message.command, repetition=message.repetition, user=user)
        outgoing = self._done(identity, message)
        if message.command in ("pause", "resume", "stop", "abort"):
            outgoing += self._forward(identity, message)
        return outgoing

    def _forward(self, identity: bytes, message: Control) -> list[Outgoing]:
        """Send an operator's command to the controllers; held back until it is written down."""
        attendance, now = self._attendance[message.session_id], self._clock()
        command = Command(
            session_id=message.session_id,
            command_id=message.command_id,
            command=message.command,  # type: ignore[arg-type]  # the others do not come here
            expires_in_s=self.config.command_expires_s,
        )
        requester = Requester(identity, message.request_id)
        attendance.commands[message.command_id] = PendingCommand(command, requester, now, now)
        return self._hold(message.session_id, *(_to(name, command) for name in attendance.controllers))

    def _decision_ack(self, identity: bytes, message: DecisionAck, user: str) -> list[Outgoing]:
        session = self._session(message)
        controller = self._attendance[message.session_id].controllers.get(identity)
        if controller is None:
            raise ProtocolError("not-allowed", "Only a controller that has subscribed acknowledges decisions.")
        if message.sequence_number >= len(session.decisions):
            raise ProtocolError("conflict", f"There is no decision {message.sequence_number} yet.")
        controller.last_heard = self._clock()
        controller.acknowledged = max(controller.acknowledged, message.sequence_number)
        if message.sequence_number > controller.answered:
            controller.answered = message.sequence_number
            session.note("ack", decision=message.sequence_number, outcome=message.outcome, reason=message.reason, user=user)
        return []

    def _command_ack(self, identity: bytes, message: CommandAck, user: str) -> list[Outgoing]:
        session = self._session(message)
        attendance = self._attendance[message.session_id]
        if identity not in attendance.controllers:
            raise ProtocolError("not-allowed", "Only a controller that has subscribed acknowledges commands.")
        pending = attendance.commands.pop(message.command_id, None)
        if pending is None:
            return []
        session.note("command_ack", id=message.command_id, outcome=message.outcome, reason=message.reason, user=user)
        return [_outcome(pending, message.outcome, message.reason)]

    def _get_decision(self, identity: bytes, message: GetDecision) -> list[Outgoing]:
        session = self._session(message)
        if not session.decisions:
            raise ProtocolError("not-ready", f"Session {message.session_id} has made no decision yet.")
        last = session.decisions[-1]
        return [_to(identity, DecisionMessage(request_id=message.request_id, session_id=message.session_id, decision=last))]

    def _get_maps(self, identity: bytes, message: GetMaps) -> list[Outgoing]:
        session, requester = self._session(message), Requester(identity, message.request_id)
        pending = self._attendance[message.session_id].maps_wanted
        if requester not in pending:  # else it was asked again while it is being made
            if len(pending) >= _MAX_MAPS_WANTED:
                raise ProtocolError("busy", f"{len(pending)} requests for maps wait already; ask again later.")
            pending.add(requester)
            session.make_maps(requester)
        return []

    def _close(self, identity: bytes, message: Close, frames: Sequence[Bytes], user: str) -> list[Outgoing]:
        session = self._session(message)
        if session.state == "closed":
            return [_to(identity, Closed(request_id=message.request_id, session_id=message.session_id, summary=session.summary))]
        self._attendance[message.session_id].closer = Requester(identity, message.request_id)
        if session.state != "closing":
            session.apply(message, session.append(frames))
            session.note("closing", user=user)
            self._dirty.add(message.session_id)
        return []

    # What jobs said.

    def _tell(self, session_id: str, session: HostedSession, event: Event) -> list[Outgoing]:
        attendance = self._attendance[session_id]
        match event:
            case Decided(decision=decision):
                return self._announce(session_id, session, attendance, decision)
            case Ready(ready_s=ready_s):
                return self._notify(attendance, SessionNotice(session_id=session_id, state=session.state, ready_s=ready_s))
            case Failed(reason=reason):
                self.metrics.failures += 1
                return self._notify(attendance, SessionNotice(session_id=session_id, state="failed", reason=reason[:1000]))
            case ImageUnusable(repetition=repetition, reason=reason):
                session.warn(reason)
                self.metrics.unusable += 1
                return self._notify(attendance, Unusable(session_id=session_id, repetition=repetition, reason=reason[:1000]))
            case MapsMade(requester=Requester(identity, request_id) as requester, n_images=n_images, arrays=arrays):
                attendance.maps_wanted.discard(requester)
                specs, bodies = encode_arrays(arrays)
                maps = Maps(request_id=request_id, session_id=session_id, n_images=n_images, arrays=specs)
                return [Outgoing(identity, encode(maps, bodies))]
            case NotMade(requester=Requester(identity, request_id) as requester, reason=reason):
                attendance.maps_wanted.discard(requester)
                return [self._refusal(identity, request_id, session_id, ProtocolError("not-ready", reason))]
            case Summarised(summary=summary):
                closed = Closed(session_id=session_id, summary=summary)
                if attendance.closer is None:
                    return []
                return [_to(attendance.closer.identity, closed.model_copy(update={"request_id": attendance.closer.request_id}))]
        return []

    def _announce(self, session_id: str, session: HostedSession, attendance: Attendance, decision: Decision) -> list[Outgoing]:
        if not session.is_news(decision):
            return []
        self.metrics.decision(decision)
        session.note("decision", number=decision.sequence_number, repetition=decision.repetition, action=decision.action)
        now = self._clock()
        outgoing = [Outgoing(None, [session_id.encode(), *encode(DecisionMessage(session_id=session_id, decision=decision))])]
        for identity, controller in attendance.controllers.items():
            outgoing.append(self._send_decision(identity, controller, decision, now))
        return outgoing

    def _send_decision(self, identity: bytes, controller: Controller, decision: Decision, now: float) -> Outgoing:
        controller.sent, controller.sent_at = decision.sequence_number, now
        return _to(identity, DecisionMessage(session_id=decision.session_id, decision=decision))

    def _notify(self, attendance: Attendance, message: SessionMessage) -> list[Outgoing]:
        """To whoever sends the images, and to the controllers."""
        names = {*attendance.controllers, *([attendance.source] if attendance.source is not None else [])}
        return [_to(name, message) for name in names]

    # The passing of time.

    def _forget_silent_controllers(self, session: HostedSession, attendance: Attendance, now: float) -> None:
        for identity, controller in list(attendance.controllers.items()):
            if now - controller.last_heard > self.config.controller_timeout_s:
                del attendance.controllers[identity]
                session.note("controller gone", acknowledged=controller.acknowledged)

    def _repeat_decisions(self, session: HostedSession, attendance: Attendance, now: float) -> list[Outgoing]:
        """Only the newest decision is worth repeating: older ones have expired."""
        if not session.decisions:
            return []
        newest = session.decisions[-1]
        return [
            self._send_decision(identity, controller, newest, now)
            for identity, controller in attendance.controllers.items()
            if controller.acknowledged < newest.sequence_number and now - controller.sent_at >= self.config.resend_s
        ]

    def _repeat_commands(self, session_id: str, attendance: Attendance, now: float) -> list[Outgoing]:
        outgoing: list[Outgoing] = []
        for command_id, pending in list(attendance.commands.items()):
            if now - pending.issued_at > self.config.command_expires_s:
                del attendance.commands[command_id]
                outgoing.append(_outcome(pending, "expired", "No controller answered."))
            elif now - pending.sent_at >= self.config.resend_s:
                pending.sent_at = now
                left = self.config.command_expires_s - (now - pending.issued_at)
                command = pending.command.model_copy(update={"expires_in_s": max(left, 1e-3)})
                outgoing += [_to(name, command) for name in attendance.controllers]
        return outgoing

    def _ask_for_gaps(self, session_id: str, session: HostedSession, attendance: Attendance, now: float) -> list[Outgoing]:
        if attendance.source is None or now - attendance.gap_asked_at < self.config.resend_s or session.state == "closed":
            return []
        gaps = session.sequencer.gaps()
        if not gaps:
            return []
        attendance.gap_asked_at = now
        self.metrics.gaps += 1
        return [_to(attendance.source, Gap(session_id=session_id, repetitions=gaps))]

    def _let_go(self, session_id: str, session: HostedSession) -> None:
        """Close a session that nobody uses any more."""
        if session.state in ("closing", "closed"):
            if session.state == "closed":
                self._drop(session_id)
            return
        session.note("idle", limit_s=self.config.limits.max_session_idle_s)
        closing = Close(session_id=session_id)
        try:
            session.apply(closing, session.append(encode(closing)))
            self._dirty.add(session_id)
        except (JournalError, ProtocolError) as error:
            log.error("cannot close idle session %s: %s", session_id, error)

    # Inside.

    def _session(self, message: SessionMessage) -> HostedSession:
        session = self._sessions.get(message.session_id)
        if session is None:
            raise ProtocolError("unknown-session", f"There is no session {message.session_id} here; open it first.")
        self._attendance[message.session_id].last_heard = self._clock()
        return session

    def _done(self, identity: bytes, message: SessionMessage) -> list[Outgoing]:
        done = Done(request_id=message.request_id, session_id=message.session_id)
        return self._hold(message.session_id, _to(identity, done))

    def _hold(self, session_id: str, *outgoing: Outgoing) -> list[Outgoing]:
        """Keep answers until the session's journal is durable."""
        self._dirty.add(session_id)
        self._held += [(session_id, out) for out in outgoing]
        return []

    def _refusal(self, identity: bytes, request_id: int, session_id: str | None, error: ProtocolError) -> Outgoing:
        self.metrics.refused(error.code)
        return _to(identity, Refused(request_id=request_id, session_id=session_id, code=error.code, reason=str(error)[:1000]))

    def _instead(self, held: Outgoing, session_id: str, error: ProtocolError) -> Outgoing:
        message, _ = decode(held.frames)
        return self._refusal(held.identity or b"", message.request_id, session_id, error)

    def _submitter(self, session_id: str) -> Callable[[Job, bool], None]:
        return lambda job, slow: self._submit(session_id, job, slow)

    def _recover(self) -> None:
        """Open again what a crash or a shutdown left open."""
        for path in sorted(self.config.data_dir.iterdir()):
            folder = Folder(path)
            if not folder.journal.exists() or folder.closed.exists():
                continue
            if time.time() - folder.journal.stat().st_mtime > self.config.limits.max_session_idle_s:
                log.warning("session %s was left open too long ago and is not taken up again", path.name)
                continue
            try:
                session = HostedSession.recover(folder, self._make, self._submitter(path.name), self.config.limits)
            except ScansteerError as error:
                log.error("session %s cannot be taken up again: %s", path.name, error)
                continue
            self._sessions[path.name] = session
            self._attendance[path.name] = Attendance(last_heard=self._clock())
            log.info("session %s goes on, %d images", path.name, len(session.images))

    def _drop_oldest_closed(self) -> None:
        closed = [session_id for session_id, session in self._sessions.items() if session.state == "closed"]
        for session_id in closed[: max(0, len(closed) - _MAX_CLOSED_KEPT)]:
            self._drop(session_id)

    def _drop(self, session_id: str) -> None:
        del self._sessions[session_id], self._attendance[session_id]
        self._dirty.discard(session_id)


def _to(identity: bytes, message: WireMessage) -> Outgoing:
    return Outgoing(identity, encode(message))


def _outcome(pending: PendingCommand, outcome: str, reason: str) -> Outgoing:
    message = CommandOutcome(
        session_id=pending.command.session_id,
        command_id=pending.command.command_id,
        outcome=outcome,  # type: ignore[arg-type]  # CommandAck's outcomes are among these
        reason=reason,
    )
    return _to(pending.requester.identity, message)


def _purged(config: ServeConfig) -> set[str]:
    """Names of sessions that existed and were purged; a recorded `Open` must not bring them back."""
    try:
        return set((config.data_dir / "purged").read_text(encoding="utf-8").split())
    except FileNotFoundError:
        return set()


def _lock_folder(config: ServeConfig) -> int:
    try:
        config.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(config.data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InputError(f"Cannot use data folder {config.data_dir}: {error.strerror}.") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise ScansteerError(f"Another service uses data folder {config.data_dir}; give this one another data_dir.") from error
    return descriptor
