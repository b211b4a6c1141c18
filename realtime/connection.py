"""A connection to the service: requests and their answers, and what it says unasked.

One thread uses it, and every wait has an end. A request that gets no answer is sent again: the service recognises what it has had
already.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Sequence
from typing import Self, TypeVar

import zmq

from scansteer.core.errors import InputError, ScansteerError
from scansteer.realtime.auth import check_endpoint_form, protect_client
from scansteer.realtime.codec import Bytes, ProtocolError, decode, encode
from scansteer.realtime.config import DEFAULT_ENDPOINT, Keys
from scansteer.realtime.messages import Ping, Refused, WireMessage

Reply = TypeVar("Reply", bound=WireMessage)

_MAX_NOTICES = 10_000


class ServiceSilentError(ScansteerError):
    """No answer in time: keep to the approved schedule."""


class RefusedError(InputError):
    """The service refused a request; `code` says why, nothing changed."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.reason)
        self.code = refused.code


class Connection:
    """Asks and waits, or posts and looks later. Use from one thread, as a context manager."""

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
        self.heard_at = -math.inf
        """When the service last said anything (`time.monotonic()`); during long waits it is asked for a sign of life."""
        self._resend_s = resend_s
        self._numbers = itertools.count(1)
        self._notices: deque[WireMessage] = deque(maxlen=_MAX_NOTICES)
        self._answers: dict[int, tuple[WireMessage, Sequence[Bytes]]] = {}
        self._awaited: set[int] = set()
        self._socket = connected_socket(zmq.DEALER, endpoint, keys)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.disconnect()

    def disconnect(self) -> None:
        """Close the connection; sessions stay open."""
        self._socket.close(linger=0)

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

    def _ask(
        self, message: WireMessage, reply: type[Reply], bodies: Sequence[Bytes], timeout_s: float | None
    ) -> tuple[Reply, Sequence[Bytes]]:
        numbered = message.model_copy(update={"request_id": next(self._numbers)})
        return self._wait(numbered.request_id, reply, encode(numbered, bodies), timeout_s)

    def _wait(
        self, number: int, reply: type[Reply], frames: list[Bytes] | None, timeout_s: float | None
    ) -> tuple[Reply, Sequence[Bytes]]:
        """Wait for the answer to a request, sending `frames` now and whenever nothing came for a while."""
        started = send_at = time.monotonic()
        deadline = started + (self.timeout_s if timeout_s is None else timeout_s)
        self._awaited.add(number)
        try:
            while number not in self._answers:
                now = time.monotonic()
                if now >= deadline:
                    raise ServiceSilentError("The service did not answer in time; keep to the approved schedule.")
                if frames is not None and now >= send_at:
                    if send_at > started:  # the answer may take its time, but is the service there?
                        self._send(encode(Ping(request_id=next(self._numbers))), deadline)
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
        self.heard_at = time.monotonic()
        self._take(message, bodies)
        return True

    def _take(self, message: WireMessage, bodies: Sequence[Bytes]) -> None:
        """Put a message where it is looked for."""
        if message.request_id == 0:
            self._notices.append(message)
        elif message.request_id in self._awaited:
            self._answers[message.request_id] = message, bodies

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
