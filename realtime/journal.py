"""The journal of one session: an append-only file that is the truth of what was received.

Layout: a 20-byte file mark, then records. A record is a header (mark, sequence number, number of frames), a table of length and
CRC-32 of every frame, a CRC-32 over header and table, and the frames as they came. Lengths can thus be believed even where a
frame is damaged, and a damaged header is skipped by looking for the next one that checks. `append`, then `sync` (fdatasync), and
only then is anything said about the record to anybody.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from scansteer.core.errors import ScansteerError

Bytes = bytes | bytearray | memoryview

FILE_MARK = b"SCANSTEER-JOURNAL-1\n"
_RECORD_MARK = b"\xabREC"
_HEADER = struct.Struct("<4sQI")
_FRAME = struct.Struct("<QI")
_CRC = struct.Struct("<I")
_MAX_FRAMES = 65
_SEARCH_BYTES = 1 << 20


class JournalError(ScansteerError):
    """The journal cannot be written or read; what was accepted before is untouched."""


class DiskFullError(JournalError):
    """There was no room for a record; the journal is as it was before."""


class Entry(NamedTuple):
    """Where a record lies, and what its frames must be."""

    sequence: int
    offset: int
    lengths: tuple[int, ...]
    checksums: tuple[int, ...]

    @property
    def body_offset(self) -> int:
        return self.offset + _HEADER.size + len(self.lengths) * _FRAME.size + _CRC.size

    @property
    def end(self) -> int:
        return self.body_offset + sum(self.lengths)


class Record(NamedTuple):
    """Frames to be written down together."""

    frames: Sequence[Bytes]
    checksums: tuple[int, ...]
    """CRC-32 of every frame."""


class Damage(NamedTuple):
    """A stretch of the file that does not check: offset, and how far it goes."""

    offset: int
    n_bytes: int


class Journal:
    """An open journal. One process writes; entries may be read from any thread."""

    def __init__(self, descriptor: int, path: Path, end: int, next_sequence: int) -> None:
        self._descriptor = descriptor
        self.path = path
        self.end = end
        self.next_sequence = next_sequence
        self._broken = False

    @classmethod
    def create(cls, path: Path) -> Journal:
        """A new journal; the file and its folder's entry are on disk when this returns.

        Raises
        ------
        JournalError
            The file exists, or cannot be written.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            os.write(descriptor, FILE_MARK)
            os.fsync(descriptor)
            sync_folder(path.parent)
        except OSError as error:
            raise JournalError(f"Cannot create journal {path}: {error.strerror}.") from error
        return cls(descriptor, path, len(FILE_MARK), 0)

    @classmethod
    def reopen(cls, path: Path) -> tuple[Journal, list[Entry], list[Damage]]:
        """Go on with a journal after a crash.

        A tail that does not check (torn by the crash, or damaged since) is copied to `NAME.damaged-OFFSET`, if there is room, and
        cut off. Damage before the last good record stays where it is and is passed over.

        Raises
        ------
        JournalError
            Not a journal, or not readable.
        """
        entries, damages = scan(path)
        end = entries[-1].end if entries else len(FILE_MARK)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            size = os.fstat(descriptor).st_size
            if size > end:
                with contextlib.suppress(OSError):  # no room: going on matters more than a copy of what cannot be read
                    _keep_aside(descriptor, path, end, size)
                os.ftruncate(descriptor, end)
                os.fsync(descriptor)
        except OSError as error:
            raise JournalError(f"Cannot go on with journal {path}: {error.strerror}.") from error
        return cls(descriptor, path, end, entries[-1].sequence + 1 if entries else 0), entries, damages

    def append(self, frames: Sequence[Bytes]) -> Entry:
        """Write one record at the end; see `append_all`."""
        return self.append_all([Record(frames, tuple(map(zlib.crc32, frames)))])[0]

    def append_all(self, records: Sequence[Record]) -> list[Entry]:
        """Write records at the end, with one call: all or none. Not durable before `sync` returned.

        Raises
        ------
        DiskFullError
            No room; nothing was appended.
        JournalError
            The disk failed; nothing more can be appended.
        """
        if self._broken:
            raise JournalError(f"Journal {self.path} failed before; restart the service when the disk is well.")
        entries: list[Entry] = []
        parts: list[Bytes] = []
        end = self.end
        for sequence, (frames, checksums) in enumerate(records, start=self.next_sequence):
            entry = Entry(sequence, end, tuple(map(len, frames)), checksums)
            head = _head(entry)
            parts.append(head)
            parts += frames
            entries.append(entry)
            end += len(head) + sum(entry.lengths)
        self._write(end, self.end, parts)
        self.end = end
        self.next_sequence += len(entries)
        return entries

    def sync(self) -> None:
        """Make everything appended durable.

        Raises
        ------
        JournalError
            The disk failed, or the file was deleted. What was appended since the last sync may be lost, and the journal takes no
            more: after a failed sync the kernel may have dropped the pages.
        """
        try:
            os.fdatasync(self._descriptor)
            is_deleted = os.fstat(self._descriptor).st_nlink == 0
        except OSError as error:
            self._broken = True
            raise JournalError(f"Journal {self.path} cannot be made durable: {error.strerror}.") from error
        if is_deleted:
            self._broken = True
            raise JournalError(f"Journal {self.path} was deleted while it was written: what it held is lost with the next restart.")

    def read(self, entry: Entry) -> list[bytes]:
        """The frames of a record.

        Raises
        ------
        JournalError
            The file no longer holds what was written.
        """
        raw = os.pread(self._descriptor, sum(entry.lengths), entry.body_offset)
        return _checked_frames(raw, entry, self.path)

    def close(self) -> None:
        os.close(self._descriptor)

    def _write(self, end: int, offset: int, parts: list[Bytes]) -> None:
        expected = end - offset
        try:
            written = os.pwritev(self._descriptor, parts, offset)
            if written == expected:
                return
            rest = memoryview(b"".join(parts))[written:]
            while rest:
                rest = rest[os.pwrite(self._descriptor, rest, end - len(rest)) :]
        except OSError as error:
            self._undo(offset)
            raise DiskFullError(f"Journal {self.path} has no room for {expected} bytes: {error.strerror}.") from error

    def _undo(self, end: int) -> None:
        try:
            os.ftruncate(self._descriptor, end)
        except OSError:
            self._broken = True


def scan(path: Path) -> tuple[list[Entry], list[Damage]]:
    """Every record of a journal whose header and frames check, in order, and the stretches that do not.

    Raises
    ------
    JournalError
        Not a journal, or not readable.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(FILE_MARK)) != FILE_MARK:
                raise JournalError(f"{path} is not a scansteer journal.")
            return _scan_records(file.fileno(), os.fstat(file.fileno()).st_size, path)
    except OSError as error:
        raise JournalError(f"Cannot read journal {path}: {error.strerror}.") from error


def read_all(path: Path) -> Iterator[tuple[Entry, list[bytes]]]:
    """The good records of a journal that nobody needs to have open, one after the other."""
    entries, _ = scan(path)
    with path.open("rb") as file:
        for entry in entries:
            yield entry, _checked_frames(os.pread(file.fileno(), sum(entry.lengths), entry.body_offset), entry, path)


def read_record(path: Path, entry: Entry) -> list[bytes]:
    """The frames of one record of a journal that nobody needs to have open."""
    with path.open("rb") as file:
        return _checked_frames(os.pread(file.fileno(), sum(entry.lengths), entry.body_offset), entry, path)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _head(entry: Entry) -> bytes:
    n_frames = len(entry.lengths)
    table = [0] * (2 * n_frames)
    table[::2], table[1::2] = entry.lengths, entry.checksums
    head = _head_format(n_frames).pack(_RECORD_MARK, entry.sequence, n_frames, *table)
    return head + _CRC.pack(zlib.crc32(head))


@lru_cache(_MAX_FRAMES)
def _head_format(n_frames: int) -> struct.Struct:
    """`_HEADER` and `n_frames` times `_FRAME`, without padding."""
    return struct.Struct(_HEADER.format + n_frames * _FRAME.format.lstrip("<"))


def _scan_records(descriptor: int, size: int, path: Path) -> tuple[list[Entry], list[Damage]]:
    entries: list[Entry] = []
    damages: list[Damage] = []
    offset = len(FILE_MARK)
    while offset < size:
        entry = _read_entry(descriptor, offset, size)
        if entry is None:
            following = _find_entry(descriptor, offset + 1, size)
            damages.append(Damage(offset, following - offset))
            offset = following
            continue
        try:
            _checked_frames(os.pread(descriptor, sum(entry.lengths), entry.body_offset), entry, path)
            entries.append(entry)
        except JournalError:
            damages.append(Damage(offset, entry.end - offset))
        offset = entry.end
    return entries, damages


def _read_entry(descriptor: int, offset: int, size: int) -> Entry | None:
    """The entry at an offset; none unless mark, checksum and the end of the file agree."""
    head = os.pread(descriptor, _HEADER.size + _MAX_FRAMES * _FRAME.size + _CRC.size, offset)
    if len(head) < _HEADER.size or not head.startswith(_RECORD_MARK):
        return None
    _, sequence, n_frames = _HEADER.unpack_from(head)
    table_end = _HEADER.size + n_frames * _FRAME.size
    if not 1 <= n_frames <= _MAX_FRAMES or len(head) < table_end + _CRC.size:
        return None
    if _CRC.unpack_from(head, table_end)[0] != zlib.crc32(head[:table_end]):
        return None
    table = [_FRAME.unpack_from(head, _HEADER.size + index * _FRAME.size) for index in range(n_frames)]
    entry = Entry(sequence, offset, tuple(length for length, _ in table), tuple(checksum for _, checksum in table))
    return entry if entry.end <= size else None


def _find_entry(descriptor: int, start: int, size: int) -> int:
    """Offset of the next entry at or after `start`; the file's size if there is none."""
    while start < size:
        block = os.pread(descriptor, _SEARCH_BYTES, start)
        index = block.find(_RECORD_MARK)
        while index >= 0:
            if _read_entry(descriptor, start + index, size) is not None:
                return start + index
            index = block.find(_RECORD_MARK, index + 1)
        start += max(len(block) - len(_RECORD_MARK) + 1, 1)
    return size


def _checked_frames(raw: bytes, entry: Entry, path: Path) -> list[bytes]:
    frames: list[bytes] = []
    start = 0
    for length, checksum in zip(entry.lengths, entry.checksums, strict=True):
        frame = raw[start : start + length]
        if len(frame) != length or zlib.crc32(frame) != checksum:
            raise JournalError(f"Record {entry.sequence} of journal {path} is damaged.")
        frames.append(frame)
        start += length
    return frames


def _keep_aside(descriptor: int, path: Path, start: int, end: int) -> None:
    aside = path.with_name(f"{path.name}.damaged-{start}")
    with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        while start < end:
            block = os.pread(descriptor, min(_SEARCH_BYTES, end - start), start)
            if not block:
                break
            file.write(block)
            start += len(block)
