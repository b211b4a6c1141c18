"""Where a session lies on disk: its journal, and beside it decisions, audit log and summary, which are derived from it.

Trouble with the derived files is said, and stops nothing.
"""

from __future__ import annotations

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

    def write_decision(self, line: str) -> None:
        """Add a decision, as JSON."""
        _append_line(self.decisions, line)

    def write_closed(self, summary: dict[str, Any]) -> None:
        """The session has ended; it is not taken up again."""
        content = {"closed": datetime.now(UTC).isoformat(timespec="seconds"), "summary": summary}
        try:
            with open(self.closed, "w", encoding="utf-8", opener=_private) as file:
                json.dump(content, file)
        except OSError as error:
            log.warning("cannot write %s: %s", self.closed, error.strerror)

    def count_decisions(self) -> int:
        """Complete lines of the decisions; 0 if there are none."""
        try:
            with self.decisions.open("rb") as file:
                return sum(line.endswith(b"\n") for line in file)
        except FileNotFoundError:
            return 0

    def trim_torn_decision(self) -> None:
        """Cut off a last line that a crash left incomplete."""
        try:
            content = self.decisions.read_bytes()
        except FileNotFoundError:
            return
        if not content.endswith(b"\n"):
            with self.decisions.open("r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)


def _append_line(path: Path, line: str) -> None:
    try:
        with open(path, "a", encoding="utf-8", opener=_private) as file:
            file.write(line + "\n")
    except OSError as error:
        log.warning("cannot write %s: %s", path, error.strerror)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
