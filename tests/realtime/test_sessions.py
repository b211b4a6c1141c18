"""Sessions on disk: listed, exported, purged."""

from __future__ import annotations

import os
import zipfile

import pytest

from scansteer.core.errors import InputError, ScansteerError
from scansteer.protocols.scan import from_yaml
from scansteer.realtime import journal
from scansteer.realtime.client import Client
from scansteer.realtime.sessions import export_session, list_sessions, purge_sessions
from scansteer.realtime.sources import open_source


@pytest.fixture
def data_dir(serve_config, run_service, scan, make_image):
    """A folder with a closed session of three images and an open one of two; the service is stopped."""
    service = run_service(serve_config)
    with Client(service.endpoint) as client:
        for name, count in (("done", 3), ("open", 2)):
            client.open(scan, name)
            for repetition in range(count):
                client.send_image(name, make_image(repetition))
        client.close_session("done")
    service.stop()
    return serve_config.data_dir


def test_sessions_are_listed(data_dir, scan):
    stored = {session.session_id: session for session in list_sessions(data_dir)}
    assert {name: (found.scan, found.n_images, found.closed, found.damaged) for name, found in stored.items()} == {
        "done": (scan.name, 3, True, False),
        "open": (scan.name, 2, False, False),
    }


def test_an_empty_or_absent_folder_holds_no_sessions(tmp_path):
    assert list_sessions(tmp_path / "nowhere") == []
    assert list_sessions(tmp_path) == []
    assert purge_sessions(tmp_path / "nowhere") == []


def test_an_exported_session_can_be_replayed(data_dir, tmp_path, make_image, scan):
    assert export_session(data_dir, "done", tmp_path / "done.zip") == 3
    with zipfile.ZipFile(tmp_path / "done.zip") as archive:
        assert {"scan.yaml", "images.mrd", "decisions.jsonl", "audit.jsonl", "summary.json"} == set(archive.namelist())
        archive.extractall(tmp_path)
    assert from_yaml((tmp_path / "scan.yaml").read_text()) == scan
    with open_source(tmp_path / "images.mrd") as source:
        assert [image.message for image in source.images()] == [make_image(repetition) for repetition in range(3)]


def test_an_unknown_session_is_named_with_those_there_are(data_dir, tmp_path):
    with pytest.raises(InputError, match=r"'nobody'.*done"):
        export_session(data_dir, "nobody", tmp_path / "x.zip")
    with pytest.raises(InputError, match="no session"):
        export_session(data_dir, "../sessions/done", tmp_path / "x.zip")


def test_an_export_overwrites_nothing(data_dir, tmp_path):
    (tmp_path / "x.zip").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        export_session(data_dir, "done", tmp_path / "x.zip")


def test_purging_takes_closed_sessions_only_unless_asked(data_dir):
    assert purge_sessions(data_dir) == ["done"]
    assert [session.session_id for session in list_sessions(data_dir)] == ["open"]
    assert purge_sessions(data_dir, unfinished=True) == ["open"]


def test_purging_spares_what_is_young(data_dir):
    os.utime(data_dir / "done" / "journal", (0, 0))
    assert purge_sessions(data_dir, older_than_days=1, unfinished=True) == ["done"]


def test_nothing_is_purged_under_a_running_service(data_dir, serve_config, run_service):
    run_service(serve_config)
    with pytest.raises(ScansteerError, match="service is running"):
        purge_sessions(data_dir)


def test_a_damaged_session_is_listed_as_such(data_dir):
    path = data_dir / "done" / "journal"
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)
    assert {found.session_id: found.damaged for found in list_sessions(data_dir)} == {"done": True, "open": False}


def test_listing_reads_a_journal_once(data_dir, monkeypatch):
    scanned = []
    really_scan = journal.scan
    monkeypatch.setattr("scansteer.realtime.journal.scan", lambda path: (scanned.append(path), really_scan(path))[1])
    monkeypatch.setattr("scansteer.realtime.journal.read_all", lambda path: pytest.fail("every record was read again"))
    assert {found.session_id: (found.n_images, found.scan) for found in list_sessions(data_dir)} == {
        "done": (3, "larg-phantom-9.4T"),
        "open": (2, "larg-phantom-9.4T"),
    }
    assert sorted(scanned) == sorted(data_dir.glob("*/journal"))


def test_purging_reads_no_journal(data_dir, monkeypatch):
    def read(path):
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr("scansteer.realtime.journal.scan", read)
    assert purge_sessions(data_dir) == ["done"]
