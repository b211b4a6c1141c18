"""Where a session lies on disk: its journal, and beside it decisions, audit log and summary, which are derived from it.

Trouble with the derived files is said, and stops nothing.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scansteer.realtime.journal import FILE_MARK, JournalError

log = logging.getLogger("scansteer.session")


@dataclass(frozen=True)
class SessionFolder:
    """One session's folder."""

    path: Path

    @property
    def journal(self) -> Path:
        return self.path / "journal"

    @property
    def decisions(self) -> Path:
        return self.path / "decisions.jsonl"

    @property
    def audit(self) -> Path:
        return self.path / "audit.jsonl"

    @property
    def closed(self) -> Path:
        return self.path / "closed.json"

    @property
    def is_free(self) -> bool:
        """Whether no session was ever accepted here: no folder, or one that a crash or a full disk left before the first record."""
        try:
            return not self.closed.exists() and self.journal.stat().st_size <= len(FILE_MARK)
        except FileNotFoundError:
            return True

    @property
    def has_lost_a_tail(self) -> bool:
        """Whether the end of the journal was damaged once, and cut off."""
        return any(self.path.glob("journal.damaged-*"))

    def begin(self) -> None:
        """Make the folder of a new session; what was left of one that never began goes.

        Raises
        ------
        JournalError
            It cannot be made.
        """
        try:
            self.path.mkdir(mode=0o700, exist_ok=True)
            self.journal.unlink(missing_ok=True)
        except OSError as error:
            raise JournalError(f"Cannot make the folder of session {self.path.name}: {error.strerror}.") from error

    def note(self, event: str, **details: Any) -> None:
        """Write a line into the audit log."""
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **details}
        _append_line(self.audit, json.dumps(line))

    def write_decision(self, line: str) -> bool:
        """Add a decision, as JSON; false: it could not be written."""
        return _append_line(self.decisions, line)

    def write_closed(self, summary: dict[str, Any]) -> None:
        """The session has ended; it is not taken up again."""
        content = {"closed": datetime.now(UTC).isoformat(timespec="seconds"), "summary": summary}
        unfinished = self.closed.with_suffix(".part")
        try:
            with open(unfinished, "w", encoding="utf-8", opener=_private) as file:
                json.dump(content, file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self.closed)  # whole or not at all: that it is there is what ends the session
        except OSError as error:
            log.warning("cannot write %s: %s", self.closed, error.strerror)

    def read_closed(self) -> dict[str, Any] | None:
        """The summary of a session that has ended, empty if it was damaged since; none: it has not."""
        try:
            return json.loads(self.closed.read_text(encoding="utf-8"))["summary"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def count_decisions(self) -> int:
        """Lines of the decisions; 0 if there are none."""
        try:
            with self.decisions.open("rb") as file:
                return sum(line.endswith(b"\n") for line in file)
        except OSError:
            return 0

    def mend_decisions(self) -> None:
        """Cut the decisions off where a crash or a full disk left a line torn, or a gap: the journal says them again."""
        try:
            lines = self.decisions.read_bytes().splitlines(keepends=True)
            n_whole = next((number for number, line in enumerate(lines) if _sequence_number(line) != number), len(lines))
            if n_whole < len(lines):
                os.truncate(self.decisions, sum(map(len, lines[:n_whole])))
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("cannot mend %s: %s", self.decisions, error.strerror)


def folders_in(data_dir: Path) -> list[SessionFolder]:
    """Sessions of a data folder, in the order of their names; what may not be looked into is none."""
    found = []
    for path in sorted(data_dir.iterdir()):
        try:
            if (path / "journal").is_file():
                found.append(SessionFolder(path))
        except PermissionError:
            log.warning("%s is not this user's: it is left alone", path)
    return found


def _sequence_number(line: bytes) -> int | None:
    """Of a decision's whole line; none: it is not one."""
    try:
        decision = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return decision.get("sequence_number") if isinstance(decision, dict) else None


def _append_line(path: Path, line: str) -> bool:
    """Whole or not at all; false: it could not be written."""
    content = line.encode() + b"\n"
    try:
        with open(path, "ab", buffering=0, opener=_private) as file:
            before = file.tell()
            try:
                n_written = file.write(content)
            except OSError:
                file.truncate(before)
                raise
            if n_written == len(content):
                return True
            file.truncate(before)
            log.warning("cannot write %s: %s", path, os.strerror(errno.ENOSPC))
    except OSError as error:
        log.warning("cannot write %s: %s", path, error.strerror)
    return False


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
