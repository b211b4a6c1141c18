"""One reconstruction's connection to the gateway: its images straight back, the same images to the service, maps when they are there.

Three threads: the connection's own reads and passes on, an `Outlet` writes, an `Uplink` talks to the service. Passing an image
back never waits for the service.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import time
from collections.abc import Callable

import ismrmrd

from scansteer.core.errors import InputError
from scansteer.realtime.admission import Admitted, Choice, ImageRules, PassedOnly, Peer, choose
from scansteer.realtime.client import Client
from scansteer.realtime.config import GatewayConfig
from scansteer.realtime.map_series import Heads, map_frames
from scansteer.realtime.mrd_connection import (
    Dialect,
    MrdMessage,
    StreamError,
    close_frame,
    ends_in_nul,
    failure_frame,
    read_message,
    text_frame,
    text_of,
)
from scansteer.realtime.mrd_stream import CLOSE, CONFIG_FILE, CONFIG_TEXT, ERROR, HEADER, IMAGE, TEXT
from scansteer.realtime.outlet import Outlet
from scansteer.realtime.uplink import MapSet, Uplink

log = logging.getLogger("scansteer.gateway")

_WAIT_S = 0.05
_DRAIN_S = 1.0
_PIECE_BYTES = 2**18
_MAX_SENTENCE = 1000
"""Characters; a sentence may quote what the peer sent."""
_PAUSE_S = 0.3
"""A peer that says nothing for so long after its header has said all that there is before the images."""


class Ended(Exception):
    """The peer has closed the connection."""


class Reconstruction:
    """A peer that sends images. `run` follows it to its end."""

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
        self._refusal = ""
        """Said at the end, where the dialect allows nothing after it."""
        self._has_header = False
        self._said: set[str] = set()
        self._heads = Heads()
        self._n_map_sets = 0
        self._last_mapped: int | None = None
        """Number of the decision that the last maps belong to."""
        self._side_images: list[Admitted] = []
        """Maps and masks that came before the first image: a session that takes the place of an empty one needs them, too."""
        peer.settimeout(config.first_message_timeout_s)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _notice_when_gone(peer)
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
            log.warning("connection ended without CLOSE: %s", str(error) or "the peer is gone")
            closed = False
        except Exception:  # a mistake of ours must not leave the peer waiting for ever
            log.exception("a connection failed")
            self._outlet.put(failure_frame("Internal error; the gateway's log has the details.", self._dialect))
            closed = False
        self._finish(closed)

    def break_off(self) -> None:
        """Make `run` return."""
        with contextlib.suppress(OSError):
            self._peer.shutdown(socket.SHUT_RDWR)

    def turn_away(self) -> None:
        """In place of `run`: end the connection at once."""
        self._outlet.finish()
        self._peer.close()

    # Coming in.

    def _follow(self) -> bool:
        while True:
            self._begin_early()
            message = read_message(self._read_exactly, self._config.limits)
            self._peer.settimeout(self._config.idle_timeout_s)
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
        assert self._choice is not None and self._rules is not None and self._uplink is not None
        for remark in self._choice.remarks:
            self._say(remark)
        try:
            verdict = self._rules.admit(body)
        except InputError as error:
            verdict = PassedOnly(str(error).removesuffix("."))
        if isinstance(verdict, PassedOnly):
            self._say(f"An image is passed on and not used: {verdict.reason}.")
        elif self._uplink.n_kept_bytes + len(body) > self._config.max_kept_bytes:
            self._say("The service was away for too long; later images only pass.")
        else:
            self._deliver(verdict)

    def _deliver(self, image: Admitted) -> None:
        assert self._uplink is not None
        if image.role != "image":
            if not self._heads:
                self._side_images.append(image)
        else:
            if not self._heads:
                self._trust_a_volume(image)
                self._side_images.clear()
            self._heads.note(image)
        self._uplink.put(image)

    def _is_open(self) -> bool:
        """Begin the session with the first image: everything the peer says about it has come by then."""
        if self._uplink is not None:
            return True
        try:
            self._begin(choose(self._about, self._config))
        except InputError as error:
            self._refuse(error)
            return False
        return True

    def _refuse(self, error: InputError) -> None:
        self._refused = True
        log.warning("images only pass: %s", error)
        sentence = f"{error} The images only pass."
        if self._dialect == "gadgetron":  # it stops sending images once it hears of a failure
            self._refusal = sentence
        else:
            self._outlet.put(failure_frame(sentence, self._dialect))

    def _begin_early(self) -> None:
        """Compile while the scanner plays the first repetition: begin when the peer pauses after its header.

        What cannot be understood yet may still be said; the first image ends that.
        """
        if self._has_header and self._uplink is None and not self._refused:
            waiting = select.poll()  # `select` takes no descriptor over 1023
            waiting.register(self._peer, select.POLLIN)
            if not waiting.poll(_PAUSE_S * 1000):
                with contextlib.suppress(InputError):
                    self._begin(choose(self._about, self._config))

    def _begin_again(self) -> None:
        """Options came late: another session, or none, if they change anything and no image was used yet."""
        if self._uplink is None or self._heads:
            return
        try:
            choice = choose(self._about, self._config)
        except InputError as error:
            self._uplink.finish()
            self._refuse(error)
            return
        if choice != self._choice:
            self._uplink.finish()
            self._begin(choice)

    def _begin(self, choice: Choice) -> None:
        self._choice, self._rules = choice, ImageRules(choice)
        self._uplink = uplink = Uplink(choice, self._make_client, self._say, self._send_maps)
        self._adopt(uplink)
        for image in self._side_images:
            uplink.put(image)
        log.info("session %s, scan %s, dialect %s", uplink.session_id, choice.scan.name, self._dialect)

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
        timeout_s = self._config.service_timeout_s
        return Client(self._config.endpoint, keys=self._config.keys, timeout_s=timeout_s, resend_s=timeout_s / 2)

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
        sentence = sentence[:_MAX_SENTENCE]
        if sentence in self._said or len(self._said) > 1000:
            return
        self._said.add(sentence)
        log.info("%s", sentence)
        self._outlet.put(text_frame(sentence, self._dialect))

    def _send_maps(self, maps: MapSet) -> None:
        assert self._choice is not None
        if maps.decision.sequence_number == self._last_mapped:
            return  # the end of the scan came with the last of every so many images
        self._last_mapped = maps.decision.sequence_number
        for frame in map_frames(maps, self._heads, self._choice.scan.name, self._config.map_series, self._n_map_sets):
            self._outlet.put(frame)
        self._n_map_sets += 1

    def _finish(self, closed: bool) -> None:
        uplink = self._uplink
        if uplink is not None:
            if not closed:
                uplink.give_up_in(self._config.catch_up_s)
            uplink.finish()
            if closed:
                self._wait_for_maps(uplink)
                uplink.give_up_in(self._config.catch_up_s)
        if closed:
            self._outlet.put(failure_frame(self._refusal, self._dialect) if self._refusal else close_frame())
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
            here_at = here_at if uplink.is_away else max(here_at, uplink.heard_at)
            if now - started > self._config.finish_timeout_s or now - here_at > 2 * self._config.service_timeout_s:
                log.warning(
                    "session %s: the maps are not there in time; the connection is closed without them", uplink.session_id
                )
                return


def _notice_when_gone(peer: socket.socket) -> None:
    """Probe a silent peer after a minute, then every 15 s; four probes without an answer end the connection."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
