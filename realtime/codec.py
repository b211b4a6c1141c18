"""Messages to frames and back: pure inverses that need no socket.

Frames: one msgpack envelope, then the bodies that the message's kind has. Checked in this order, before anything is believed:
number of frames, sizes, envelope, version, kind, fields, number and sizes of bodies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import msgpack
import numpy as np
from pydantic import ValidationError

from scansteer.core.errors import InputError
from scansteer.protocols.scan import explain
from scansteer.realtime.messages import (
    PROTOCOL_VERSION,
    REPLIES,
    REQUESTS,
    ArraySpec,
    Image,
    Maps,
    RefusalCode,
    WireMessage,
)

Bytes = bytes | bytearray | memoryview

_STRINGS = frozenset([str])
MAX_ENVELOPE_BYTES = 2**20
MAX_BODIES = 64
MAX_BODY_BYTES = 2**28

_KINDS: dict[str, type[WireMessage]] = {model.model_fields["kind"].default: model for model in (*REQUESTS, *REPLIES)}


class ProtocolError(InputError):
    """A message that is not understood; `code` says in which way, `request_id` to whom the answer goes if it was legible."""

    def __init__(self, code: RefusalCode, reason: str, request_id: int = 0) -> None:
        super().__init__(reason)
        self.code: RefusalCode = code
        self.request_id = request_id


def encode(message: WireMessage, bodies: Iterable[Bytes] = ()) -> list[Bytes]:
    """The frames of a message."""
    envelope: bytes = msgpack.packb(message.model_dump())  # type: ignore[assignment]  # None only for a stream
    return [envelope, *bodies]


def encode_answer(kind: type[WireMessage], **values: Any) -> list[Bytes]:
    """The frames of a message whose values were checked already: `encode(kind(**values))` in a fraction of the time."""
    envelope: bytes = msgpack.packb({**_defaults(kind), **values})  # type: ignore[assignment]
    return [envelope]


@cache
def _defaults(kind: type[WireMessage]) -> dict[str, Any]:
    return {name: field.default for name, field in kind.model_fields.items() if not field.is_required()}


def decode(frames: Sequence[Bytes], *, max_body_bytes: int = MAX_BODY_BYTES) -> tuple[WireMessage, Sequence[Bytes]]:
    """The message and the bodies of frames that a peer sent.

    Raises
    ------
    ProtocolError
        One sentence naming what is wrong, with a code.
    """
    _check_sizes(frames, max_body_bytes)
    fields = _unpack(frames[0])
    request_id = _legible_request_id(fields)
    if fields.get("protocol") != PROTOCOL_VERSION:
        raise ProtocolError(
            "version",
            f"Protocol version {_shown(fields.get('protocol'))} is not spoken here, only {PROTOCOL_VERSION}.",
            request_id,
        )
    kind = fields.get("kind")
    model = _KINDS.get(kind) if isinstance(kind, str) else None
    if model is None:
        raise ProtocolError("unknown-kind", f"There is no message of kind {_shown(kind)}.", request_id)
    try:
        message = model.model_validate(fields)
    except ValidationError as error:
        raise ProtocolError("malformed", f"Message {kind!r}: {explain(error)}"[:1000], request_id) from error
    bodies = frames[1:]
    _check_bodies(message, bodies)
    return message, bodies


def encode_arrays(arrays: dict[str, np.ndarray]) -> tuple[tuple[ArraySpec, ...], list[bytes]]:
    """Descriptions and bodies of named arrays, which travel as little-endian float32."""
    specs = tuple(ArraySpec(name=name, shape=array.shape) for name, array in arrays.items())
    return specs, [np.ascontiguousarray(array, "<f4").tobytes() for array in arrays.values()]


def decode_arrays(specs: Sequence[ArraySpec], bodies: Sequence[Bytes]) -> dict[str, np.ndarray]:
    """Inverse of `encode_arrays`; the arrays are read-only views of the bodies."""
    return {
        spec.name: np.frombuffer(body, "<f4").reshape(spec.shape)  # the sizes were compared by decode
        for spec, body in zip(specs, bodies, strict=True)
    }


def _check_sizes(frames: Sequence[Bytes], max_body_bytes: int) -> None:
    if not 1 <= len(frames) <= 1 + MAX_BODIES:
        raise ProtocolError("malformed", f"A message has 1 to {1 + MAX_BODIES} frames, got {len(frames)}.")
    envelope, *bodies = map(len, frames)
    if envelope > MAX_ENVELOPE_BYTES:
        raise ProtocolError("too-large", f"The envelope has {envelope} bytes, more than the {MAX_ENVELOPE_BYTES} accepted.")
    if bodies and max(bodies) > max_body_bytes:
        raise ProtocolError("too-large", f"A body has {max(bodies)} bytes, more than the {max_body_bytes} accepted.")


def _unpack(envelope: Bytes) -> dict[str, Any]:
    try:
        fields = msgpack.unpackb(envelope)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError, OverflowError) as error:
        raise ProtocolError("malformed", f"The envelope is not msgpack: {type(error).__name__}.") from error
    if not isinstance(fields, dict) or not _STRINGS.issuperset(map(type, fields)):
        raise ProtocolError("malformed", "The envelope is not a mapping of field names.")
    return fields


def _legible_request_id(fields: dict[str, Any]) -> int:
    value = fields.get("request_id")
    return value if type(value) is int and 0 <= value <= 2**53 else 0


def _check_bodies(message: WireMessage, bodies: Sequence[Bytes]) -> None:
    expected = 1 if isinstance(message, Image) else len(message.arrays) if isinstance(message, Maps) else 0
    if len(bodies) != expected:
        kind = type(message).model_fields["kind"].default
        raise ProtocolError("malformed", f"Message {kind!r} has {expected} bodies, got {len(bodies)}.", message.request_id)
    if isinstance(message, Maps):
        for spec, body in zip(message.arrays, bodies, strict=True):
            if len(body) != spec.n_bytes:
                raise ProtocolError(
                    "malformed",
                    f"Array {spec.name} has {len(body)} bytes, its shape asks for {spec.n_bytes}.",
                    message.request_id,
                )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
