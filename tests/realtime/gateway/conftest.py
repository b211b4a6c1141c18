"""A reconstruction's end of the line to a gateway, as fire (python-ismrmrd-server's client) and gadgetron (connect mode) speak."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import ismrmrd
import numpy as np
import pytest

from scansteer.realtime.client import Client
from scansteer.realtime.config import GatewayConfig
from scansteer.realtime.gateway import Gateway
from scansteer.realtime.messages import SessionStatus

CONFIG_FILE, CONFIG_TEXT, HEADER, CLOSE, TEXT, ERROR, IMAGE = 1, 2, 3, 4, 5, 8, 1022
SCAN = "larg-phantom-9.4T"


def header_xml(field_t: float | None = 9.4, n_slices: int | None = None) -> str:
    field = f"<systemFieldStrength_T>{field_t}</systemFieldStrength_T>"
    system = f"<acquisitionSystemInformation>{field}</acquisitionSystemInformation>"
    slices = f"<slice><minimum>0</minimum><maximum>{(n_slices or 1) - 1}</maximum><center>0</center></slice>"
    limits = f"<encodingLimits>{slices}</encodingLimits>"
    return (
        '<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">'
        f"{system if field_t else ''}<encoding>{limits if n_slices else ''}</encoding></ismrmrdHeader>"
    )


class Peer:
    """The other end of the line; what comes back is parsed by ismrmrd-python, not by our code."""

    def __init__(self, port: int, *, fire: bool) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        self.fire = fire
        self.images: list[bytes] = []
        self.texts: list[str] = []
        self.errors: list[str] = []
        self.closed = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def send(self, identifier: int, body: bytes = b"") -> None:
        self.socket.sendall(struct.pack("<H", identifier) + body)

    def send_image(self, body: bytes) -> None:
        self.send(IMAGE, body)

    def send_text(self, identifier: int, text: str) -> None:
        content = text.encode() + (b"\0" if self.fire else b"")
        self.send(identifier, struct.pack("<I", len(content)) + content)

    @property
    def config(self) -> str:
        """How a reconstruction of this dialect names the scan."""
        return SCAN if self.fire else f"<configuration><scan>{SCAN}</scan></configuration>"

    def begin(self, config: str = SCAN, *, header: str | None = None, text: dict | None = None) -> None:
        if self.fire:
            self.send(CONFIG_FILE, config.encode().ljust(1024, b"\0"))
        else:
            self.send_text(CONFIG_TEXT, config)
        self.send_text(HEADER, header if header is not None else header_xml())
        if text is not None:
            self.send_text(TEXT, json.dumps(text))

    def end(self) -> None:
        self.send(CLOSE)
        assert self.closed.wait(20)
        self._reader.join(5)
        self.socket.close()

    def maps(self) -> dict[str, list[ismrmrd.Image]]:
        found: dict[str, list[ismrmrd.Image]] = {}
        for body in self.images:
            if b"ScansteerScan" in body:  # ismrmrd-python cannot read a correct int32 image
                image = ismrmrd.Image.from_bytes(body)
                found.setdefault(image.meta["DataRole"][1], []).append(image)
        return found

    def passed(self) -> list[bytes]:
        return [body for body in self.images if b"ScansteerScan" not in body]

    def _read(self) -> None:
        stream = self.socket.makefile("rb")

        def exactly(count: int) -> bytes:
            data = stream.read(count)
            if len(data) != count:
                raise EOFError
            return data

        try:
            while True:
                identifier = struct.unpack("<H", exactly(2))[0]
                if identifier == IMAGE:
                    head = exactly(206)
                    image = ismrmrd.ImageHeader.from_buffer_copy(head)
                    size = {1: 2, 2: 2, 3: 4, 4: 4, 5: 4, 6: 8, 7: 8, 8: 16}[image.data_type] * image.channels
                    n_meta = struct.unpack("<Q", head[198:])[0]
                    self.images.append(head + exactly(n_meta + size * int(np.prod(image.matrix_size, dtype=np.int64))))
                elif identifier in (TEXT, ERROR):
                    if identifier == ERROR:
                        self.socket.shutdown(socket.SHUT_WR)  # Gadgetron sends nothing more once it is told of a failure
                    length = struct.unpack("<I" if identifier == TEXT else "<Q", exactly(4 if identifier == TEXT else 8))[0]
                    text = exactly(length)
                    assert text.endswith(b"\0") == (identifier == TEXT)
                    (self.texts if identifier == TEXT else self.errors).append(text.rstrip(b"\0").decode())
                else:
                    assert identifier == CLOSE
                    break
        except (EOFError, OSError):
            pass
        finally:
            self.closed.set()


@pytest.fixture
def run_gateway() -> Iterator[Callable[..., Gateway]]:
    running: list[tuple[Gateway, threading.Thread]] = []

    def start(endpoint: str, **options) -> Gateway:
        gateway = Gateway(GatewayConfig(port=0, endpoint=endpoint, service_timeout_s=0.5, **options))
        thread = threading.Thread(target=gateway.run, daemon=True)
        thread.start()
        running.append((gateway, thread))
        return gateway

    yield start
    for gateway, thread in running:
        gateway.stop()
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def gateway(service, run_gateway) -> Gateway:
    return run_gateway(service.endpoint)


@pytest.fixture
def connect_peer() -> Iterator[Callable[..., Peer]]:
    """Connects peers to a gateway; they hang up at the end of the test."""
    peers: list[Peer] = []

    def connect(gateway: Gateway, *, fire: bool) -> Peer:
        peers.append(Peer(gateway.port, fire=fire))
        return peers[-1]

    yield connect
    for peer in peers:
        peer.socket.close()


@pytest.fixture(params=["fire", "gadgetron"])
def peer(request, gateway, connect_peer) -> Peer:
    return connect_peer(gateway, fire=request.param == "fire")


@pytest.fixture
def fire(gateway, connect_peer) -> Peer:
    return connect_peer(gateway, fire=True)


@pytest.fixture
def header_of() -> Callable[..., str]:
    """The XML of an MRD header with a field strength and a number of slices."""
    return header_xml


@pytest.fixture
def only_session(service) -> Callable[[], SessionStatus]:
    """What the service says of the one session that it has."""

    def ask() -> SessionStatus:
        with Client(service.endpoint) as client:
            (session,) = client.status().sessions
        return session

    return ask
