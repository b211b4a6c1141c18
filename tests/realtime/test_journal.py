"""The journal: what was accepted is there after any crash, and damage never spreads."""

from __future__ import annotations

import contextlib
import errno
import os
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scansteer.realtime import journal
from scansteer.realtime.journal import DiskFullError, Journal, JournalError, Record

RECORDS = [[b"open"], [b"image", b"a" * 100], [b"image", b""], [b"played"], [b"image", bytes(range(256))]]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal"


def written(path, records=RECORDS):
    book = Journal.create(path)
    entries = [book.append(record) for record in records]
    book.sync()
    book.close()
    return entries


def contents(path):
    return [frames for _, frames in journal.read_all(path)]


def test_records_come_back_as_they_were_written(path):
    entries = written(path)
    assert contents(path) == RECORDS
    assert [entry.sequence for entry in entries] == [0, 1, 2, 3, 4]


def test_a_reopened_journal_goes_on_where_it_was(path):
    written(path)
    book, entries, damages = Journal.reopen(path)
    assert (len(entries), damages) == (5, [])
    assert book.append([b"more"]).sequence == 5
    book.close()
    assert contents(path) == [*RECORDS, [b"more"]]


def test_a_single_record_can_be_read(path):
    entries = written(path)
    book, _, _ = Journal.reopen(path)
    assert book.read(entries[4]) == RECORDS[4]
    book.close()


def test_every_truncation_keeps_the_whole_records_before_it(path, tmp_path):
    entries = written(path)
    content = path.read_bytes()
    for length in range(len(journal.FILE_MARK), len(content)):
        cut = tmp_path / f"cut-{length}"
        cut.write_bytes(content[:length])
        whole = sum(entry.end <= length for entry in entries)
        book, found, _ = Journal.reopen(cut)
        book.append([b"after"])
        book.close()
        assert len(found) == whole
        assert contents(cut) == [*RECORDS[:whole], [b"after"]]


def test_every_single_flipped_bit_costs_at_most_its_own_record(path, tmp_path):
    entries = written(path)
    content = path.read_bytes()
    for position in range(len(journal.FILE_MARK), len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        copy = tmp_path / "flipped"
        copy.write_bytes(flipped)
        hit = next(index for index, entry in enumerate(entries) if position < entry.end)
        assert contents(copy) == [record for index, record in enumerate(RECORDS) if index != hit]


def test_a_damaged_tail_is_kept_aside(path):
    entries = written(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    book, found, damages = Journal.reopen(path)
    book.close()
    assert len(found) == 4
    assert damages[0].offset == entries[4].offset
    aside = path.with_name(f"journal.damaged-{entries[4].offset}")
    assert aside.read_bytes() == bytes(content[entries[4].offset :])


def test_a_full_disk_leaves_the_journal_as_it_was(path, monkeypatch):
    book = Journal.create(path)
    book.append([b"first"])
    really_write = os.pwritev

    def half_then_full(descriptor, parts, offset):
        really_write(descriptor, [b"".join(parts)[:10]], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwritev", half_then_full)
    with pytest.raises(DiskFullError, match="no room"):
        book.append([b"second"])
    monkeypatch.undo()
    book.append([b"third"])
    book.sync()
    book.close()
    assert contents(path) == [[b"first"], [b"third"]]


def test_records_that_are_written_together_are_there_together_or_not_at_all(path, monkeypatch):
    book = Journal.create(path)
    records = [Record((b"image", bytes([number]) * 50), (zlib.crc32(b"image"), zlib.crc32(bytes([number]) * 50))) for number in range(3)]
    assert [entry.sequence for entry in book.append_all(records)] == [0, 1, 2]
    really_write = os.pwritev

    def half_then_full(descriptor, parts, offset):
        really_write(descriptor, [b"".join(parts)[:200]], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwritev", half_then_full)
    with pytest.raises(DiskFullError, match="no room"):
        book.append_all(records)
    monkeypatch.undo()
    assert book.append([b"next"]).sequence == 3
    book.close()
    assert contents(path) == [*(list(record.frames) for record in records), [b"next"]]
    assert journal.scan(path)[1] == []


def test_a_write_that_is_cut_short_is_completed(path, monkeypatch):
    book = Journal.create(path)
    really_write = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda descriptor, parts, offset: really_write(descriptor, [b"".join(parts)[:10]], offset))
    book.append([b"x" * 1000, b"y" * 10])
    monkeypatch.undo()
    book.close()
    assert contents(path) == [[b"x" * 1000, b"y" * 10]]


def test_after_a_failed_sync_nothing_more_is_taken(path, monkeypatch):
    book = Journal.create(path)
    book.append([b"first"])

    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(JournalError, match="cannot be made durable"):
        book.sync()
    monkeypatch.undo()
    with pytest.raises(JournalError, match="failed before"):
        book.append([b"second"])
    book.close()


def test_a_journal_that_was_deleted_takes_nothing_more(path):
    with contextlib.closing(Journal.create(path)) as opened:
        opened.append([b"a"])
        opened.sync()
        path.unlink()
        opened.append([b"b"])
        with pytest.raises(JournalError, match="was deleted"):
            opened.sync()
        with pytest.raises(JournalError, match="failed before"):
            opened.append([b"c"])


def test_a_file_that_is_not_a_journal_is_refused_and_left_alone(path):
    path.write_bytes(b"something else entirely")
    with pytest.raises(JournalError, match="not a scansteer journal"):
        Journal.reopen(path)
    assert path.read_bytes() == b"something else entirely"


def test_a_journal_is_never_overwritten(path):
    written(path)
    with pytest.raises(JournalError, match="Cannot create"):
        Journal.create(path)


def test_a_journal_is_readable_by_its_owner_only(path):
    written(path)
    assert path.stat().st_mode & 0o077 == 0


@settings(max_examples=60, deadline=None)
@given(
    records=st.lists(st.lists(st.binary(max_size=60), min_size=1, max_size=4), max_size=6),
    junk=st.binary(max_size=200),
    after=st.lists(st.lists(st.binary(max_size=60), min_size=1, max_size=3), max_size=3),
)
def test_junk_between_records_is_passed_over(tmp_path_factory, records, junk, after):
    path = tmp_path_factory.mktemp("journal") / "journal"
    written(path, records)
    content = path.read_bytes()
    other = path.with_name("other")
    written(other, after)
    path.write_bytes(content + junk + other.read_bytes()[len(journal.FILE_MARK) :])
    assert contents(path) == records + after


def test_without_room_for_a_copy_of_the_torn_tail_the_journal_goes_on_all_the_same(path, monkeypatch):
    written(path)
    with path.open("ab") as file:
        file.write(b"\xabREC torn")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(journal, "_keep_aside", full)
    book, entries, _ = Journal.reopen(path)
    book.close()
    assert len(entries) == 5
    assert contents(path) == RECORDS


def test_a_journal_that_may_not_be_written_is_named(path, monkeypatch):
    written(path)

    def forbidden(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", forbidden)
    with pytest.raises(JournalError, match=r"Cannot go on with journal.*Permission denied"):
        Journal.reopen(path)
