"""What the service is going to say, and what of it has to wait until the disk is sure of it."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from scansteer.realtime.codec import Bytes, encode
from scansteer.realtime.messages import WireMessage


class Outgoing(NamedTuple):
    """Frames for one client, or for every watcher (`identity` None; the first frame is then the session)."""

    identity: bytes | None
    frames: list[Bytes]


def to(identity: bytes, message: WireMessage) -> Outgoing:
    """A message for one client."""
    return Outgoing(identity, encode(message))


class Outbox:
    """Answers that are held back until their session's journal is durable."""

    def __init__(self) -> None:
        self.dirty: set[str] = set()
        """Sessions whose journal was written to since the last `release`."""
        self._held: list[tuple[str, Outgoing]] = []

    def hold(self, session_id: str, *outgoing: Outgoing) -> list[Outgoing]:
        """Keep answers back; there is nothing to send now."""
        self.dirty.add(session_id)
        self._held += [(session_id, out) for out in outgoing]
        return []

    def release(self, failed: Collection[str]) -> tuple[list[Outgoing], list[tuple[str, Outgoing]]]:
        """Everything held, now that journals are durable: what goes out, and what belongs to sessions whose journal failed."""
        held, self._held = self._held, []
        self.dirty.clear()
        if not failed:
            return [out for _, out in held], []
        good = [out for session_id, out in held if session_id not in failed]
        return good, [(session_id, out) for session_id, out in held if session_id in failed]
