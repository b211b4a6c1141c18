"""Listens to decisions, from beside."""

from __future__ import annotations

import time

import zmq

from scansteer.realtime.codec import ProtocolError, decode
from scansteer.realtime.config import DEFAULT_PUBLISH_ENDPOINT, Keys
from scansteer.realtime.connection import connected_socket, milliseconds
from scansteer.realtime.messages import Decision, DecisionMessage


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
