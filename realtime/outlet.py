"""What goes back to a peer: written by a thread of its own, so that nobody waits for a peer that does not read."""

from __future__ import annotations

import logging
import queue
import socket
import threading

log = logging.getLogger("scansteer.gateway")


class Outlet:
    """Writes to a peer from a thread of its own: a peer that does not read holds nobody up before the bound is reached."""

    def __init__(self, peer: socket.socket, max_bytes: int) -> None:
        self._peer = peer
        self._max_bytes = max_bytes
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._n_waiting = 0
        self.is_broken = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="scansteer-outlet")
        self._thread.start()

    def put(self, frame: bytes | None) -> None:
        """Send a message after all earlier ones; None is nothing. Waits only while too much is waiting already."""
        if frame is None:
            return
        with self._changed:
            self._changed.wait_for(lambda: self.is_broken or self._n_waiting + len(frame) <= max(self._max_bytes, len(frame)))
            if self.is_broken:
                return
            self._n_waiting += len(frame)
        self._queue.put(frame)

    def finish(self) -> None:
        """Return when everything is sent, or the peer is gone."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (frame := self._queue.get()) is not None:
            try:
                if not self.is_broken:
                    self._peer.sendall(frame)
            except OSError as error:
                log.info("the peer takes nothing more: %s", error)
                with self._changed:
                    self.is_broken = True
                    self._changed.notify_all()
            with self._changed:
                self._n_waiting -= len(frame)
                self._changed.notify_all()
