"""The service's client: for whoever sends images, or steers. A controller has a library of its own, `controller.py`."""

from __future__ import annotations

import contextlib
import time
import uuid
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import ismrmrd
import numpy as np
import zmq
from pydantic import ValidationError

from scansteer.core.errors import InputError, ScansteerError
from scansteer.protocols.scan import SaturationBlock, Scan, explain
from scansteer.realtime.codec import Bytes, decode_arrays, encode
from scansteer.realtime.config import DEFAULT_ENDPOINT, Keys
from scansteer.realtime.connection import Connection, RefusedError, ServiceSilentError
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
    Message,
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

Content = TypeVar("Content", bound=Message)

_HEARTBEAT_S = 1.0


@dataclass
class _Subscription:
    """Taking part in a session as a controller."""

    message: Subscribe
    said_at: float
    repeat: int | None = None
    """Number of its latest repetition, if that was not answered yet."""


class Client(Connection):
    """A connection to the service. Use from one thread, as a context manager."""

    def __init__(
        self, endpoint: str = DEFAULT_ENDPOINT, *, keys: Keys | None = None, timeout_s: float = 5.0, resend_s: float = 1.0
    ) -> None:
        """As `Connection`."""
        super().__init__(endpoint, keys=keys, timeout_s=timeout_s, resend_s=resend_s)
        self._subscriptions: dict[str, _Subscription] = {}
        self._controller_id = uuid.uuid4().hex

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
        message = request(
            Open,
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

    def collect(self, number: int, timeout_s: float | None = None) -> Accepted:
        """The answer to a posted image."""
        return self._wait(number, Accepted, None, timeout_s)[0]

    def declare_missing(self, session_id: str, repetitions: Iterable[int]) -> None:
        """Images that were lost for good; their pulses were played."""
        self.ask(request(Missing, session_id=session_id, repetitions=tuple(repetitions)), Done)

    def maps(self, session_id: str, timeout_s: float | None = None) -> dict[str, np.ndarray]:
        """Name -> (z, y, x) float32, as they stand after everything absorbed so far."""
        message, bodies = self._ask(request(GetMaps, session_id=session_id), Maps, (), timeout_s)
        return decode_arrays(message.arrays, bodies)

    def close_session(self, session_id: str, timeout_s: float = 60.0) -> dict:
        """End a session when everything that waits is absorbed; returns the summary."""
        summary = self.ask(request(Close, session_id=session_id), Closed, timeout_s=timeout_s).summary
        self._subscriptions.pop(session_id, None)
        return summary

    # Steering.

    def subscribe(
        self, session_id: str, *, mode: ControllerMode = "advice", reports_played: bool = False, last_decision: int = -1
    ) -> None:
        """Take part as a controller, for as long as this client is used; decisions after `last_decision` follow.

        The service forgets a controller that says nothing for 5 s (`controller_timeout_s`). Every wait of this client says that it
        is still there, and after a longer silence takes part again: what was decided meanwhile comes then.
        """
        message = request(
            Subscribe,
            session_id=session_id,
            mode=mode,
            reports_played=reports_played,
            last_decision=last_decision,
            controller_id=self._controller_id,
        )
        self.ask(message, Done)
        self._subscriptions[session_id] = _Subscription(message, time.monotonic())

    def played(
        self, session_id: str, repetition: int, pulse: Pulse | SaturationBlock, *, next_pulse_in_ms: float | None = None
    ) -> None:
        """Report what was really played."""
        exact = request(PlayedPulse, b1_ut=pulse.b1_ut, offset_ppm=pulse.offset_ppm, t_sat_s=pulse.t_sat_s, t_rec_s=pulse.t_rec_s)
        self.ask(request(Played, session_id=session_id, repetition=repetition, pulse=exact, next_pulse_in_ms=next_pulse_in_ms), Done)

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
        self,
        session_id: str,
        command: ControlName,
        repetition: int | None = None,
        *,
        decision: int | None = None,
        command_id: str | None = None,
    ) -> str:
        """The operator's hand: pause, resume, stop, abort, exclude (an image), advice, confirm (a stop). Returns the command's id.

        Parameters
        ----------
        repetition
            Of the image to be excluded.
        decision
            `sequence_number` of the decision whose stop is confirmed; refused if there is a later one. None: whichever is the
            latest when the command arrives.
        """
        name = command_id or uuid.uuid4().hex
        message = request(Control, session_id=session_id, command_id=name, command=command, repetition=repetition, decision=decision)
        self.ask(message, Done)
        return name

    # Asking.

    def last_decision(self, session_id: str) -> Decision:
        return self.ask(request(GetDecision, session_id=session_id), DecisionMessage).decision

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

    def next_decision(self, timeout_s: float) -> Decision | None:
        """The next decision; other messages that came unasked stay where they are. None: nothing came in time.

        Raises
        ------
        RefusedError
            The service does not let this client take part any more: another controller has the acting role by now, the operator
            allows advice only, or the session is gone.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            for message in self._notices:
                if isinstance(message, DecisionMessage):
                    self._notices.remove(message)
                    return message.decision
                if isinstance(message, Refused) and message.request_id:
                    self._notices.remove(message)
                    raise RefusedError(message)
            left = deadline - time.monotonic()
            if not self._pump(max(0.0, left)) and left <= 0:
                return None

    # Staying subscribed.

    def _pump(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while True:
            self._repeat_subscriptions()
            left = deadline - time.monotonic()
            wait = min(left, _HEARTBEAT_S) if self._subscriptions else left
            if super()._pump(max(0.0, wait)):
                return True
            if wait >= left:
                return False

    def _repeat_subscriptions(self) -> None:
        now = time.monotonic()
        for subscription in self._subscriptions.values():
            if now - subscription.said_at < _HEARTBEAT_S:
                continue
            subscription.said_at, subscription.repeat = now, next(self._numbers)
            message = subscription.message.model_copy(update={"request_id": subscription.repeat})
            with contextlib.suppress(zmq.Again):  # no connection; next time
                self._socket.send_multipart(encode(message), zmq.NOBLOCK)

    def _take(self, message: WireMessage, bodies: Sequence[Bytes]) -> None:
        subscription = self._subscriptions.get(getattr(message, "session_id", None) or "")
        if subscription is None:
            super()._take(message, bodies)
        elif message.request_id and message.request_id == subscription.repeat:
            self._take_repeated(subscription, message)
        else:
            if isinstance(message, DecisionMessage):
                last = max(subscription.message.last_decision, message.decision.sequence_number)
                subscription.message = subscription.message.model_copy(update={"last_decision": last})
            super()._take(message, bodies)

    def _take_repeated(self, subscription: _Subscription, answer: WireMessage) -> None:
        subscription.repeat = None
        if isinstance(answer, Refused) and answer.code not in ("disk", "busy", "failed"):
            del self._subscriptions[subscription.message.session_id]
            self._notices.append(answer)


def request(kind: type[Content], **fields: Any) -> Content:
    """A message, or a part of one, of what a user gives.

    Raises
    ------
    InputError
        One sentence naming the field and the value.
    """
    try:
        return kind(**fields)
    except ValidationError as error:
        raise InputError(f"{kind.__name__}: {explain(error, 'realtime/messages.py')}") from error


def image_of(session_id: str, body: Bytes, *, role: ImageRole = "image") -> Image:
    """The envelope of an MRD image: its identity is read from its header.

    Raises
    ------
    InputError
        Shorter than an MRD image header, or a name that a session cannot have.
    """
    if len(body) < HEADER_BYTES:
        raise InputError(f"An MRD image has a header of {HEADER_BYTES} bytes, got {len(body)} bytes in all.")
    header = ismrmrd.ImageHeader.from_buffer_copy(body)
    return request(
        Image,
        session_id=session_id,
        role=role,
        series=header.image_series_index,
        slice=header.slice,
        repetition=header.repetition,
        set=header.set,
        crc32=zlib.crc32(body),
    )
