"""The protocol of the service: what comes in, from whom, and what goes out, without a socket.

`handle` takes one message, `finished` what a session's job said, `tick` the passing of time. All return what is to be sent; what
depends on the disk (`Accepted` above all) is held back until `commit` has made the journals durable.
"""

from __future__ import annotations

import importlib.metadata
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Sequence

from scansteer.protocols.scan import Scan
from scansteer.realtime import metrics
from scansteer.realtime.attendance import Requester
from scansteer.realtime.codec import Bytes, ProtocolError, decode, encode, encode_arrays
from scansteer.realtime.config import ServeConfig
from scansteer.realtime.hosted import HostedSession, same_opening
from scansteer.realtime.intake import Intake, refusal_of
from scansteer.realtime.journal import JournalError
from scansteer.realtime.messages import (
    Close,
    Closed,
    CommandAck,
    Control,
    Decision,
    DecisionAck,
    DecisionMessage,
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
from scansteer.realtime.outbox import Outbox, Outgoing, to
from scansteer.realtime.registry import Registry
from scansteer.realtime.request import Request
from scansteer.realtime.roles import check_role
from scansteer.realtime.steering import Steering
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
    warm_up,
)

log = logging.getLogger("scansteer.broker")

VERSION = importlib.metadata.version("scansteer")

_MAX_MAPS_WANTED = 16
_RETRY_CLOSING_S = 60.0
_WARMING = ""
"""In the place of a session's name, for jobs that belong to none."""


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
        self.sessions = Registry(config, make, submit)
        self._make = make
        self._submit = submit
        self._n_warming = 0
        self._clock = clock
        self._outbox = Outbox()
        self._roles = {} if config.keys is None else config.keys.roles
        self._intake = Intake(self._outbox, self.metrics, self._refusal)
        self._steering = Steering(config, self._outbox, clock)
        self.sessions.recover(clock())

    # The entrances.

    def handle(self, identity: bytes, frames: Sequence[Bytes], user: str = "") -> list[Outgoing]:
        """Answer one message of a client. Never raises for what a peer sends."""
        self.metrics.messages += 1
        try:
            message, bodies = decode(frames, max_body_bytes=self.config.limits.max_image_bytes, requests_only=True)
        except ProtocolError as error:
            return [self._refusal(identity, error.request_id, None, error)]
        request = Request(identity, frames, user)
        try:
            check_role(self._roles.get(user, "control"), message)
            if isinstance(message, Image):
                self._intake.take(self._session(message), message, bodies[0], request)
                return []
            self._intake.write()
            return self._dispatch(message, request)
        except Exception as error:  # a mistake of ours in answering one message must not end the service for all
            refused = refusal_of(error)
        session_id = message.session_id if isinstance(message, SessionMessage) else None
        return [self._refusal(identity, message.request_id, session_id, refused)]

    def finished(self, session_id: str, events: Sequence[Event]) -> list[Outgoing]:
        """Pass on what a job of a session said when it was done."""
        if session_id == _WARMING:
            self._n_warming -= 1
        session = self.sessions.get(session_id)
        if session is None:
            return []
        session.job_done()
        outgoing: list[Outgoing] = []
        for event in events:
            outgoing += self._take(session, event)
        return outgoing

    def tick(self) -> list[Outgoing]:
        """What is due: repeat what was not acknowledged, ask for gaps, let go of who and what was not heard of."""
        now = self._clock()
        self._intake.write()
        outgoing: list[Outgoing] = []
        for session in self.sessions:
            outgoing += self._steering.due(session)
            outgoing += self._ask_for_gaps(session)
            if now - session.attendance.last_heard > self.config.limits.max_session_idle_s:
                self._let_go(session)
        return outgoing

    def commit(self) -> list[Outgoing]:
        """Write down what was taken in, make it durable, and release the answers that waited for it."""
        self._intake.write()
        outgoing = [gap for session in self._dirty_sessions() for gap in self._ask_for_gaps(session)]
        failed: set[str] = set()
        for session in self._dirty_sessions() if self.config.fsync else ():
            was_durable = session.is_durable
            try:
                session.sync()
            except JournalError as error:
                log.error("%s", error)
                failed.add(session.opening.session_id)
                if was_durable:
                    outgoing += self._take(session, Failed("The disk failed."))
        durable, not_durable = self._outbox.release(failed)
        return outgoing + durable + [self._not_durable(session_id, held) for session_id, held in not_durable]

    def _dirty_sessions(self) -> list[HostedSession]:
        return [session for session in map(self.sessions.get, self._outbox.dirty) if session is not None]

    def close(self) -> None:
        """Give the data folder free. Open sessions stay as their journals say, and go on when the service is started again."""
        self.sessions.close()

    def warm(self, scans: Iterable[Scan]) -> None:
        """Compile for scans that are expected, beside the first sessions: theirs are then ready in seconds."""
        for scan in scans:
            self._n_warming += 1
            self._submit(_WARMING, lambda scan=scan: warm_up(self._make, scan), True)

    @property
    def is_ready(self) -> bool:
        """Whether everything that is open or expected is compiled."""
        return self._n_warming == 0 and all(session.state != "opening" for session in self.sessions)

    def status(self, request_id: int = 0) -> Status:
        return Status(
            request_id=request_id,
            service_id=self.service_id,
            version=VERSION,
            ready=self.is_ready,
            sessions=tuple(session.status() for session in self.sessions),
        )

    def metrics_text(self) -> str:
        return self.metrics.text(self.status())

    # Requests.

    def _dispatch(self, message: WireMessage, request: Request) -> list[Outgoing]:
        match message:
            case Open():
                return self._open(message, request)
            case Close() if self.sessions.get(message.session_id) is None:
                return self._close_again(message, request)
            case SessionMessage():
                return self._in_session(self._session(message), message, request)
            case Ping():
                pong = Pong(request_id=message.request_id, service_id=self.service_id, publish_endpoint=self.publish_endpoint)
                return [to(request.identity, pong)]
            case GetStatus():
                return [to(request.identity, self.status(message.request_id))]
            case GetMetrics():
                return [to(request.identity, MetricsText(request_id=message.request_id, text=self.metrics_text()))]
        raise _not_taken(message)

    def _in_session(self, session: HostedSession, message: SessionMessage, request: Request) -> list[Outgoing]:
        match message:
            case Missing():
                return self._missing(session, message, request)
            case GetDecision():
                return self._get_decision(session, message, request)
            case GetMaps():
                return self._get_maps(session, message, request)
            case Close():
                return self._close(session, message, request)
            case Subscribe():
                return self._steering.subscribe(session, message, request)
            case Played():
                return self._steering.played(session, message, request)
            case Control():
                return self._steering.control(session, message, request)
            case DecisionAck():
                return self._steering.decision_ack(session, message, request)
            case CommandAck():
                return self._steering.command_ack(session, message, request)
        raise _not_taken(message)

    def _session(self, message: SessionMessage) -> HostedSession:
        session = self.sessions.get(message.session_id)
        if session is None:
            raise _unknown(message)
        session.attendance.last_heard = self._clock()
        return session

    def _open(self, message: Open, request: Request) -> list[Outgoing]:
        session = self.sessions.get(message.session_id)
        if session is None:
            session = self.sessions.create(message, request.frames)
            session.note("opener", user=request.user)
        elif not same_opening(session.opening, message):
            raise ProtocolError("conflict", f"Session {message.session_id} is open with another scan or other options.")
        session.attendance.source, session.attendance.last_heard = request.identity, self._clock()
        opened = Opened(request_id=message.request_id, session_id=message.session_id, state=session.state)
        return self._outbox.hold(message.session_id, to(request.identity, opened))

    def _missing(self, session: HostedSession, message: Missing, request: Request) -> list[Outgoing]:
        session.check_open()
        if max(message.repetitions) >= self.config.limits.max_repetitions:
            raise ProtocolError("limit", f"Repetition {max(message.repetitions)} is beyond what is accepted.")
        session.apply(message, session.append(request.frames))
        session.note("missing", repetitions=message.repetitions, user=request.user)
        return self._steering.done(message, request)

    def _get_decision(self, session: HostedSession, message: GetDecision, request: Request) -> list[Outgoing]:
        if not session.decisions:
            raise ProtocolError("not-ready", f"Session {message.session_id} has made no decision yet.")
        last = session.decisions[-1]
        answer = DecisionMessage(request_id=message.request_id, session_id=message.session_id, decision=last)
        return [to(request.identity, answer)]

    def _get_maps(self, session: HostedSession, message: GetMaps, request: Request) -> list[Outgoing]:
        requester, pending = Requester(request.identity, message.request_id), session.attendance.maps_wanted
        if requester not in pending:  # else it was asked again while it is being made
            if len(pending) >= _MAX_MAPS_WANTED:
                raise ProtocolError("busy", f"{len(pending)} requests for maps wait already; ask again later.")
            pending.add(requester)
            session.make_maps(requester)
        return []

    def _close(self, session: HostedSession, message: Close, request: Request) -> list[Outgoing]:
        if session.state == "closed":
            closed = Closed(request_id=message.request_id, session_id=message.session_id, summary=session.summary)
            return [to(request.identity, closed)]
        session.attendance.closer = Requester(request.identity, message.request_id)
        if session.state != "closing":
            session.apply(message, session.append(request.frames))
            session.note("closing", user=request.user)
            self._outbox.hold(message.session_id)
        return []

    def _close_again(self, message: Close, request: Request) -> list[Outgoing]:
        """Of a session that is not held any more: its answer may be what was lost."""
        summary = self.sessions.closed_before(message.session_id)
        if summary is None:
            raise _unknown(message)
        return [to(request.identity, Closed(request_id=message.request_id, session_id=message.session_id, summary=summary))]

    # What jobs said.

    def _take(self, session: HostedSession, event: Event) -> list[Outgoing]:
        if isinstance(event, Decided) and not session.is_durable:
            return []  # it may rest on images that nobody has on disk
        try:
            session.take(event)
            return self._tell(session, event)
        except Exception as error:  # a mistake of ours in passing on one thing must not end the service for all
            refused, requester = refusal_of(error), getattr(event, "requester", None)
            return [self._refusal(*requester, session.opening.session_id, refused)] if isinstance(requester, Requester) else []

    def _tell(self, session: HostedSession, event: Event) -> list[Outgoing]:
        session_id = session.opening.session_id
        match event:
            case Decided(decision=decision):
                return self._announce(session, decision)
            case Ready(ready_s=ready_s):
                return _notify(session, SessionNotice(session_id=session_id, state=session.state, ready_s=ready_s))
            case Failed(reason=reason):
                self.metrics.failures += 1
                return _notify(session, SessionNotice(session_id=session_id, state="failed", reason=reason[:1000]))
            case ImageUnusable(repetition=repetition, reason=reason):
                session.warn(reason)
                self.metrics.unusable += 1
                return _notify(session, Unusable(session_id=session_id, repetition=repetition, reason=reason[:1000]))
            case MapsMade(requester=Requester() as requester):
                session.attendance.maps_wanted.discard(requester)
                return [_maps(session_id, requester, event)]
            case NotMade(requester=Requester() as requester, reason=reason):
                session.attendance.maps_wanted.discard(requester)
                return [self._refusal(*requester, session_id, ProtocolError("not-ready", reason))]
            case Summarised(summary=summary):
                closer = session.attendance.closer
                closed = Closed(request_id=closer.request_id if closer else 0, session_id=session_id, summary=summary)
                return [to(closer.identity, closed)] if closer else []
        return []

    def _announce(self, session: HostedSession, decision: Decision) -> list[Outgoing]:
        """A decision, to watchers and controllers; one that was announced before a restart stays unsaid."""
        if not session.is_news(decision):
            return []
        self.metrics.decision(decision)
        session.note("decision", number=decision.sequence_number, repetition=decision.repetition, action=decision.action)
        message = DecisionMessage(session_id=decision.session_id, decision=decision)
        published = Outgoing(None, [decision.session_id.encode(), *encode(message)])
        return [published, *self._steering.announce(session, decision)]

    # The passing of time.

    def _ask_for_gaps(self, session: HostedSession) -> list[Outgoing]:
        attendance, now = session.attendance, self._clock()
        if attendance.source is None or now - attendance.gap_asked_at < self.config.resend_s or session.state == "closed":
            return []
        gaps = session.sequencer.gaps()
        if not gaps:
            return []
        attendance.gap_asked_at = now
        self.metrics.gaps += 1
        return [to(attendance.source, Gap(session_id=session.opening.session_id, repetitions=gaps))]

    def _let_go(self, session: HostedSession) -> None:
        """Close a session that nobody uses any more."""
        session_id = session.opening.session_id
        if session.state == "closed":
            self.sessions.drop(session_id)
        elif session.state != "closing":
            closing = Close(session_id=session_id)
            try:
                session.apply(closing, session.append(encode(closing)))
                session.note("idle", limit_s=self.config.limits.max_session_idle_s)
                self._outbox.hold(session_id)
            except (JournalError, ProtocolError) as error:
                session.attendance.last_heard = self._clock() - self.config.limits.max_session_idle_s + _RETRY_CLOSING_S
                log.error("cannot close idle session %s: %s", session_id, error)

    # Refusing.

    def _refusal(self, identity: bytes, request_id: int, session_id: str | None, error: ProtocolError) -> Outgoing:
        self.metrics.refused(error.code)
        return to(identity, Refused(request_id=request_id, session_id=session_id, code=error.code, reason=str(error)[:1000]))

    def _not_durable(self, session_id: str, held: Outgoing) -> Outgoing:
        """What is said instead of an answer whose journal could not be made durable."""
        message, _ = decode(held.frames)
        error = ProtocolError("disk", "The disk failed; nothing more is accepted in this session.")
        return self._refusal(held.identity or b"", message.request_id, session_id, error)


def _notify(session: HostedSession, message: SessionMessage) -> list[Outgoing]:
    return [to(name, message) for name in session.attendance.interested]


def _maps(session_id: str, requester: Requester, made: MapsMade) -> Outgoing:
    specs, bodies = encode_arrays(made.arrays)
    maps = Maps(request_id=requester.request_id, session_id=session_id, n_images=made.n_images, arrays=specs)
    return Outgoing(requester.identity, encode(maps, bodies))


def _unknown(message: SessionMessage) -> ProtocolError:
    return ProtocolError("unknown-session", f"There is no session {message.session_id} here; open it first.")


def _not_taken(message: WireMessage) -> ProtocolError:
    kind = type(message).model_fields["kind"].default
    return ProtocolError("unknown-kind", f"A service does not take messages of kind {kind!r}.")
