"""A service on loopback with a small session in the place of the posterior: what it says depends on everything it was given."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from pydantic import BaseModel

from scansteer.core.errors import InputError
from scansteer.protocols.larg_phantom import PUBLISHED
from scansteer.protocols.scan import Scan
from scansteer.realtime.client import Client
from scansteer.realtime.config import ServeConfig
from scansteer.realtime.images import Frame, image_message
from scansteer.realtime.messages import Decision, LackOfFit, Latency, Pulse
from scansteer.realtime.server import Server
from scansteer.realtime.worker import Setup


class FakeSummary(BaseModel):
    n_images: int
    digest: int


class FakeSession:
    """Obeys `worker.Session`. Its reasons hold a checksum of all frames, pulses and gaps so far, in their order."""

    ready_s = 0.0

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.digest = zlib.crc32(setup.scan.name.encode())
        for role in sorted(setup.auxiliaries):
            self._mix(role, setup.auxiliaries[role].pixels)
        if setup.region is not None:
            self._mix("mask", setup.region.pixels)
        self.n_images = 0
        self.next_repetition = 0
        self.shape = (1, 1, 1)

    def absorb(self, frame: Frame, *, received_at: float, pulse: Pulse | None = None, deadline: float | None = None) -> Decision:
        if not np.all(np.isfinite(frame.pixels)):
            raise InputError(f"The image of repetition {frame.repetition} has pixels that are not finite.")
        assert frame.repetition == self.next_repetition
        self.next_repetition += 1
        self.n_images += 1
        self.shape = frame.pixels.shape
        self._mix(str(pulse), frame.pixels)
        return Decision(
            session_id=self.setup.session_id,
            sequence_number=self.n_images - 1,
            repetition=frame.repetition,
            n_images=self.n_images,
            n_planned=len(self.setup.scan.schedule),
            action="continue",
            reason=f"digest {self.digest}",
            would_stop_at=None,
            regions=(),
            next_pulse=None,
            lack_of_fit=LackOfFit(statistic=None, passed=True),
            posterior_source="reference",
            audit=None,
            valid_until_repetition=frame.repetition + 1,
            latency_ms=Latency(receive=0, update=0, decide=0, total=0),
            margin_ms=None if deadline is None else 1.0,
        )

    def absorb_missing(self, repetition: int, pulse: Pulse | None = None) -> None:
        assert repetition == self.next_repetition
        self.next_repetition += 1
        self._mix(f"missing {repetition} {pulse}", np.zeros(1))

    def confirm_stop(self) -> Decision:
        raise InputError("There is no stop to confirm.")

    def maps(self) -> dict[str, np.ndarray]:
        if self.n_images == 0:
            raise InputError("There is no map before the first image.")
        return {name: np.full(self.shape, self.n_images, np.float32) for name in ("fs_map", "fs_lower", "fs_upper", "nrmse")}

    def summary(self) -> FakeSummary:
        return FakeSummary(n_images=self.n_images, digest=self.digest)

    def close(self) -> None:
        pass

    def _mix(self, text: str, pixels: np.ndarray) -> None:
        self.digest = zlib.crc32(np.ascontiguousarray(pixels, "<f8").tobytes(), zlib.crc32(text.encode(), self.digest))


class Service:
    """A running server; `crash` leaves its folder as a kill would, as far as one process can do that."""

    def __init__(self, config: ServeConfig, make: Callable[[Setup], FakeSession] = FakeSession) -> None:
        self.server = Server(config, make)
        self.endpoint = self.server.endpoint
        self.publish_endpoint = self.server.publish_endpoint
        self._thread = threading.Thread(target=self.server.run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.server.stop()
        self._thread.join(20)
        assert not self._thread.is_alive()
        self.server.close()


@pytest.fixture(scope="session")
def compilations() -> list[str]:
    """What JAX has compiled since this was first asked for; grows."""
    seen: list[str] = []

    def note(event: str, *_: object, **__: object) -> None:
        if "compile" in event:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    return seen


@pytest.fixture
def scan() -> Scan:
    return PUBLISHED


@pytest.fixture
def fake_session() -> type[FakeSession]:
    return FakeSession


@pytest.fixture
def make_image() -> Callable[..., bytes]:
    """The bytes of a small MRD image, not square, with pixels of their own."""

    def make(repetition: int, *, seed: int | None = None, shape: tuple[int, ...] = (1, 5, 4), **header: object) -> bytes:
        pixels = np.random.default_rng(repetition if seed is None else seed).random(shape, np.float32) + 0.5
        return image_message(pixels, repetition=repetition, **header)  # type: ignore[arg-type]

    return make


@pytest.fixture
def serve_config(tmp_path: Path) -> ServeConfig:
    """Free ports on loopback, a folder of its own, short waits."""
    return ServeConfig(
        endpoint="tcp://127.0.0.1:*", publish_endpoint="tcp://127.0.0.1:*", data_dir=tmp_path / "sessions", resend_s=0.05
    )


@pytest.fixture
def run_service() -> Iterator[Callable[..., Service]]:
    """Starts services that are stopped at the end of the test."""
    running: list[Service] = []

    def start(config: ServeConfig, make: Callable[[Setup], FakeSession] = FakeSession) -> Service:
        running.append(Service(config, make))
        return running[-1]

    yield start
    for service in running:
        service.stop()


@pytest.fixture
def service(serve_config: ServeConfig, run_service: Callable[..., Service]) -> Service:
    return run_service(serve_config)


@pytest.fixture
def connect(service: Service) -> Iterator[Callable[..., Client]]:
    """Connects clients to the running service; they are closed at the end of the test."""
    clients: list[Client] = []

    def open_client(**options: object) -> Client:
        clients.append(Client(service.endpoint, **options))  # type: ignore[arg-type]
        return clients[-1]

    yield open_client
    for client in clients:
        client.disconnect()


@pytest.fixture
def client(connect: Callable[..., Client]) -> Client:
    return connect()


