"""What the holder of a key may do: watch, send images, or everything."""

from __future__ import annotations

from scansteer.realtime.codec import ProtocolError
from scansteer.realtime.config import Role
from scansteer.realtime.messages import (
    Close,
    GetDecision,
    GetMaps,
    GetMetrics,
    GetStatus,
    Image,
    Missing,
    Open,
    Ping,
    WireMessage,
)

_WATCHING = (Ping, GetStatus, GetMetrics, GetDecision, GetMaps)
_SENDING = (*_WATCHING, Open, Image, Missing, Close)
_MAY: dict[Role, tuple[type[WireMessage], ...]] = {"watch": _WATCHING, "images": _SENDING, "control": (WireMessage,)}
_ONLY: dict[Role, str] = {"watch": "watch", "images": "send images and watch"}


def check_role(role: Role, message: WireMessage) -> None:
    """
    Raises
    ------
    ProtocolError
        Who connected with this key may not say this.
    """
    if not isinstance(message, _MAY[role]):
        kind = type(message).model_fields["kind"].default
        raise ProtocolError("not-allowed", f"This key may only {_ONLY[role]}; a {kind!r} message is not for it.", message.request_id)
