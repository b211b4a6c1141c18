"""MRD version 1 over TCP: listens for reconstructions and serves each in a thread of its own, see `reconstruction.py`."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable

from scansteer.core.errors import InputError
from scansteer.realtime import stop_signals
from scansteer.realtime.admission import Peer, choose
from scansteer.realtime.auth import is_loopback
from scansteer.realtime.config import GatewayConfig
from scansteer.realtime.logs import log_to_stderr
from scansteer.realtime.reconstruction import Reconstruction
from scansteer.realtime.uplink import Uplink

log = logging.getLogger("scansteer.gateway")

_WAIT_S = 0.05
_BACKLOG = 16


class Gateway:
    """A listening gateway. `run` blocks until `stop` is called from any thread."""

    def __init__(self, config: GatewayConfig) -> None:
        """
        Raises
        ------
        InputError
            The address is open to others without leave, or cannot be bound, or the scan cannot be read.
        """
        if not is_loopback(config.host) and not config.allow_remote:
            raise InputError(
                f"MRD over TCP has no authentication, and {config.host} can be reached by others: use 127.0.0.1 and a tunnel, "
                "or set allow_remote on a link that nobody else can use."
            )
        if config.scan is not None:
            choose(Peer(), config)
        self.config = config
        self._stopping = threading.Event()
        self._connections: set[Reconstruction] = set()
        self._uplinks: set[Uplink] = set()
        self._lock = threading.Lock()
        try:
            family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
            self._listener = socket.create_server((config.host, config.port), family=family, backlog=_BACKLOG)
        except OSError as error:
            raise InputError(f"Cannot listen on {config.host}:{config.port}: {error.strerror}.") from error
        self._listener.settimeout(_WAIT_S)

    @property
    def port(self) -> int:
        """The port that was really bound."""
        return self._listener.getsockname()[1]

    def run(self) -> None:
        """Accept connections until `stop`, then end them."""
        while not self._stopping.is_set():
            try:
                peer, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError as error:  # e.g. no file descriptor left
                log.error("cannot accept a connection: %s", error)
                self._stopping.wait(_WAIT_S)
                continue
            try:
                self._welcome(peer)
            except (OSError, RuntimeError) as error:  # the peer is gone already; no thread can be started
                log.error("cannot serve a connection: %s", error)
                peer.close()
        self._end()

    def stop(self) -> None:
        """Make `run` return. May be called from any thread, and from a signal handler."""
        self._stopping.set()

    def _welcome(self, peer: socket.socket) -> None:
        with self._lock:
            self._uplinks = {uplink for uplink in self._uplinks if not uplink.done.is_set()}
            n_open = len(self._connections)
            if n_open >= self.config.max_connections or len(self._uplinks) >= 2 * self.config.max_connections:
                log.warning("connection refused: %d are open", n_open)
                peer.close()
                return
            connection = Reconstruction(peer, self.config, self._adopt)
            self._connections.add(connection)
        try:
            threading.Thread(target=self._serve, args=(connection,), daemon=True, name="scansteer-connection").start()
        except RuntimeError:
            with self._lock:
                self._connections.discard(connection)
            connection.turn_away()
            raise

    def _serve(self, connection: Reconstruction) -> None:
        try:
            connection.run()
        except Exception:
            log.exception("a connection failed")
        finally:
            with self._lock:
                self._connections.discard(connection)

    def _adopt(self, uplink: Uplink) -> None:
        """Remember an uplink, which may outlive its connection."""
        with self._lock:
            self._uplinks.add(uplink)

    def _end(self) -> None:
        """End the connections; what they have sent is delivered, if the service takes it in reasonable time."""
        self._listener.close()
        with self._lock:
            for connection in self._connections:
                connection.break_off()
        deadline = time.monotonic() + 2 * self.config.service_timeout_s
        while self._is_busy() and time.monotonic() < deadline:
            time.sleep(_WAIT_S)
        with self._lock:
            uplinks = list(self._uplinks)
        for uplink in uplinks:
            if uplink.n_kept_bytes and not uplink.done.is_set():
                log.warning("session %s: %d bytes of images were not delivered", uplink.session_id, uplink.n_kept_bytes)
            uplink.abandon()
        for uplink in uplinks:
            uplink.join(2 * self.config.service_timeout_s)

    def _is_busy(self) -> bool:
        with self._lock:
            return bool(self._connections) or not all(uplink.done.is_set() for uplink in self._uplinks)


def serve(config: GatewayConfig, *, on_started: Callable[[Gateway], None] | None = None) -> None:
    """Run the gateway until SIGTERM, SIGINT or SIGHUP.

    Raises
    ------
    InputError
        It cannot start as it is configured.
    """
    log_to_stderr()
    gateway = Gateway(config)
    with stop_signals.obeyed(gateway.stop):
        log.info("MRD on %s:%d, service at %s", config.host, gateway.port, config.endpoint)
        if on_started is not None:
            on_started(gateway)
        gateway.run()
