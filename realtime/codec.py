"""Messages to frames and back: pure inverses that need no socket.

Frames: one msgpack envelope, then the bodies that the message's kind has. Checked in this order, before anything is believed:
number of frames, sizes, envelope, version, kind, fields, number and sizes of bodies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
MAX_ITEMS = 4096
"""In any list or mapping of an envelope: what is wrong with each of a million would take minutes and gigabytes to say."""

_VALIDATORS: dict[str, Callable[[dict[str, Any]], WireMessage]] = {
    model.model_fields["kind"].default: model.__pydantic_validator__.validate_python for model in (*REQUESTS, *REPLIES)
}
"""What `model_validate` calls, by kind."""
_REQUESTED = frozenset(model.model_fields["kind"].default for model in REQUESTS)


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


class AnswerEncoder:
    """Encodes messages of one kind whose values were checked already, in a fraction of the time of `encode`. One thread uses it."""

    def __init__(self, kind: type[WireMessage]) -> None:
        self._defaults = {name: field.default for name, field in kind.model_fields.items() if not field.is_required()}
        self._packer = msgpack.Packer()

    def __call__(self, **values: Any) -> list[Bytes]:
        """The frames of `encode(kind(**values))`."""
        return [self._packer.pack(self._defaults | values)]


def decode(
    frames: Sequence[Bytes], *, max_body_bytes: int = MAX_BODY_BYTES, requests_only: bool = False
) -> tuple[WireMessage, Sequence[Bytes]]:
    """The message and the bodies of frames that a peer sent; `requests_only`: what a service says itself is not looked at.

    Raises
    ------
    ProtocolError
        One sentence naming what is wrong, with a code.
    """
    _check_sizes(frames, max_body_bytes)
    fields = _unpack(frames[0])
    try:
        message = _validated(fields, requests_only)
    except RecursionError as error:  # from describing what is wrong
        raise ProtocolError("malformed", "The envelope is nested too deeply.") from error
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
    if len(frames[0]) > MAX_ENVELOPE_BYTES:
        raise ProtocolError("too-large", f"The envelope has {len(frames[0])} bytes, more than the {MAX_ENVELOPE_BYTES} accepted.")
    for body in frames[1:]:
        if len(body) > max_body_bytes:
            raise ProtocolError("too-large", f"A body has {len(body)} bytes, more than the {max_body_bytes} accepted.")


def _unpack(envelope: Bytes) -> dict[str, Any]:
    try:
        fields = msgpack.unpackb(envelope, max_array_len=MAX_ITEMS, max_map_len=MAX_ITEMS)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError, OverflowError) as error:
        reason = f"The envelope is not msgpack, or has a list of more than {MAX_ITEMS} items: {type(error).__name__}."
        raise ProtocolError("malformed", reason) from error
    if not isinstance(fields, dict) or not _STRINGS.issuperset(map(type, fields)):
        raise ProtocolError("malformed", "The envelope is not a mapping of field names.")
    return fields


def _validated(fields: dict[str, Any], requests_only: bool) -> WireMessage:
    validate = _validator(fields, requests_only)
    try:
        return validate(fields)
    except ValidationError as error:
        reason = f"Message {fields['kind']!r}: {explain(error, 'realtime/messages.py')}"[:1000]
        raise ProtocolError("malformed", reason, _legible_request_id(fields)) from error


def _validator(fields: dict[str, Any], requests_only: bool) -> Callable[[dict[str, Any]], WireMessage]:
    """For the kind that an envelope names, once its version is one that is spoken."""
    if fields.get("protocol") != PROTOCOL_VERSION:
        version = _shown(fields.get("protocol"))
        reason = f"Protocol version {version} is not spoken here, only {PROTOCOL_VERSION}."
        raise ProtocolError("version", reason, _legible_request_id(fields))
    kind = fields.get("kind")
    validate = _VALIDATORS.get(kind) if isinstance(kind, str) else None
    if validate is None:
        raise ProtocolError("unknown-kind", f"There is no message of kind {_shown(kind)}.", _legible_request_id(fields))
    if requests_only and kind not in _REQUESTED:
        raise ProtocolError("unknown-kind", f"A service does not take messages of kind {kind!r}.", _legible_request_id(fields))
    return validate


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
