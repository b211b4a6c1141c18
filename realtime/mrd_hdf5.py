"""MRD version 1 in HDF5: any group with the datasets `header` and `data` holds images; a file cut off gives what is left."""

from __future__ import annotations

import io
import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import h5py
import ismrmrd
import numpy as np

from scansteer.core.errors import InputError
from scansteer.realtime.images import HEADER_BYTES, MAX_VOXELS, ROLES
from scansteer.realtime.stored import Entry, Index, key_of, make_entry

SIGNATURE = b"\x89HDF\r\n\x1a\n"

# What h5py raises for damaged structures.
_DAMAGE = (KeyError, OSError, RuntimeError, ValueError)


class _Padded(io.RawIOBase):
    """A file that was cut off, shown at the length it should have: HDF5 opens nothing shorter.

    What is missing reads as 0xff bytes, which no HDF5 structure begins with (heaps of zeros make the library loop for ever).
    """

    def __init__(self, file: BinaryIO, length: int) -> None:
        self._file, self._length, self._position = file, length, 0
        self._available = os.fstat(file.fileno()).st_size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = min(len(buffer), max(self._length - self._position, 0))
        self._file.seek(min(self._position, self._available))
        data = self._file.read(wanted)
        buffer[:wanted] = data + b"\xff" * (wanted - len(data))
        self._position += wanted
        return wanted

    def close(self) -> None:
        self._file.close()
        super().close()


def index_hdf5(path: Path) -> tuple[Index, Callable[[], None]]:
    """Find the images of an HDF5 file.

    Returns
    -------
    The index, whose entries read from the open file, and the function that closes it.

    Raises
    ------
    InputError
        Not HDF5, damaged, or without a group that could hold a data set.
    """
    file, close, cut = _open(path)
    try:
        dataset = _dataset_group(file, path)
        index = Index(xml=_header_xml(dataset), cut=cut)
        available = path.stat().st_size if cut else None
        for name in sorted(dataset, key=_natural):
            try:
                index.entries += _group_entries(dataset, name, available)
            except _DAMAGE:
                if cut is None:
                    raise
                index.lost.append(f"group {name!r}")
        return index, close
    except InputError:
        close()
        raise
    except _DAMAGE as error:
        close()
        raise InputError(f"{path} {cut or 'is damaged'}; its images cannot be found ({error}).") from error


def _open(path: Path) -> tuple[h5py.File, Callable[[], None], str | None]:
    """The file, what closes it, and how it is cut off."""
    try:
        file = h5py.File(path, "r")
        return file, file.close, None
    except OSError as error:
        announced = re.search(r"truncated file.*stored_eof = (\d+)", str(error))
        if not announced:
            raise InputError(f"{path} is not a readable HDF5 file: {error}.") from error
    length = int(announced[1])
    cut = f"is cut off after {path.stat().st_size} of {length} bytes"
    padded = _Padded(path.open("rb"), length)
    try:
        file = h5py.File(padded, "r")
    except _DAMAGE as error:
        padded.close()
        raise InputError(f"{path} {cut}; nothing in it can be read.") from error

    def close() -> None:
        file.close()
        padded.close()

    return file, close, cut


def _dataset_group(file: h5py.File, path: Path) -> h5py.Group:
    """The group `dataset`, else the only group of the file."""
    names = list(file)
    name = "dataset" if "dataset" in names else names[0] if len(names) == 1 else None
    group = file.get(name) if name else None
    if not isinstance(group, h5py.Group):
        raise InputError(f"{path} is HDF5 but not MRD: it has no group 'dataset' (found: {', '.join(names) or 'nothing'}).")
    return group


def _header_xml(dataset: h5py.Group) -> bytes:
    """The ISMRMRD header; empty when it is missing or lost, as scanners and accidents have it."""
    try:
        return bytes(dataset["xml"][0])  # type: ignore[index]
    except (*_DAMAGE, TypeError):
        return b""


def _group_entries(dataset: h5py.Group, name: str, available: int | None) -> list[Entry]:
    """Entries of a group, none if it does not hold images."""
    group = dataset[name]
    if not isinstance(group, h5py.Group) or not {"header", "data"} <= set(group):
        return []
    headers, data = group["header"], group["data"]
    if not isinstance(headers, h5py.Dataset) or not isinstance(data, h5py.Dataset):
        return []
    if headers.dtype.itemsize != HEADER_BYTES or data.ndim != 5:
        return []
    return [_entry(group, headers, data, number, available) for number in range(len(headers))]


def _entry(group: h5py.Group, headers: h5py.Dataset, data: h5py.Dataset, number: int, available: int | None) -> Entry:
    name = str(group.name).rsplit("/", 1)[-1]
    place = f"image {number} of group {name!r}"

    def read() -> bytes:
        return _message(group, number)

    if available is not None and not all(_row_is_whole(part, number, available) for part in (headers, data)):
        known = _row_is_whole(headers, number, available)
        key = key_of(_image_header(headers, number)) if known else (number, 0, 0, 0)
        return Entry(name, key, place, read, role=ROLES.get(name.upper(), "image"), is_whole=False)
    return make_entry(name, _image_header(headers, number), _attributes(group, number), place, read)


def _row_is_whole(dataset: h5py.Dataset, number: int, available: int) -> bool:
    """Whether all bytes of a row lie before the end of the file."""
    try:
        if dataset.chunks is None:
            offset = dataset.id.get_offset() or 0
            return offset + (number + 1) * dataset.id.get_storage_size() // len(dataset) <= available
        first = number // dataset.chunks[0] * dataset.chunks[0]
        others = [range(0, size, step) for size, step in zip(dataset.shape[1:], dataset.chunks[1:], strict=True)]
        chunks = (dataset.id.get_chunk_info_by_coord((first, *place)) for place in itertools.product(*others))
        return all(chunk.byte_offset is not None and chunk.byte_offset + chunk.size <= available for chunk in chunks)
    except _DAMAGE:
        return False


def _image_header(headers: h5py.Dataset, number: int) -> ismrmrd.ImageHeader:
    return ismrmrd.ImageHeader.from_buffer_copy(headers[number].tobytes())


def _attributes(group: h5py.Group, number: int) -> bytes:
    """Meta text of an image; empty when there is none."""
    if "attributes" not in group:
        return b""
    text = group["attributes"][number]  # type: ignore[index]
    return text if isinstance(text, bytes) else str(text).encode("utf-8")


def _message(group: h5py.Group, number: int) -> bytes:
    """Message body of a stored image; pixels untouched."""
    header = _image_header(group["header"], number)  # type: ignore[arg-type]
    n_values = int(np.prod([header.channels, *header.matrix_size], dtype=np.uint64))
    if n_values > MAX_VOXELS:
        raise InputError(f"its header declares {n_values} values, more than the {MAX_VOXELS} that are accepted")
    text = _attributes(group, number)
    header.attribute_string_len = len(text)
    return bytes(header) + len(text).to_bytes(8, "little") + text + group["data"][number].tobytes()  # type: ignore[index]


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort key in which image_2 comes before image_10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]
