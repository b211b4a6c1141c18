"""How fast the service takes images in, as ratios to what the machine can do at all in the same run.

    python benchmarks/wire.py [--out FILE.json]              ingest and durability: a minute
    python benchmarks/wire.py --sessions 10 --seconds 60     ten real sessions at one image a second each
    python benchmarks/wire.py --memory-minutes 10            resident memory while streaming at ten times the real pace

Ingest is measured with images that wait for their predecessors, so that no posterior is computed beside it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from scansteer.protocols.larg_phantom import PUBLISHED
from scansteer.protocols.scan import Scan
from scansteer.realtime.client import Client, image_of
from scansteer.realtime.codec import encode
from scansteer.realtime.config import ServeConfig
from scansteer.realtime.images import image_message
from scansteer.realtime.server import Server

SIZES = (64, 256)
WINDOW = 32
"""Messages under way at a time."""


def echo_process(endpoint: str, ready: Any) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind(endpoint)
        ready.set()
        while True:
            frames = router.recv_multipart()
            if len(frames) == 2:
                break
            router.send_multipart(frames)


def service_process(config: dict, ready: Any, stop: Any, real: bool) -> None:
    def make(setup):
        if real:
            from scansteer.realtime.session import Session

            return Session(setup)
        return None  # never asked: the images of the ingest benchmark wait for one that does not come

    with Server(ServeConfig.model_validate(config), make) as server:
        threading.Thread(target=lambda: (stop.wait(), server.stop()), daemon=True).start()
        ready.set()
        server.run()


@contextmanager
def service(folder: Path, *, fsync: bool = True, real: bool = False) -> Iterator[tuple[str, int]]:
    """A service in a process of its own; gives its endpoint and process id."""
    spawn = multiprocessing.get_context("spawn")
    ready, stop = spawn.Event(), spawn.Event()
    endpoint = f"ipc://{folder}/service"
    config = {
        "endpoint": endpoint,
        "publish_endpoint": f"ipc://{folder}/publish",
        "data_dir": str(folder / "sessions"),
        "fsync": fsync,
    }
    process = spawn.Process(target=service_process, args=(config, ready, stop, real))
    process.start()
    ready.wait(60)
    try:
        yield endpoint, process.pid or 0
    finally:
        stop.set()
        process.join(30)
        process.kill()


def images_per_second(endpoint: str, messages: list[list[Any]]) -> float:
    """Send all messages with a window of `WINDOW`; one answer is awaited for each."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(endpoint)
        started = time.perf_counter()
        for number, frames in enumerate(messages):
            dealer.send_multipart(frames)
            if number >= WINDOW:
                dealer.recv_multipart()
        for _ in range(min(WINDOW, len(messages))):
            dealer.recv_multipart()
        return len(messages) / (time.perf_counter() - started)


def ingest_messages(session_id: str, size: int, count: int) -> list[list[Any]]:
    """Images 1, 2, ..; image 0 never comes."""
    pixels = np.random.default_rng(0).random((1, size, size), np.float32)
    bodies = [image_message(pixels, repetition=number + 1) for number in range(count)]
    return [encode(image_of(session_id, body).model_copy(update={"request_id": 1}), [body]) for body in bodies]


def ingest(size: int, count: int, repeats: int = 5) -> dict[str, float]:
    """Images a second through a raw echo of the same bytes and into the service without fsync: best of alternating runs."""
    spawn = multiprocessing.get_context("spawn")
    echoed, taken = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ready = spawn.Event()
        endpoint = f"ipc://{folder}/echo"
        echo = spawn.Process(target=echo_process, args=(endpoint, ready))
        echo.start()
        ready.wait(60)
        with service(folder, fsync=False) as (service_endpoint, _):
            for repeat in range(repeats):
                session_id = f"bench-{repeat}"
                with Client(service_endpoint, timeout_s=30) as client:
                    client.open(PUBLISHED.model_copy(update={"matrix": None}), session_id, n_auxiliary=1)
                messages = ingest_messages(session_id, size, count)
                echoed.append(images_per_second(endpoint, messages))
                taken.append(images_per_second(service_endpoint, messages))
        with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.connect(endpoint)
            dealer.send(b"end")
            echo.join(10)
    ratios = [mine / theirs for mine, theirs in zip(taken, echoed, strict=True)]
    return {"echo_per_s": max(echoed), "ingest_per_s": max(taken), "ratio": float(np.median(ratios))}


def durability(size: int, count: int) -> dict[str, float]:
    """Milliseconds from sending an image to `accepted`, fsync included, beside a bare write + fsync of the same bytes."""
    messages = ingest_messages("durable", size, count)
    bare, accepted = [], []
    with tempfile.TemporaryDirectory(dir=".") as name:  # the disk of the working folder: /tmp may be memory
        folder = Path(name)
        with service(folder) as (endpoint, _), Client(endpoint, timeout_s=30) as client, open(folder / "bare", "wb", 0) as file:
            client.open(PUBLISHED.model_copy(update={"matrix": None}), "durable", n_auxiliary=1)
            for frames in messages:
                body = bytes(frames[1])
                bare.append(timed(lambda body=body: (file.write(body), os.fsync(file.fileno()))))
                accepted.append(timed(lambda body=body: client.send_image("durable", body)))
    bare_p99, accepted_p99 = np.percentile(bare, 99), np.percentile(accepted, 99)
    return {
        "write_fsync_p50_ms": float(np.median(bare)),
        "write_fsync_p99_ms": float(bare_p99),
        "accepted_p50_ms": float(np.median(accepted)),
        "accepted_p99_ms": float(accepted_p99),
        "allowed_p99_ms": float(5 * bare_p99 + 5),
    }


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return 1e3 * (time.perf_counter() - started)


def pictures(scan: Scan, size: int = 64) -> list[bytes]:
    """A disc of about 1 000 voxels with noise."""
    generator = np.random.default_rng(1)
    y, x = np.mgrid[:size, :size] - size / 2
    disc = 1000.0 * (np.hypot(x, y) < 18) + 2.0
    noisy = [disc * (1 - 0.01 * n) + generator.normal(0, 2, disc.shape) for n in range(len(scan.schedule))]
    return [image_message(image[None].astype(np.float32), repetition=n) for n, image in enumerate(noisy)]


def sessions_at_once(n_sessions: int, seconds: float) -> dict[str, float]:
    """Decision latency of real sessions that get one image a second each."""
    scan = PUBLISHED
    bodies = pictures(scan)
    with tempfile.TemporaryDirectory() as name, service(Path(name), real=True) as (endpoint, _):
        clients = [Client(endpoint, timeout_s=60) for _ in range(n_sessions)]
        names = [client.open(scan) for client in clients]
        for client, session_id in zip(clients, names, strict=True):
            client.wait_ready(session_id, 600)
            client.subscribe(session_id)
        sent: dict[tuple[str, int], float] = {}
        latencies: list[float] = []
        started = time.perf_counter()
        n_images = min(int(seconds), len(bodies))
        for repetition in range(n_images):
            for number, (client, session_id) in enumerate(zip(clients, names, strict=True)):
                due = started + repetition + number / n_sessions
                collect(clients, sent, latencies, due)
                sent[session_id, repetition] = time.perf_counter()
                client.send_image(session_id, bodies[repetition])
        collect(clients, sent, latencies, time.perf_counter() + 5)
        for client in clients:
            client.disconnect()
    return {
        "n_decisions": len(latencies),
        "n_images": n_sessions * n_images,
        "latency_p50_ms": float(np.percentile(latencies, 50)),
        "latency_p99_ms": float(np.percentile(latencies, 99)),
    }


def collect(clients: list[Client], sent: dict[tuple[str, int], float], latencies: list[float], until: float) -> None:
    """Take decisions in as they come."""
    while time.perf_counter() < until:
        for client in clients:
            decision = client.next_decision(0.0)
            if decision is not None:
                latencies.append(1e3 * (time.perf_counter() - sent[decision.session_id, decision.repetition]))
                client.acknowledge(decision)
        time.sleep(0.001)


def memory(minutes: float) -> dict[str, Any]:
    """Resident memory of a service with the real posterior, streaming one session after the other at ten times the real pace."""
    scan = PUBLISHED
    bodies = pictures(scan)
    pace = np.mean([block.duration_s for block in scan.schedule]) / 10
    resident: list[tuple[float, int]] = []
    with (
        tempfile.TemporaryDirectory() as name,
        service(Path(name), real=True) as (endpoint, process),
        Client(endpoint, timeout_s=60) as client,
    ):
        started = time.perf_counter()
        while time.perf_counter() - started < 60 * minutes:
            session_id = client.open(scan)
            client.wait_ready(session_id, 600)
            for body in bodies:
                client.send_image(session_id, body)
                resident.append((time.perf_counter() - started, resident_bytes(process)))
                time.sleep(pace)
            client.close_session(session_id)
    second = [size for at, size in resident if 60 <= at < 120]
    last = [size for at, size in resident if at >= 60 * (minutes - 1)]
    return {
        "minutes": minutes,
        "second_minute_mib": float(np.mean(second)) / 2**20 if second else None,
        "last_minute_mib": float(np.mean(last)) / 2**20,
        "ratio": float(np.mean(last) / np.mean(second)) if second else None,
    }


def resident_bytes(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def machine() -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "zeromq": zmq.zmq_version(),
        "system": platform.system(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sessions", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--memory-minutes", type=float, default=0)
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": machine()}
    if options.sessions:
        result["sessions_at_once"] = sessions_at_once(options.sessions, options.seconds)
    elif options.memory_minutes:
        result["memory"] = memory(options.memory_minutes)
    else:
        result["ingest"] = {f"{size}x{size}": ingest(size, 3000 if size == 64 else 600) for size in SIZES}
        result["durability"] = {f"{size}x{size}": durability(size, 1000 if size == 64 else 300) for size in SIZES}
    text = json.dumps(result, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
