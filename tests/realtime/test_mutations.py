"""Mutated messages against server and gateway: no crash, no hang, no memory, and the session that runs beside is undisturbed.

A few thousand by default, 100 000 in the long run (`-m long`). Mutations know the structure (fields, headers, lengths) or are raw
bytes.
"""

from __future__ import annotations

import logging
import random
import socket
import struct
import threading

import msgpack
import numpy as np
import pytest
import zmq

from scansteer.realtime.broker import Broker
from scansteer.realtime.client import Client, image_of
from scansteer.realtime.codec import encode
from scansteer.realtime.config import GatewayConfig, Limits, ServeConfig
from scansteer.realtime.gateway import Gateway
from scansteer.realtime.images import decode_frame, image_message
from scansteer.realtime.messages import (
    Close,
    CommandAck,
    Control,
    DecisionAck,
    GetDecision,
    GetMaps,
    GetMetrics,
    GetStatus,
    Missing,
    Open,
    Ping,
    Played,
    PlayedPulse,
    Subscribe,
)
from scansteer.realtime.worker import Setup, run_job

SEED = 4711
VALUES = [
    None, True, -1, 0, 1, 7, 65535, 65536, 2**31, 2**53, 2**63, -(2**40), 0.5, float("nan"), float("inf"), "", "s", "x" * 5000,
    "../..", "image", "mask", "abort", b"", b"\xff" * 9, [], [1, 2], [-1], {}, {"a": {"b": [None]}}, [[[[[]]]]],
]  # fmt: skip


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def templates(scan, name: str, recorded: bytes | None = None) -> list[list[bytes]]:
    """Valid messages to begin from. Of the running session only a recorded image: to steer it is its owner's right."""
    body = recorded or image_message(np.ones((1, 5, 4), np.float32), repetition=1, meta={"DataRole": "Image"})
    messages = [(image_of(name, body), [body])]
    if recorded is None:
        pulse = PlayedPulse(b1_ut=1.0, offset_ppm=3.0, t_sat_s=1.0, t_rec_s=1.0)
        messages += [
            (message, [])
            for message in (
                Open(session_id=name, scan=scan.model_dump(mode="json")), Missing(session_id=name, repetitions=(5, 6)),
                Played(session_id=name, repetition=1, pulse=pulse), Subscribe(session_id=name, reports_played=True),
                DecisionAck(session_id=name, sequence_number=0, outcome="advice"), Close(session_id=name),
                Control(session_id=name, command_id="c", command="pause"), GetDecision(session_id=name),
                Control(session_id=name, command_id="d", command="exclude", repetition=1), GetMaps(session_id=name), GetStatus(),
                CommandAck(session_id=name, command_id="c", outcome="done"), GetMetrics(), Ping(),
            )
        ]  # fmt: skip
    return [[bytes(frame) for frame in encode(message, bodies)] for message, bodies in messages]


def mutate_fields(generator: random.Random, content: object) -> object:
    """Another value, one field fewer, one more, or the same done deeper inside."""
    if isinstance(content, dict) and content and generator.random() < 0.8:
        key = generator.choice(list(content))
        changed = dict(content)
        match generator.randrange(4):
            case 0:
                del changed[key]
            case 1:
                changed[generator.choice(["x", "kind", "protocol", key + "_"])] = generator.choice(VALUES)
            case _:
                changed[key] = mutate_fields(generator, content[key])
        return changed
    if isinstance(content, list) and content and generator.random() < 0.6:
        index = generator.randrange(len(content))
        return [mutate_fields(generator, item) if number == index else item for number, item in enumerate(content)]
    return generator.choice(VALUES)


def mutate_bytes(generator: random.Random, content: bytes) -> bytes:
    """Bits flipped, a piece cut, doubled or overwritten."""
    if not content:
        return generator.randbytes(5)
    start = generator.randrange(len(content))
    end = min(len(content), start + generator.randrange(1, 20))
    match generator.randrange(5):
        case 0:
            return content[:start] + bytes([content[start] ^ (1 << generator.randrange(8))]) + content[start + 1 :]
        case 1:
            return content[:start]
        case 2:
            return content[:start] + content[end:]
        case 3:
            return content[:end] + content[start:]
        case _:
            return content[:start] + generator.choice([b"\xff", b"\x00", b"\x7f"]) * (end - start) + content[end:]


def mutate_frames(generator: random.Random, frames: list[bytes]) -> list[bytes]:
    match generator.randrange(8):
        case 0:
            return [generator.randbytes(generator.randrange(200)) for _ in range(generator.randrange(4))]
        case 1:
            return frames[: generator.randrange(len(frames))] + [generator.randbytes(9)] * generator.randrange(70)
        case 2 | 3:
            number = generator.randrange(len(frames))
            return [mutate_bytes(generator, frame) if index == number else frame for index, frame in enumerate(frames)]
        case _:
            fields = mutate_fields(generator, msgpack.unpackb(frames[0]))
            try:
                return [msgpack.packb(fields), *frames[1:]]  # type: ignore[list-item]
            except (OverflowError, ValueError):
                return frames


def attack_broker(config: ServeConfig, make, scan, make_image, count: int) -> None:
    jobs: list = []
    broker = Broker(config, make, lambda session_id, job, slow: jobs.append((session_id, job)))
    generator = random.Random(SEED)
    pool = templates(scan, "fuzz") + templates(scan, "running", make_image(0)) * 3
    broker.handle(b"owner", encode(Open(session_id="running", scan=scan.model_dump(mode="json"))))
    before = 0
    for number in range(count):
        if number % max(count // 30, 1) == 0:
            body = make_image(number // max(count // 30, 1) % 30)
            broker.handle(b"owner", encode(image_of("running", body), [body]))
        broker.handle(generator.choice([b"a", b"b"]), mutate_frames(generator, generator.choice(pool)))
        broker.commit()
        while jobs:
            session_id, job = jobs.pop(0)
            broker.finished(session_id, run_job(job))
        if number == count // 10:
            before = resident_bytes()
    broker.tick()
    assert resident_bytes() < 1.1 * before
    decisions = broker.sessions.get("running").decisions
    assert [decision.repetition for decision in decisions] == list(range(30))
    assert decisions[-1].reason == undisturbed(make, scan, make_image)
    broker.close()


def undisturbed(make, scan, make_image) -> str:
    session = make(Setup("running", scan))
    return [session.absorb(decode_frame(make_image(repetition)), received_at=0.0).reason for repetition in range(30)][-1]


@pytest.fixture
def tight_config(serve_config) -> ServeConfig:
    return serve_config.model_copy(update={"fsync": False, "limits": Limits(max_image_bytes=2**20, max_session_bytes=2**24)})


def test_mutated_messages_leave_the_service_as_it_was(tight_config, fake_session, scan, make_image):
    attack_broker(tight_config, fake_session, scan, make_image, 5_000)


@pytest.mark.long
def test_100_000_mutated_messages_leave_the_service_as_it_was(tight_config, fake_session, scan, make_image):
    attack_broker(tight_config, fake_session, scan, make_image, 100_000)


def test_mutated_messages_over_sockets_cost_the_running_session_nothing(service, scan, make_image, fake_session):
    generator = random.Random(SEED)
    pool = templates(scan, "fuzz") + templates(scan, "running", make_image(0))
    context = zmq.Context.instance()
    with Client(service.endpoint) as owner, context.socket(zmq.DEALER) as attacker:
        attacker.linger = 0
        attacker.connect(service.endpoint)
        owner.open(scan, "running")
        owner.subscribe("running")
        for repetition in range(30):
            for _ in range(20):
                frames = mutate_frames(generator, generator.choice(pool))
                attacker.send_multipart(frames or [b""])
            while attacker.poll(0):
                attacker.recv_multipart()
            throw_bytes(service.endpoint, generator)
            owner.send_image("running", make_image(repetition))
        decision = None
        while decision is None or decision.repetition < 29:
            decision = owner.next_decision(10)
            assert decision is not None
    assert decision.reason == undisturbed(fake_session, scan, make_image)


def throw_bytes(endpoint: str, generator: random.Random) -> None:
    """Bytes that are not ZeroMQ's protocol at all, or only its beginning."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)
    content = mutate_bytes(generator, greeting + generator.randbytes(100))
    with socket.create_connection((host, int(port)), timeout=5) as line:
        line.sendall(content)


def connection_bytes(make_image, n_images: int) -> bytes:
    """A complete fire session."""
    scan_name = b"larg-phantom-9.4T"
    header = b'<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"/>\0'
    text = b'{"parameters": {"echo": "0"}}\0'
    parts = [struct.pack("<H", 1) + scan_name.ljust(1024, b"\0")]
    parts += [struct.pack("<HI", 3, len(header)) + header, struct.pack("<HI", 5, len(text)) + text]
    parts += [struct.pack("<H", 1022) + make_image(number, meta={"DataRole": "Image"}) for number in range(n_images)]
    return b"".join(parts) + struct.pack("<H", 4)


def attack_gateway(service, scan, make_image, fake_session, count: int, session_id: str = "running") -> None:
    gateway = Gateway(GatewayConfig(port=0, endpoint=service.endpoint, service_timeout_s=0.5, finish_timeout_s=2, catch_up_s=0.1))
    thread = threading.Thread(target=gateway.run, daemon=True)
    thread.start()
    generator = random.Random(SEED)
    whole = connection_bytes(make_image, 2)
    try:
        with Client(service.endpoint) as owner:
            owner.open(scan, session_id)
            for repetition in range(30):
                for _ in range(max(count // 30, 1)):
                    talk(gateway.port, mutate_stream(generator, whole))
                owner.send_image(session_id, make_image(repetition))
            owner.maps(session_id)
            reason = owner.last_decision(session_id).reason
        assert reason == undisturbed(fake_session, scan, make_image)
        answer = talk(gateway.port, whole)
        for number in range(2):
            assert make_image(number, meta={"DataRole": "Image"}) in answer
        assert answer.endswith(struct.pack("<H", 4))
    finally:
        gateway.stop()
        thread.join(30)
        assert not thread.is_alive()


def mutate_stream(generator: random.Random, whole: bytes) -> bytes:
    """Raw bytes, or a 16, 32 or 64 bit number somewhere in the heads of the messages replaced by an extreme one."""
    if generator.random() < 0.4:
        return mutate_bytes(generator, whole)
    start = generator.choice([0, 1026, 1030, whole.find(b"\xfe\x03")]) + generator.randrange(0, 230)
    value = generator.choice([b"\xff\xff", b"\xff\xff\xff\x7f", b"\xff" * 8, b"\x00\x00", b"\x04\x00", b"\x00\x00\x00\x80"])
    return whole[:start] + value + whole[start + len(value) :]


def talk(port: int, content: bytes) -> bytes:
    """Send a connection's bytes and read until the gateway closes it."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as line:
        received = bytearray()
        try:
            line.sendall(content)
            line.shutdown(socket.SHUT_WR)
            while piece := line.recv(65536):
                received += piece
        except OSError:  # the gateway has ended the connection while we were still sending
            pass
        return bytes(received)


def test_mutated_streams_leave_the_gateway_as_it_was(service, scan, make_image, fake_session):
    attack_gateway(service, scan, make_image, fake_session, 120)


@pytest.mark.long
def test_17_000_mutated_streams_of_six_messages_leave_the_gateway_as_it_was(service, scan, make_image, fake_session, caplog):
    caplog.set_level(logging.CRITICAL, "scansteer")  # pytest keeps every record of a test in memory
    attack_gateway(service, scan, make_image, fake_session, 1_000)
    before = resident_bytes()
    attack_gateway(service, scan, make_image, fake_session, 16_000, session_id="second")
    assert resident_bytes() < 1.1 * before
