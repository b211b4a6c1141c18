"""The service's client: for whoever sends images, steers, or watches.

`Client` asks and waits, every wait with an end; one thread uses it. Requests that get no answer are sent again: the service
recognises what it has had already. `Watcher` only listens to decisions. A controller has a library of its own, `controller.py`.
"""

from __future__ import annotations

import itertools
import math
import time
import uuid
import zlib
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Literal, TypeVar

import ismrmrd
import numpy as np
import zmq

from scansteer.core.errors import InputError, ScansteerError
from scansteer.protocols.scan import SaturationBlock, Scan
from scansteer.realtime.auth import check_endpoint_form, protect_client
from scansteer.realtime.codec import Bytes, ProtocolError, decode, decode_arrays, encode
from scansteer.realtime.config import DEFAULT_ENDPOINT, DEFAULT_PUBLISH_ENDPOINT, Keys
from scansteer.realtime.images import HEADER_BYTES
from scansteer.realtime.messages import (
    Accepted,
    Close,
    Closed,
    CommandAck,
    Control,
    ControllerMode,
    ControlName,
    Decision,
    DecisionAck,
    DecisionMessage,
    DecisionOutcome,
    Done,
    GetDecision,
    GetMaps,
    GetMetrics,
    GetStatus,
    Image,
    ImageRole,
    Maps,
    MetricsText,
    Missing,
    Open,
    Opened,
    Ping,
    Played,
    PlayedPulse,
    Pong,
    Pulse,
    Refused,
    SessionStatus,
    Status,
    Subscribe,
    WireMessage,
)

Reply = TypeVar("Reply", bound=WireMessage)

_MAX_NOTICES = 10_000


class ServiceSilentError(ScansteerError):
    """No answer in time: keep to the approved schedule."""


class RefusedError(InputError):
    """The service refused a request; `code` says why, nothing changed."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.reason)
        self.code = refused.code


class Client:
    """A connection to the service. Use from one thread, as a context manager."""

    def __init__(
        self,
        endpoint: str = DEFAULT_ENDPOINT,
        *,
        keys: Keys | None = None,
        timeout_s: float = 5.0,
        resend_s: float = 1.0,
    ) -> None:
        """
        Parameters
        ----------
        timeout_s
            How long a request waits for its answer, unless it says otherwise.
        resend_s
            After this time without an answer the request is sent again.
        """
        self.timeout_s = timeout_s
        self._resend_s = resend_s
        self._numbers = itertools.count(1)
        self._notices: deque[WireMessage] = deque(maxlen=_MAX_NOTICES)
        self._answers: dict[int, tuple[WireMessage, Sequence[Bytes]]] = {}
        self._awaited: set[int] = set()
        self._socket = connected_socket(zmq.DEALER, endpoint, keys)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.disconnect()

    def disconnect(self) -> None:
        """Close the connection; sessions stay open."""
        self._socket.close(linger=0)

    # Sessions and images.

    def open(
        self,
        scan: Scan,
        session_id: str | None = None,
        *,
        n_slices: int = 1,
        n_auxiliary: int = 0,
        region_names: Iterable[str] = (),
        use_encoder: bool = True,
    ) -> str:
        """Begin a session (or take part in it again); returns its name. Compilation goes on afterwards, see `wait_ready`."""
        name = session_id or uuid.uuid4().hex
        message = Open(
            session_id=name,
            scan=scan.model_dump(mode="json"),
            n_slices=n_slices,
            n_auxiliary=n_auxiliary,
            region_names=tuple(region_names),
            use_encoder=use_encoder,
        )
        self.ask(message, Opened)
        return name

    def wait_ready(self, session_id: str, timeout_s: float = 120.0) -> None:
        """Return when the session is compiled.

        Raises
        ------
        ServiceSilentError
            Not ready in time.
        ScansteerError
            The session failed, or is unknown.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            status = self.session_status(session_id)
            if status.state == "failed":
                raise ScansteerError(f"Session {session_id} failed: {' '.join(status.warnings[-1:])}")
            if status.state != "opening":
                return
            if time.monotonic() >= deadline:
                raise ServiceSilentError(f"Session {session_id} was not ready within {timeout_s:g} s.")
            self._pump(min(0.25, max(0.0, deadline - time.monotonic())))

    def send_image(self, session_id: str, body: Bytes, *, role: ImageRole = "image", timeout_s: float | None = None) -> Accepted:
        """Send an MRD image and wait until it is on the service's disk; sent again as often as needed."""
        message = image_of(session_id, body, role=role)
        return self.ask(message, Accepted, [body], timeout_s=timeout_s)

    def post_image(self, session_id: str, body: Bytes, *, role: ImageRole = "image") -> int:
        """Send an MRD image without waiting; `collect` with the number returned waits for its answer."""
        return self.post(image_of(session_id, body, role=role), [body])

    def post(self, message: WireMessage, bodies: Sequence[Bytes] = ()) -> int:
        """Send a request without waiting; returns the number under which `answer_to` finds its answer."""
        numbered = message.model_copy(update={"request_id": next(self._numbers)})
        self._awaited.add(numbered.request_id)
        self._send(encode(numbered, bodies), time.monotonic() + self.timeout_s)
        return numbered.request_id

    def answer_to(self, number: int) -> WireMessage | None:
        """The answer to a posted request (a `Refused` too), if `receive` has taken it in; it is forgotten afterwards."""
        if number not in self._answers:
            return None
        self._awaited.discard(number)
        return self._answers.pop(number)[0]

    def forget(self, number: int) -> None:
        """Stop expecting the answer to a posted request."""
        self._awaited.discard(number)
        self._answers.pop(number, None)

    def collect(self, number: int, timeout_s: float | None = None) -> Accepted:
        """The answer to a posted image."""
        return self._wait(number, Accepted, None, timeout_s)[0]

    def declare_missing(self, session_id: str, repetitions: Iterable[int]) -> None:
        """Images that were lost for good; their pulses were played."""
        self.ask(Missing(session_id=session_id, repetitions=tuple(repetitions)), Done)

    def maps(self, session_id: str, timeout_s: float | None = None) -> dict[str, np.ndarray]:
        """Name -> (z, y, x) float32, as they stand after everything absorbed so far."""
        message, bodies = self._ask(GetMaps(session_id=session_id), Maps, (), timeout_s)
        return decode_arrays(message.arrays, bodies)

    def close_session(self, session_id: str, timeout_s: float = 60.0) -> dict:
        """End a session when everything that waits is absorbed; returns the summary."""
        return self.ask(Close(session_id=session_id), Closed, timeout_s=timeout_s).summary

    # Steering.

    def subscribe(
        self, session_id: str, *, mode: ControllerMode = "advice", reports_played: bool = False, last_decision: int = -1
    ) -> None:
        """Take part as a controller (and say that one is still there); decisions after `last_decision` follow."""
        message = Subscribe(session_id=session_id, mode=mode, reports_played=reports_played, last_decision=last_decision)
        self.ask(message, Done)

    def played(
        self, session_id: str, repetition: int, pulse: Pulse | SaturationBlock, *, next_pulse_in_ms: float | None = None
    ) -> None:
        """Report what was really played."""
        exact = PlayedPulse(b1_ut=pulse.b1_ut, offset_ppm=pulse.offset_ppm, t_sat_s=pulse.t_sat_s, t_rec_s=pulse.t_rec_s)
        self.ask(Played(session_id=session_id, repetition=repetition, pulse=exact, next_pulse_in_ms=next_pulse_in_ms), Done)

    def acknowledge(self, decision: Decision, outcome: DecisionOutcome = "advice", reason: str = "") -> None:
        """Say what was done with a decision: `obeyed`, `advice` (shown, not obeyed), `refused` or `expired`. Does not wait."""
        message = DecisionAck(
            session_id=decision.session_id,
            sequence_number=decision.sequence_number,
            outcome=outcome,
            reason=reason,
        )
        self._send(encode(message), time.monotonic() + self.timeout_s)

    def acknowledge_command(
        self, session_id: str, command_id: str, outcome: Literal["done", "refused"] = "done", reason: str = ""
    ) -> None:
        """Say what became of an operator's command: `done` or `refused`. Does not wait."""
        message = CommandAck(session_id=session_id, command_id=command_id, outcome=outcome, reason=reason)
        self._send(encode(message), time.monotonic() + self.timeout_s)

    def control(
        self, session_id: str, command: ControlName, repetition: int | None = None, *, command_id: str | None = None
    ) -> str:
        """The operator's hand: pause, resume, stop, abort, exclude (an image), advice, confirm (a stop). Returns the command's id."""
        name = command_id or uuid.uuid4().hex
        self.ask(Control(session_id=session_id, command_id=name, command=command, repetition=repetition), Done)
        return name

    # Asking.

    def last_decision(self, session_id: str) -> Decision:
        return self.ask(GetDecision(session_id=session_id), DecisionMessage).decision

    def status(self) -> Status:
        return self.ask(GetStatus(), Status)

    def session_status(self, session_id: str) -> SessionStatus:
        """
        Raises
        ------
        ScansteerError
            The service has no such session.
        """
        for session in self.status().sessions:
            if session.session_id == session_id:
                return session
        raise ScansteerError(f"The service has no session {session_id}.")

    def metrics(self) -> str:
        return self.ask(GetMetrics(), MetricsText).text

    def ping(self, timeout_s: float | None = None) -> Pong:
        return self.ask(Ping(), Pong, timeout_s=timeout_s)

    # What the service says unasked.

    def receive(self, timeout_s: float = 0.0) -> WireMessage | None:
        """The next message that answers no request: decisions, gaps, commands, notices. None: nothing came in time."""
        deadline = time.monotonic() + timeout_s
        while not self._notices:
            left = deadline - time.monotonic()
            if not self._pump(max(0.0, left)) and left <= 0:
                return None
        return self._notices.popleft()

    def take_in(self, timeout_s: float) -> None:
        """Wait until something comes, then take in all that is there; `receive(0)` and `answer_to` find it."""
        while self._pump(timeout_s):
            timeout_s = 0.0

    def next_decision(self, timeout_s: float) -> Decision | None:
        """The next decision; other messages that came unasked stay where they are. None: nothing came in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            for message in self._notices:
                if isinstance(message, DecisionMessage):
                    self._notices.remove(message)
                    return message.decision
            left = deadline - time.monotonic()
            if not self._pump(max(0.0, left)) and left <= 0:
                return None

    # Requests.

    def ask(
        self, message: WireMessage, reply: type[Reply], bodies: Sequence[Bytes] = (), *, timeout_s: float | None = None
    ) -> Reply:
        """Send a request and wait for its answer.

        Raises
        ------
        ServiceSilentError
            No answer in time.
        RefusedError
            The service refused.
        """
        return self._ask(message, reply, bodies, timeout_s)[0]

    def _ask(
        self, message: WireMessage, reply: type[Reply], bodies: Sequence[Bytes], timeout_s: float | None
    ) -> tuple[Reply, Sequence[Bytes]]:
        numbered = message.model_copy(update={"request_id": next(self._numbers)})
        return self._wait(numbered.request_id, reply, encode(numbered, bodies), timeout_s)

    def _wait(
        self, number: int, reply: type[Reply], frames: list[Bytes] | None, timeout_s: float | None
    ) -> tuple[Reply, Sequence[Bytes]]:
        """Wait for the answer to a request, sending `frames` now and whenever nothing came for a while."""
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        send_at = time.monotonic()
        self._awaited.add(number)
        try:
            while number not in self._answers:
                now = time.monotonic()
                if now >= deadline:
                    raise ServiceSilentError("The service did not answer in time; keep to the approved schedule.")
                if frames is not None and now >= send_at:
                    self._send(frames, deadline)
                    send_at = now + self._resend_s
                self._pump(max(0.0, min(deadline, send_at if frames is not None else deadline) - time.monotonic()))
            answer, bodies = self._answers.pop(number)
        finally:
            self._awaited.discard(number)
        if isinstance(answer, Refused):
            raise RefusedError(answer)
        if not isinstance(answer, reply):
            raise ScansteerError(f"The service answered with {type(answer).__name__} instead of {reply.__name__}.")
        return answer, bodies

    def _send(self, frames: list[Bytes], deadline: float) -> None:
        """Send as soon as there is a connection; what arrives meanwhile is taken in.

        Raises
        ------
        ServiceSilentError
            No connection in time.
        """
        while True:
            try:
                self._socket.send_multipart(frames, zmq.NOBLOCK)
                return
            except zmq.Again:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise ServiceSilentError("There is no connection to the service; keep to the approved schedule.") from None
                self._socket.poll(milliseconds(min(left, 0.1)), zmq.POLLOUT)
                self._pump(0.0)

    def _pump(self, timeout_s: float) -> bool:
        """Take in one message; False: none came in time."""
        if not self._socket.poll(milliseconds(timeout_s)):
            return False
        try:
            message, bodies = decode(self._socket.recv_multipart(zmq.NOBLOCK))
        except (zmq.Again, ProtocolError):
            return True
        if message.request_id == 0:
            self._notices.append(message)
        elif message.request_id in self._awaited:
            self._answers[message.request_id] = message, bodies
        return True


class Watcher:
    """Listens to decisions. Loss is possible: after a pause ask a `Client` for the last decision."""

    def __init__(
        self, endpoint: str = DEFAULT_PUBLISH_ENDPOINT, *, session_id: str | None = None, keys: Keys | None = None
    ) -> None:
        """`session_id` None: every session's decisions."""
        self._socket = connected_socket(zmq.SUB, endpoint, keys)
        self._session_id = session_id
        self._socket.subscribe(session_id or "")

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close(linger=0)

    def next_decision(self, timeout_s: float) -> Decision | None:
        """The next decision; None: nothing came in time."""
        deadline = time.monotonic() + timeout_s
        while self._socket.poll(milliseconds(deadline - time.monotonic())):
            try:
                message, _ = decode(self._socket.recv_multipart(zmq.NOBLOCK)[1:])
            except (zmq.Again, ProtocolError):
                continue
            if isinstance(message, DecisionMessage) and self._session_id in (None, message.session_id):
                return message.decision
        return None


def image_of(session_id: str, body: Bytes, *, role: ImageRole = "image") -> Image:
    """The envelope of an MRD image: its identity is read from its header.

    Raises
    ------
    InputError
        Shorter than an MRD image header.
    """
    if len(body) < HEADER_BYTES:
        raise InputError(f"An MRD image has a header of {HEADER_BYTES} bytes, got {len(body)} bytes in all.")
    header = ismrmrd.ImageHeader.from_buffer_copy(body)
    return Image(
        session_id=session_id,
        role=role,
        series=header.image_series_index,
        slice=header.slice,
        repetition=header.repetition,
        set=header.set,
        crc32=zlib.crc32(body),
    )


def milliseconds(seconds: float) -> int:
    """A waiting time as ZeroMQ wants it: rounded up, so that nobody spins through the last millisecond."""
    return max(0, math.ceil(seconds * 1000))


def connected_socket(kind: int, endpoint: str, keys: Keys | None) -> zmq.Socket:
    """A socket of the shared context that connects, and reconnects, to an endpoint."""
    check_endpoint_form(endpoint)
    socket = zmq.Context.instance().socket(kind)
    socket.linger = 0
    socket.setsockopt(zmq.RECONNECT_IVL, 50)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    socket.setsockopt(zmq.HEARTBEAT_IVL, 2_000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 6_000)
    try:
        if keys is not None:
            protect_client(socket, keys)
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        socket.close(0)
        raise InputError(f"Cannot connect to {endpoint}: {error.strerror}.") from error
    except InputError:
        socket.close(0)
        raise
    return socket
