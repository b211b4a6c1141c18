"""The sessions on disk: list, export, purge. Sessions that a running service holds are left alone by purge."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from scansteer.core.errors import InputError, ScansteerError
from scansteer.protocols.scan import Scan, to_yaml
from scansteer.realtime import journal
from scansteer.realtime.codec import decode
from scansteer.realtime.messages import Image, Open
from scansteer.realtime.session_folder import SessionFolder, folders_in

_CLOSE = (4).to_bytes(2, "little")
_IMAGE = (1022).to_bytes(2, "little")


@dataclass(frozen=True)
class StoredSession:
    """What is known of a session without computing anything."""

    session_id: str
    scan: str
    n_images: int
    n_decisions: int
    n_bytes: int
    closed: bool
    modified: float
    """When its journal was last written, seconds since the epoch."""
    damaged: bool


def list_sessions(data_dir: Path) -> list[StoredSession]:
    """Every session in a data folder, oldest first."""
    if not data_dir.is_dir():
        return []
    return sorted(map(_describe, folders_in(data_dir)), key=lambda session: session.modified)


def export_session(data_dir: Path, session_id: str, file: Path) -> int:
    """Write a session into a ZIP file; returns the number of images.

    It holds `scan.yaml`, `images.mrd` (an MRD v1 stream of the images as they came, which `scansteer replay` reads),
    `decisions.jsonl`, `audit.jsonl` and `summary.json`, as far as there are any. Meta attributes of the images are kept as the
    reconstruction sent them: look at them before giving the file away.

    Raises
    ------
    InputError
        No such session, or the file exists.
    """
    folder = _existing(data_dir, session_id)
    if file.exists():
        raise InputError(f"{file} exists already; choose another name.")
    part = file.with_name(file.name + ".part")
    try:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
            n_images = _export_journal(folder, archive)
            for path in (folder.decisions, folder.audit, folder.closed):
                if path.is_file():
                    archive.write(path, "summary.json" if path == folder.closed else path.name)
        os.replace(part, file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ScansteerError(f"Cannot write {file}: {error.strerror}.") from error
    return n_images


def purge_sessions(data_dir: Path, *, older_than_days: float = 0.0, unfinished: bool = False) -> list[str]:
    """Delete closed sessions (and, if asked, unfinished ones) whose journal is at least so old; returns their names.

    The names stay in the file `purged`, so that a recorded message cannot bring a session back.

    Raises
    ------
    ScansteerError
        A service is running on the folder.
    """
    if not data_dir.is_dir():
        return []
    with _Locked(data_dir):
        return _purge(data_dir, older_than_days, unfinished)


def purge_old(data_dir: Path, retention_days: float) -> list[str]:
    """What a service does when it starts, if retention is limited."""
    return purge_sessions(data_dir, older_than_days=retention_days)


def _purge(data_dir: Path, older_than_days: float, unfinished: bool) -> list[str]:
    """Journals are not read: a service does this at its start, with a scan waiting perhaps."""
    limit = time.time() - older_than_days * 86400
    chosen = [
        folder.path.name
        for folder in folders_in(data_dir)
        if folder.journal.stat().st_mtime <= limit and (unfinished or folder.closed.exists())
    ]
    for session_id in chosen:
        with open(data_dir / "purged", "a", encoding="utf-8") as file:
            file.write(session_id + "\n")
        shutil.rmtree(data_dir / session_id)
    return chosen


def _describe(folder: SessionFolder) -> StoredSession:
    stat = folder.journal.stat()
    scan, n_images, damaged = "", 0, False
    try:
        entries, damages = journal.scan(folder.journal)
        damaged = bool(damages)
        n_images = sum(len(entry.lengths) == 2 for entry in entries)
        if entries and entries[0].sequence == 0:
            opening, _ = decode(journal.read_record(folder.journal, entries[0]))
            scan = str(opening.scan.get("name", "")) if isinstance(opening, Open) else ""
    except (ScansteerError, OSError):
        damaged = True
    return StoredSession(
        session_id=folder.path.name,
        scan=scan,
        n_images=n_images,
        n_decisions=folder.count_decisions(),
        n_bytes=sum(path.stat().st_size for path in folder.path.iterdir()),
        closed=folder.closed.exists(),
        modified=stat.st_mtime,
        damaged=damaged,
    )


def _export_journal(folder: SessionFolder, archive: zipfile.ZipFile) -> int:
    n_images = 0
    with archive.open("images.mrd", "w", force_zip64=True) as stream:
        opening: Open | None = None
        for _, frames in journal.read_all(folder.journal):
            message, bodies = decode(frames)
            if isinstance(message, Image):
                stream.write(_IMAGE)
                stream.write(bytes(bodies[0]))
                n_images += 1
            elif isinstance(message, Open):
                opening = message
        stream.write(_CLOSE)
    if opening is not None:
        archive.writestr("scan.yaml", to_yaml(Scan.model_validate(opening.scan)))
    return n_images


def _existing(data_dir: Path, session_id: str) -> SessionFolder:
    folder = SessionFolder(data_dir / session_id)
    if Path(session_id).name != session_id or not folder.journal.is_file():
        names = [folder.path.name for folder in folders_in(data_dir)] if data_dir.is_dir() else []
        raise InputError(f"There is no session {session_id!r} in {data_dir}; there are: {', '.join(names) or 'none'}.")
    return folder


class _Locked:
    """Holds the data folder's lock, which a running service holds otherwise."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / "lock"

    def __enter__(self) -> None:
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            raise ScansteerError(f"A service is running on {self._path.parent}; stop it before purging.") from error

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
