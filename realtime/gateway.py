"""MRD version 1 over TCP in, images straight back, the same images to the service, its maps back to where images are read.

Each connection has three threads: its own reads and passes on, an `Outlet` writes, an `Uplink` talks to the service. Passing
an image back never waits for the service.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import select
import signal
import socket
import threading
import time
from collections.abc import Callable

import ismrmrd
import numpy as np

from scansteer.core.errors import InputError
from scansteer.realtime.admission import Admitted, Choice, ImageRules, PassedOnly, Peer, choose
from scansteer.realtime.auth import is_loopback
from scansteer.realtime.client import Client
from scansteer.realtime.config import GatewayConfig
from scansteer.realtime.images import HEADER_BYTES, parse_meta
from scansteer.realtime.logs import log_to_stderr
from scansteer.realtime.mrd_connection import (
    Dialect,
    MrdMessage,
    StreamError,
    close_frame,
    ends_in_nul,
    failure_frame,
    image_frame,
    read_message,
    text_frame,
    text_of,
)
from scansteer.realtime.mrd_stream import CLOSE, CONFIG_FILE, CONFIG_TEXT, ERROR, HEADER, IMAGE, TEXT
from scansteer.realtime.uplink import MapSet, Uplink

log = logging.getLogger("scansteer.gateway")

_WAIT_S = 0.05
_BACKLOG = 16
_DRAIN_S = 1.0
_PIECE_BYTES = 2**18
_PAUSE_S = 0.3
"""A peer that says nothing for so long after its header has said all that there is before the images."""


class Ended(Exception):
    """The peer has closed the connection."""


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
        self._connections: set[Connection] = set()
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
            self._welcome(peer)
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
            connection = Connection(peer, self.config, self._adopt)
            self._connections.add(connection)
        threading.Thread(target=self._serve, args=(connection,), daemon=True, name="scansteer-connection").start()

    def _serve(self, connection: Connection) -> None:
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
        self._listener.close()
        with self._lock:
            connections, uplinks = list(self._connections), list(self._uplinks)
        for connection in connections:
            connection.break_off()
        for uplink in uplinks:
            uplink.abandon()
        for uplink in uplinks:
            uplink.join(2 * self.config.service_timeout_s)


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


class Connection:
    """One reconstruction's connection."""

    def __init__(self, peer: socket.socket, config: GatewayConfig, adopt: Callable[[Uplink], None]) -> None:
        self._peer = peer
        self._config = config
        self._adopt = adopt
        self._dialect: Dialect = "gadgetron" if config.dialect == "gadgetron" else "fire"
        self._about = Peer()
        self._choice: Choice | None = None
        self._rules: ImageRules | None = None
        self._uplink: Uplink | None = None
        self._refused = False
        self._has_header = False
        self._said: set[str] = set()
        self._heads: dict[int, tuple[bytes, dict[str, str]]] = {}
        peer.settimeout(config.idle_timeout_s)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._outlet = Outlet(peer, config.max_kept_bytes)

    def run(self) -> None:
        """Follow the connection to its end."""
        try:
            closed = self._follow()
        except StreamError as error:
            log.warning("connection ended: %s", error)
            self._outlet.put(failure_frame(str(error), self._dialect))
            closed = False
        except (Ended, OSError) as error:
            log.warning("connection ended without CLOSE: %s", error or "the peer is gone")
            closed = False
        self._finish(closed)

    def break_off(self) -> None:
        """Make `run` return."""
        with contextlib.suppress(OSError):
            self._peer.shutdown(socket.SHUT_RDWR)

    # Coming in.

    def _follow(self) -> bool:
        while True:
            self._begin_early()
            message = read_message(self._read_exactly, self._config.limits)
            match message.identifier:
                case n if n == CLOSE:
                    return True
                case n if n == IMAGE:
                    self._outlet.put(message.frame)
                    self._use(message.body)
                case n if n in (CONFIG_FILE, CONFIG_TEXT, HEADER, TEXT, ERROR):
                    self._take_text(message)
                case _:
                    pass

    def _take_text(self, message: MrdMessage) -> None:
        text = text_of(message)
        match message.identifier:
            case n if n == CONFIG_FILE:
                self._about.take_config_file(text)
            case n if n == CONFIG_TEXT:
                self._detect(ends_in_nul(message))
                self._about.take_config_text(text)
            case n if n == HEADER:
                self._detect(ends_in_nul(message))
                self._about.take_header(text)
                self._has_header = True
            case n if n == TEXT:
                self._detect(True)
                self._about.take_text(text)
                self._begin_again()
            case _:
                log.warning("the peer reports an error of %d characters", len(text))

    def _detect(self, is_fire: bool) -> None:
        if self._config.dialect == "auto":
            self._dialect = "fire" if is_fire else "gadgetron"

    def _use(self, body: bytes) -> None:
        """Let an image take part in the session, if it does; it has been passed back already."""
        if self._refused or not self._is_open():
            return
        assert self._rules is not None and self._uplink is not None
        try:
            verdict = self._rules.admit(body)
        except InputError as error:
            verdict = PassedOnly(str(error))
        if isinstance(verdict, PassedOnly):
            self._say(f"An image is passed on and not used: {verdict.reason}.")
        elif self._uplink.n_kept_bytes + len(body) > self._config.max_kept_bytes:
            self._say("The service was away for too long; later images only pass.")
        else:
            self._deliver(verdict)

    def _deliver(self, image: Admitted) -> None:
        assert self._uplink is not None
        if image.role == "image" and not self._heads:
            self._trust_a_volume(image)
        if image.role == "image" and image.slice not in self._heads:
            n_meta = int.from_bytes(image.body[HEADER_BYTES : HEADER_BYTES + 8], "little")
            meta = parse_meta(image.body[HEADER_BYTES + 8 : HEADER_BYTES + 8 + n_meta])
            self._heads[image.slice] = image.body[:HEADER_BYTES], meta
        self._uplink.put(image)

    def _is_open(self) -> bool:
        """Begin the session with the first image: everything the peer says about it has come by then."""
        if self._uplink is not None:
            return True
        try:
            self._begin(choose(self._about, self._config))
        except InputError as error:
            self._refused = True
            log.warning("images only pass: %s", error)
            self._outlet.put(failure_frame(f"{error} The images only pass.", self._dialect))
            return False
        return True

    def _begin_early(self) -> None:
        """Compile while the scanner plays the first repetition: begin when the peer pauses after its header."""
        if self._has_header and self._uplink is None and not self._refused:
            ready, _, _ = select.select([self._peer], [], [], _PAUSE_S)
            if not ready:
                self._is_open()

    def _begin_again(self) -> None:
        """Options came late: another session, if they change anything and no image was used yet."""
        if self._uplink is None or self._heads:
            return
        try:
            choice = choose(self._about, self._config)
        except InputError as error:
            self._say(f"{error} It is ignored: the session was open already.")
            return
        if choice != self._choice:
            self._uplink.finish()
            self._begin(choice)

    def _begin(self, choice: Choice) -> None:
        self._choice, self._rules = choice, ImageRules(choice)
        self._uplink = Uplink(choice, self._make_client, self._say, self._send_maps)
        self._adopt(self._uplink)
        log.info("session %s, scan %s, dialect %s", self._uplink.session_id, choice.scan.name, self._dialect)

    def _trust_a_volume(self, image: Admitted) -> None:
        """A header may count slices of an image that is a volume: the first image is believed."""
        assert self._choice is not None and self._uplink is not None and self._rules is not None
        header = ismrmrd.ImageHeader.from_buffer_copy(image.body)
        if header.matrix_size[2] > 1 and self._choice.n_slices > 1 and self._choice.config.n_slices is None:
            self._say("The first image is a volume: one image is expected per repetition, whatever the MRD header counts.")
            self._uplink.finish()
            rules = self._rules
            self._begin(self._choice._replace(n_slices=1))
            self._rules = rules
            rules.expect_volumes()

    def _make_client(self) -> Client:
        return Client(self._config.endpoint, keys=self._config.keys, timeout_s=self._config.service_timeout_s)

    def _read_exactly(self, count: int) -> bytes:
        """So many bytes, in memory that grows with what really comes: a length that is only announced costs nothing."""
        pieces: list[bytes] = []
        while count:
            piece = self._peer.recv(min(count, _PIECE_BYTES))
            if not piece:
                raise Ended
            pieces.append(piece)
            count -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    # Going out.

    def _say(self, sentence: str) -> None:
        """Tell the peer, once each, in the dialect that allows it, and the log."""
        if sentence in self._said or len(self._said) > 1000:
            return
        self._said.add(sentence)
        log.info("%s", sentence)
        self._outlet.put(text_frame(sentence, self._dialect))

    def _send_maps(self, maps: MapSet) -> None:
        assert self._choice is not None
        for frame in map_frames(maps, self._heads, self._choice.scan.name, self._config.map_series):
            self._outlet.put(frame)

    def _finish(self, closed: bool) -> None:
        uplink = self._uplink
        if uplink is not None:
            uplink.finish()
            if closed:
                self._wait_for_maps(uplink)
            uplink.give_up_in(self._config.catch_up_s)
        if closed:
            self._outlet.put(close_frame())
        self._outlet.finish()
        with contextlib.suppress(OSError):
            self._peer.shutdown(socket.SHUT_WR)
            self._drain()
        self._peer.close()

    def _drain(self) -> None:
        """Read what is still coming for a moment: closing on unread bytes would take back what was said last."""
        until = time.monotonic() + _DRAIN_S
        self._peer.settimeout(_DRAIN_S)
        while self._peer.recv(1 << 16) and time.monotonic() < until:
            pass

    def _wait_for_maps(self, uplink: Uplink) -> None:
        """CLOSE is answered after the maps, unless the service is away or slower than allowed."""
        started = time.monotonic()
        here_at = started
        while not uplink.done.wait(_WAIT_S):
            now = time.monotonic()
            here_at = here_at if uplink.is_away else now
            if now - started > self._config.finish_timeout_s or now - here_at > 2 * self._config.service_timeout_s:
                log.warning(
                    "session %s: the maps are not there in time; the connection is closed without them", uplink.session_id
                )
                return


def map_frames(maps: MapSet, heads: dict[int, tuple[bytes, dict[str, str]]], scan_name: str, first_series: int) -> list[bytes]:
    """IMAGE messages of the maps: a series for each, an image for each slice, the header copied from the input's.

    Parameters
    ----------
    heads
        Slice -> header and Meta of an input image.

    Returns
    -------
    float32 images, 0 outside the region; the decision and the scan's name in Meta.
    """
    frames: list[bytes] = []
    for number, (name, array) in enumerate(maps.arrays.items()):
        values = np.nan_to_num(array, nan=0.0).astype("<f4")
        depth = values.shape[0] // max(len(heads), 1)
        for index, slice_ in enumerate(sorted(heads)):
            head, meta = heads[slice_]
            header = _map_header(head, first_series + number, index)
            text = _map_meta(name, meta, maps, scan_name).encode("utf-8")
            header.attribute_string_len = len(text)
            part = values[index * depth : (index + 1) * depth]
            frames.append(image_frame(bytes(header) + len(text).to_bytes(8, "little") + text + part.tobytes()))
    return frames


def _map_header(head: bytes, series: int, index: int) -> ismrmrd.ImageHeader:
    header = ismrmrd.ImageHeader.from_buffer_copy(head)
    header.data_type, header.image_type, header.channels = ismrmrd.DATATYPE_FLOAT, ismrmrd.IMTYPE_MAGNITUDE, 1
    header.image_series_index, header.image_index = series, index + 1
    header.repetition = header.contrast = header.set = header.average = header.phase = 0
    return header


def _map_meta(name: str, meta: dict[str, str], maps: MapSet, scan_name: str) -> str:
    history = meta.get("ImageProcessingHistory", "")
    values: dict[str, str | list[str]] = {
        "DataRole": ["Quantitative", name],
        "ImageProcessingHistory": [*(history.split("\\") if history else []), "SCANSTEER"],
        "Keep_image_geometry": "1",
        "SeriesDescription": f"scansteer_{name}",
        "ScansteerUnit": _unit(name),
        "ScansteerScan": scan_name,
        "ScansteerDecision": json.dumps(maps.decision.model_dump(mode="json")),
    }
    return ismrmrd.Meta(values).serialize()


def _unit(name: str) -> str:
    return "1/s" if name.startswith("k") else "fraction"


def serve(config: GatewayConfig, *, on_started: Callable[[Gateway], None] | None = None) -> None:
    """Run the gateway until SIGTERM or SIGINT.

    Raises
    ------
    InputError
        It cannot start as it is configured.
    """
    log_to_stderr()
    gateway = Gateway(config)
    previous = [(number, signal.signal(number, lambda *_: gateway.stop())) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        log.info("MRD on %s:%d, service at %s", config.host, gateway.port, config.endpoint)
        if on_started is not None:
            on_started(gateway)
        gateway.run()
    finally:
        for number, handler in previous:
            signal.signal(number, handler)
