"""MRD version 1 over a connection: one message after the other, every length compared with a bound before it is read.

A message is a uint16 identifier and a body; nothing says how long the whole is, and nobody finds the next message if this one is
read wrongly. So a message is read completely before anything in it is looked at, and an identifier that is not known ends the
connection. Two dialects: *fire* ends strings in a counted NUL and exchanges TEXT; *gadgetron* does neither, and knows ERROR.
Reading is liberal (a string ends at its first NUL), writing strict.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import ismrmrd
import numpy as np

from scansteer.core.errors import InputError
from scansteer.realtime.config import ImageLimits
from scansteer.realtime.images import DTYPES, HEADER_BYTES, MAX_META_BYTES
from scansteer.realtime.mrd_stream import ACQUISITION, CLOSE, CONFIG_FILE, CONFIG_TEXT, ERROR, HEADER, IMAGE, TEXT, WAVEFORM

Dialect = Literal["fire", "gadgetron"]
ReadExactly = Callable[[int], bytes]
"""Returns exactly so many bytes, or raises."""

CONFIG_FILE_BYTES = 1024
MAX_TEXT_BYTES = 2**22
MAX_DATA_BYTES = 2**28
"""Of one acquisition or waveform, which are skipped."""
_ACQUISITION_HEADER_BYTES = 340
_WAVEFORM_HEADER_BYTES = 40
_CHUNK_BYTES = 2**20


class StreamError(InputError):
    """The connection cannot be followed any further."""


class MrdMessage(NamedTuple):
    """A message as it came: the body without its identifier; empty for data that was skipped."""

    identifier: int
    body: bytes

    @property
    def frame(self) -> bytes:
        """The message as it goes on, unchanged."""
        return self.identifier.to_bytes(2, "little") + self.body


def read_message(read_exactly: ReadExactly, limits: ImageLimits) -> MrdMessage:
    """Read one message to its end.

    Raises
    ------
    StreamError
        Unknown identifier, or a length beyond its bound.
    """
    identifier = int.from_bytes(read_exactly(2), "little")
    reader = _READERS.get(identifier)
    if reader is None:
        raise StreamError(f"Message identifier {identifier} is not one of MRD version 1.")
    return MrdMessage(identifier, reader(read_exactly, limits))


def text_of(message: MrdMessage) -> str:
    """The string in a CONFIG_FILE, CONFIG_TEXT, HEADER, TEXT or ERROR, up to its first NUL; what is not UTF-8 is replaced."""
    skip = {CONFIG_FILE: 0, ERROR: 8}.get(message.identifier, 4)
    return message.body[skip:].split(b"\0", 1)[0].decode("utf-8", errors="replace")


def ends_in_nul(message: MrdMessage) -> bool:
    """Whether a counted string was sent the way the fire dialect does."""
    return message.identifier in (CONFIG_TEXT, HEADER, TEXT) and message.body[4:].endswith(b"\0")


def image_frame(body: bytes) -> bytes:
    """An IMAGE message."""
    return IMAGE.to_bytes(2, "little") + body


def close_frame() -> bytes:
    return CLOSE.to_bytes(2, "little")


def text_frame(text: str, dialect: Dialect) -> bytes | None:
    """A TEXT message; none in the gadgetron dialect, where it would end the chain."""
    if dialect == "gadgetron":
        return None
    return _counted(TEXT, text.encode("utf-8") + b"\0", 4)


def failure_frame(text: str, dialect: Dialect) -> bytes:
    """How a dialect says that something failed: TEXT in fire; in gadgetron ERROR and CLOSE, and nothing can follow.

    Gadgetron sends no image after an ERROR, and reports it when the CLOSE comes.
    """
    if dialect == "gadgetron":
        return _counted(ERROR, text.encode("utf-8"), 8) + close_frame()
    return _counted(TEXT, f"ERROR {text}".encode() + b"\0", 4)


def _counted(identifier: int, content: bytes, n_length_bytes: int) -> bytes:
    return identifier.to_bytes(2, "little") + len(content).to_bytes(n_length_bytes, "little") + content


def _read_config_file(read_exactly: ReadExactly, limits: ImageLimits) -> bytes:
    return read_exactly(CONFIG_FILE_BYTES)


def _read_counted(n_length_bytes: int) -> Callable[[ReadExactly, ImageLimits], bytes]:
    def read(read_exactly: ReadExactly, limits: ImageLimits) -> bytes:
        head = read_exactly(n_length_bytes)
        length = int.from_bytes(head, "little")
        if length > MAX_TEXT_BYTES:
            raise StreamError(f"A text of {length} bytes is announced, more than the {MAX_TEXT_BYTES} accepted.")
        return head + read_exactly(length)

    return read


def _read_nothing(read_exactly: ReadExactly, limits: ImageLimits) -> bytes:
    return b""


def _read_image(read_exactly: ReadExactly, limits: ImageLimits) -> bytes:
    head = read_exactly(HEADER_BYTES + 8)
    header = ismrmrd.ImageHeader.from_buffer_copy(head)
    n_values = int(header.channels) * math.prod(int(size) for size in header.matrix_size)
    n_meta = int.from_bytes(head[HEADER_BYTES:], "little")
    if header.data_type not in DTYPES:
        raise StreamError(f"An image of data type {header.data_type} is announced; MRD knows 1 to 8.")
    n_data = n_values * np.dtype(DTYPES[header.data_type]).itemsize
    if n_values > limits.max_voxels or n_data > limits.max_image_bytes:
        raise StreamError(f"An image of {n_values} values is announced, more than the {limits.max_voxels} accepted.")
    if n_meta > MAX_META_BYTES:
        raise StreamError(f"An image with {n_meta} bytes of Meta is announced, more than the {MAX_META_BYTES} accepted.")
    return head + read_exactly(n_meta + n_data)


def _skip_acquisition(read_exactly: ReadExactly, limits: ImageLimits) -> bytes:
    header = ismrmrd.AcquisitionHeader.from_buffer_copy(read_exactly(_ACQUISITION_HEADER_BYTES))
    per_sample = 4 * int(header.trajectory_dimensions) + 8 * int(header.active_channels)
    return _skip(read_exactly, int(header.number_of_samples) * per_sample, "acquisition")


def _skip_waveform(read_exactly: ReadExactly, limits: ImageLimits) -> bytes:
    header = ismrmrd.WaveformHeader.from_buffer_copy(read_exactly(_WAVEFORM_HEADER_BYTES))
    return _skip(read_exactly, 4 * int(header.channels) * int(header.number_of_samples), "waveform")


def _skip(read_exactly: ReadExactly, count: int, what: str) -> bytes:
    if count > MAX_DATA_BYTES:
        raise StreamError(f"An {what} of {count} bytes is announced, more than the {MAX_DATA_BYTES} accepted.")
    while count:
        count -= len(read_exactly(min(count, _CHUNK_BYTES)))
    return b""


_READERS: dict[int, Callable[[ReadExactly, ImageLimits], bytes]] = {
    CONFIG_FILE: _read_config_file,
    CONFIG_TEXT: _read_counted(4),
    HEADER: _read_counted(4),
    CLOSE: _read_nothing,
    TEXT: _read_counted(4),
    ERROR: _read_counted(8),
    ACQUISITION: _skip_acquisition,
    IMAGE: _read_image,
    WAVEFORM: _skip_waveform,
}
