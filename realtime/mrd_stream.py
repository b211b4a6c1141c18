"""MRD version 1 as a message stream in a file: uint16 identifier, body; the next message is found only by reading this one."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import ismrmrd
import numpy as np

from scansteer.realtime.images import DTYPES, HEADER_BYTES, MAX_META_BYTES, MAX_VOXELS
from scansteer.realtime.stored import Index, make_entry

CONFIG_FILE, CONFIG_TEXT, HEADER, CLOSE, TEXT, ERROR = 1, 2, 3, 4, 5, 8
ACQUISITION, IMAGE, WAVEFORM = 1008, 1022, 1026


class _Ends(Exception):
    """The stream cannot be followed any further; says how, as half a sentence."""


def looks_like_a_stream(start: bytes) -> bool:
    """Whether a file that starts like this may be a message stream."""
    return len(start) >= 2 and int.from_bytes(start[:2], "little") in (CLOSE, *_SKIPS, HEADER, IMAGE)


def index_stream(path: Path) -> tuple[Index, Callable[[], None]]:
    """Find the images of a message stream by walking over it once, skipping pixels.

    Returns
    -------
    The index, whose entries read from the open file, and the function that closes it.
    """
    file = path.open("rb")
    index = Index()
    try:
        walk = _Walk(file)
        while walk.remaining and _follow(walk, index):
            pass
    except _Ends as end:
        index.cut = str(end)
    except BaseException:
        file.close()
        raise
    return index, file.close


class _Walk:
    """A place in the stream; every step is compared with what is left before it is taken."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.length = os.fstat(file.fileno()).st_size
        self.message_start = 0

    @property
    def remaining(self) -> int:
        return self.length - self.file.tell()

    def take(self, count: int) -> bytes:
        self._check(count)
        return self.file.read(count)

    def skip(self, count: int) -> None:
        self._check(count)
        self.file.seek(count, io.SEEK_CUR)

    def number(self, n_bytes: int) -> int:
        return int.from_bytes(self.take(n_bytes), "little")

    def _check(self, count: int) -> None:
        if count > self.remaining:
            raise _Ends(f"is cut off within the message at byte {self.message_start} of {self.length}")


def _follow(walk: _Walk, index: Index) -> bool:
    """Take note of one message; false at the end of the stream."""
    walk.message_start = walk.file.tell()
    identifier = walk.number(2)
    if identifier == CLOSE:
        return False
    if identifier == HEADER:
        index.xml = walk.take(walk.number(4))
    elif identifier == IMAGE:
        _note_image(walk, index)
    elif identifier in _SKIPS:
        _SKIPS[identifier](walk)
    else:
        raise _Ends(f"has an unknown message ({identifier}) at byte {walk.message_start}")
    return True


def _note_image(walk: _Walk, index: Index) -> None:
    start = walk.file.tell()
    header = ismrmrd.ImageHeader.from_buffer_copy(walk.take(HEADER_BYTES))
    meta_length = walk.number(8)
    n_values = int(np.prod([header.channels, *header.matrix_size], dtype=np.uint64))
    if header.data_type not in DTYPES or n_values > MAX_VOXELS or meta_length > MAX_META_BYTES:
        raise _Ends(
            f"has an image at byte {walk.message_start} that is not accepted "
            f"({n_values} values of type {header.data_type}, {meta_length} bytes of Meta)"
        )
    meta = walk.take(meta_length)
    walk.skip(n_values * np.dtype(DTYPES[header.data_type]).itemsize)
    end = walk.file.tell()

    def read() -> bytes:
        walk.file.seek(start)
        return walk.file.read(end - start)

    place = f"the image at byte {walk.message_start}"
    index.entries.append(make_entry(f"series {header.image_series_index}", header, meta, place, read))


def _skip_acquisition(walk: _Walk) -> None:
    header = ismrmrd.AcquisitionHeader.from_buffer_copy(walk.take(340))
    per_sample = 4 * int(header.trajectory_dimensions) + 8 * int(header.active_channels)
    walk.skip(int(header.number_of_samples) * per_sample)


def _skip_waveform(walk: _Walk) -> None:
    header = ismrmrd.WaveformHeader.from_buffer_copy(walk.take(40))
    walk.skip(4 * int(header.channels) * int(header.number_of_samples))


_SKIPS: dict[int, Callable[[_Walk], None]] = {
    CONFIG_FILE: lambda walk: walk.skip(1024),
    CONFIG_TEXT: lambda walk: walk.skip(walk.number(4)),
    TEXT: lambda walk: walk.skip(walk.number(4)),
    ERROR: lambda walk: walk.skip(walk.number(8)),
    ACQUISITION: _skip_acquisition,
    WAVEFORM: _skip_waveform,
}
