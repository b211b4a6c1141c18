"""The protocol without sockets: time, disk and worker are the test's own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import pytest

from scansteer.realtime.broker import Broker
from scansteer.realtime.client import image_of
from scansteer.realtime.codec import decode, encode
from scansteer.realtime.config import ServeConfig
from scansteer.realtime.messages import Open, WireMessage
from scansteer.realtime.outbox import Outgoing
from scansteer.realtime.worker import run_job


class Stage:
    """A broker whose jobs run when `work` says so and whose clock stands still."""

    def __init__(self, config: ServeConfig, make) -> None:
        self.now = 1000.0
        self.jobs: list[tuple[str, object]] = []
        self.recorded: list[tuple[bytes, list[bytes]]] = []
        self.broker = Broker(config, make, lambda session_id, job, slow: self.jobs.append((session_id, job)), lambda: self.now)

    def say(self, message: WireMessage, bodies: Sequence[bytes] = (), identity: bytes = b"client") -> list[WireMessage]:
        frames = [bytes(frame) for frame in encode(message, bodies)]
        self.recorded.append((identity, frames))
        return self.send(identity, frames)

    def send(self, identity: bytes, frames: list[bytes]) -> list[WireMessage]:
        out = self.broker.handle(identity, frames)
        return _heard(out + self.broker.commit())

    def work(self) -> list[WireMessage]:
        out: list[Outgoing] = []
        while self.jobs:
            session_id, job = self.jobs.pop(0)
            out += self.broker.finished(session_id, run_job(job))
        return _heard(out + self.broker.commit())

    def tick(self, seconds: float) -> list[WireMessage]:
        self.now += seconds
        return _heard(self.broker.tick() + self.broker.commit())

    def image(self, session_id: str, body: bytes) -> list[WireMessage]:
        return self.say(image_of(session_id, body), [body])

    def commit(self) -> list[WireMessage]:
        return _heard(self.broker.commit())

    def restarted(self, config: ServeConfig, make) -> Stage:
        """Another broker on the same folder, as after a kill: nothing is flushed or closed."""
        assert self.broker.sessions._lock is not None
        os.close(self.broker.sessions._lock)  # what the kernel does with a lock when its process dies
        self.broker.sessions._lock = None
        return Stage(config, make)


def _heard(outgoing: list[Outgoing]) -> list[WireMessage]:
    """Messages to clients; those to watchers left out."""
    return [decode(out.frames)[0] for out in outgoing if out.identity is not None]


@pytest.fixture
def make_stage() -> type[Stage]:
    """Makes a stage from a configuration and a maker of sessions."""
    return Stage


@pytest.fixture
def stage(serve_config, fake_session) -> Iterator[Stage]:
    stage = Stage(serve_config, fake_session)
    yield stage
    stage.broker.close()


@pytest.fixture
def opening(scan) -> Open:
    return Open(session_id="s", scan=scan.model_dump(mode="json"))


@pytest.fixture
def kinds() -> Callable[[list[WireMessage]], list[str]]:
    return lambda messages: [message.kind for message in messages]  # type: ignore[attr-defined]
