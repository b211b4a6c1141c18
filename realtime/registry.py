"""The sessions of one service, and the data folder that is theirs alone."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from scansteer.core.errors import InputError, ScansteerError
from scansteer.protocols.scan import Scan, explain
from scansteer.realtime.codec import Bytes, ProtocolError
from scansteer.realtime.config import ServeConfig
from scansteer.realtime.hosted import HostedSession
from scansteer.realtime.journal import sync_folder
from scansteer.realtime.messages import Open
from scansteer.realtime.session_folder import SessionFolder, folders_in
from scansteer.realtime.worker import Job, MakeSession

log = logging.getLogger("scansteer.broker")

_MAX_CLOSED_KEPT = 32
_RESERVED = ("lock", "purged")
"""Files in the data folder."""


class Registry:
    """Sessions by name: new ones, those that a crash left open, and the latest that were closed."""

    def __init__(self, config: ServeConfig, make: MakeSession, submit: Callable[[str, Job, bool], None]) -> None:
        """
        Raises
        ------
        ScansteerError
            The data folder cannot be used, or another service uses it.
        """
        self._config = config
        self._make = make
        self._submit = submit
        self._sessions: dict[str, HostedSession] = {}
        self._lock: int | None = _lock_folder(config.data_dir)

    def __iter__(self) -> Iterator[HostedSession]:
        """All sessions; they may come and go meanwhile."""
        return iter(list(self._sessions.values()))

    def get(self, session_id: str) -> HostedSession | None:
        return self._sessions.get(session_id)

    def create(self, message: Open, frames: Sequence[Bytes]) -> HostedSession:
        """A session that was not there before.

        Raises
        ------
        ProtocolError
            The scan is not one, a limit is reached, or there was a session of this name.
        """
        n_open = sum(session.state != "closed" for session in self)
        if n_open >= self._config.limits.max_sessions:
            raise ProtocolError("limit", f"{n_open} sessions are open, the most that are accepted; close one.")
        self._check_scan(message)
        if message.session_id in _RESERVED:
            raise ProtocolError("conflict", f"A session cannot be called {message.session_id!r}; choose another name.")
        folder = self._folder(message.session_id)
        if not folder.is_free or message.session_id in self._purged():
            raise ProtocolError("closed", f"Session {message.session_id} was closed before; choose another name.")
        submit = self._submitter(message.session_id)
        session = HostedSession.create(message, frames, folder, self._make, submit, self._config.limits)
        sync_folder(self._config.data_dir)
        self._sessions[message.session_id] = session
        self._drop_oldest_closed()
        return session

    def closed_before(self, session_id: str) -> dict[str, Any] | None:
        """The summary of a session that was closed, perhaps before a restart; none: there is no such session."""
        return None if session_id in _RESERVED else self._folder(session_id).read_closed()

    def recover(self, now: float) -> None:
        """Open again what a crash or a shutdown left open."""
        for folder in folders_in(self._config.data_dir):
            if folder.closed.exists():
                continue
            name = folder.path.name
            try:
                session = HostedSession.recover(folder, self._make, self._submitter(name), self._config.limits)
            except (ScansteerError, ValidationError, OSError) as error:  # also what an older version wrote and this one does not accept
                log.error("session %s cannot be taken up again: %s", name, error)
                continue
            session.attendance.last_heard = now
            self._sessions[name] = session
            log.info("session %s goes on, %d images", name, len(session.received))

    def drop(self, session_id: str) -> None:
        """Forget a closed session; its folder stays."""
        del self._sessions[session_id]

    def close(self) -> None:
        """Give the data folder free. Open sessions stay as their journals say."""
        if self._lock is None:
            return
        for session in self:
            session.release()
        os.close(self._lock)
        self._lock = None

    def _check_scan(self, message: Open) -> None:
        try:
            scan = Scan.model_validate(message.scan)
        except ValidationError as error:
            raise ProtocolError("malformed", f"The scan of session {message.session_id}: {explain(error)}"[:1000]) from error
        if len(scan.schedule) > self._config.limits.max_repetitions:
            raise ProtocolError("limit", f"The schedule has {len(scan.schedule)} repetitions, more than are accepted.")

    def _folder(self, session_id: str) -> SessionFolder:
        return SessionFolder(self._config.data_dir / session_id)

    def _purged(self) -> set[str]:
        """Names of sessions that existed and were purged; a recorded `Open` must not bring them back."""
        try:
            return set((self._config.data_dir / "purged").read_text(encoding="utf-8").split())
        except FileNotFoundError:
            return set()

    def _submitter(self, session_id: str) -> Callable[[Job, bool], None]:
        return lambda job, slow: self._submit(session_id, job, slow)

    def _drop_oldest_closed(self) -> None:
        closed = [session_id for session_id, session in self._sessions.items() if session.state == "closed"]
        for session_id in closed[: max(0, len(closed) - _MAX_CLOSED_KEPT)]:
            self.drop(session_id)


def _lock_folder(data_dir: Path) -> int:
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InputError(f"Cannot use data folder {data_dir}: {error.strerror}.") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise ScansteerError(f"Another service uses data folder {data_dir}; give this one another data_dir.") from error
    return descriptor
