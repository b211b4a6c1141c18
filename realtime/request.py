"""A client's message on arrival, beside its decoded form: who sent it, and the frames that the journal keeps as they came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from scansteer.realtime.codec import Bytes


class Request(NamedTuple):
    identity: bytes
    """Of the connection; where the answer goes."""
    frames: Sequence[Bytes]
    """Envelope and bodies."""
    user: str = ""
    """Name of the key that the client connected with; empty where no keys are used."""
