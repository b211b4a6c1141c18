"""How fast the service takes images in, as ratios to what the machine can do at all in the same run.

    python benchmarks/wire.py [--out FILE.json]              ingest and durability: a minute
    python benchmarks/wire.py --sessions 10                  ten real sessions at one image a second each
    python benchmarks/wire.py --memory-minutes 10            resident memory while streaming at ten times the real pace

Ingest is measured with images that wait for their predecessors, so that no posterior is computed beside it. Sessions get the images
of a simulated phantom of `--scan`, and run on the engine that the service gives them (`--encoder none`: the reference).
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
from scansteer.protocols.scan import Scan, load
from scansteer.realtime.client import Client, image_of
from scansteer.realtime.codec import encode
from scansteer.realtime.config import ServeConfig
from scansteer.realtime.freed_memory import allocate_in_one_arena
from scansteer.realtime.images import image_message
from scansteer.realtime.messages import Decision
from scansteer.realtime.replay import session_maker
from scansteer.realtime.server import Server
from scansteer.simulators.phantom import Magnet, three_vials
from scansteer.simulators.scanner import image_of as simulated_image

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


def service_process(config: dict, ready: Any, stop: Any, encoder: str | None) -> None:
    def nothing(setup: object) -> Any:
        return None  # no posterior: the images of the ingest benchmark wait for one that does not come

    make = nothing if encoder is None else session_maker(encoder=None if encoder == "shipped" else encoder)
    allocate_in_one_arena()  # as `scansteer serve` has it
    with Server(ServeConfig.model_validate(config), make) as server:
        threading.Thread(target=lambda: (stop.wait(), server.stop()), daemon=True).start()
        ready.set()
        server.run()


@contextmanager
def service(folder: Path, *, encoder: str | None = None, **settings: object) -> Iterator[tuple[str, int]]:
    """A service in a process of its own, with a posterior if `encoder` is given; gives its endpoint and process id."""
    spawn = multiprocessing.get_context("spawn")
    ready, stop = spawn.Event(), spawn.Event()
    endpoint = f"ipc://{folder}/service"
    config = {
        "endpoint": endpoint,
        "publish_endpoint": f"ipc://{folder}/publish",
        "data_dir": str(folder / "sessions"),
        **settings,
    }
    process = spawn.Process(target=service_process, args=(config, ready, stop, encoder))
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


def pictures(scan: Scan) -> list[bytes]:
    """The images of a simulated phantom."""
    magnet = Magnet(three_vials(scan), scan)
    return [simulated_image(magnet.play(block), magnet, n) for n, block in enumerate(scan.schedule)]


def sessions_at_once(n_sessions: int, seconds: float, scan: Scan, encoder: str, threads: int) -> dict[str, Any]:
    """Decision latency, from sending an image to receiving the decision, of sessions that get one image a second each."""
    bodies = pictures(scan)
    with (
        tempfile.TemporaryDirectory() as name,
        service(Path(name), encoder=encoder, worker_threads=threads, warm_scans=[scan.name]) as (endpoint, process),
        Client(endpoint, timeout_s=60) as client,
    ):
        warmed = time.perf_counter()
        while not client.status().ready:
            time.sleep(0.1)
        opened = time.perf_counter()
        names = [client.open(scan) for _ in range(n_sessions)]
        for session_id in names:
            client.wait_ready(session_id, 600)
        ready = time.perf_counter()
        for session_id in names:
            client.subscribe(session_id)
        before = cpu_seconds(process)
        decisions = stream_at_once(client, names, bodies[: int(seconds)])
        used = cpu_seconds(process) - before
        resident = resident_bytes(process)
    latencies = [latency for latency, _ in decisions]
    return {
        "scan": scan.name,
        "encoder": encoder,
        "worker_threads": threads,
        "n_voxels": sum(region.n_voxels for region in decisions[0][1].regions),
        "sources": sorted({decision.posterior_source for _, decision in decisions}),
        "warm_up_s": opened - warmed,
        "ready_s_each": (ready - opened) / n_sessions,
        "resident_mib": resident / 2**20,
        "cpu_ms_each": 1e3 * used / len(decisions),
        "n_images": n_sessions * min(int(seconds), len(bodies)),
        "n_decisions": len(decisions),
        "latency_p50_ms": float(np.percentile(latencies, 50)),
        "latency_p99_ms": float(np.percentile(latencies, 99)),
    }


def stream_at_once(client: Client, names: list[str], bodies: list[bytes]) -> list[tuple[float, Decision]]:
    """Send every session an image a second, one session after the other within it; each decision with its latency [ms].

    Raises
    ------
    SystemExit
        A decision did not come within 60 s of the last image.
    """
    sent: dict[tuple[str, int], float] = {}
    found: dict[tuple[str, int], tuple[float, Decision]] = {}
    started = time.perf_counter()
    for repetition, body in enumerate(bodies):
        for number, session_id in enumerate(names):
            collect(client, sent, found, started + repetition + number / len(names))
            sent[session_id, repetition] = time.perf_counter()
            client.post_image(session_id, body)
    deadline = time.perf_counter() + 60
    while len(found) < len(sent) and time.perf_counter() < deadline:
        collect(client, sent, found, time.perf_counter() + 0.1)
    if len(found) < len(sent):
        raise SystemExit(f"{len(sent) - len(found)} of {len(sent)} decisions did not come.")
    return list(found.values())


def collect(
    client: Client,
    sent: dict[tuple[str, int], float],
    found: dict[tuple[str, int], tuple[float, Decision]],
    until: float,
) -> None:
    """Take decisions in as they come; one that is repeated because its acknowledgement is under way counts once."""
    while (left := until - time.perf_counter()) > 0:
        decision = client.next_decision(left)
        if decision is not None:
            image = decision.session_id, decision.repetition
            found.setdefault(image, (1e3 * (time.perf_counter() - sent[image]), decision))
            client.acknowledge(decision)


def memory(minutes: float, scan: Scan, encoder: str) -> dict[str, Any]:
    """Resident memory of a service with the real posterior, streaming one session after the other at ten times the real pace."""
    bodies = pictures(scan)
    pace = float(np.mean([block.duration_s for block in scan.schedule])) / 10
    resident: list[tuple[float, int]] = []
    n_sessions = 0
    with (
        tempfile.TemporaryDirectory() as name,
        service(Path(name), encoder=encoder, warm_scans=[scan.name]) as (endpoint, process),
        Client(endpoint, timeout_s=60) as client,
    ):
        while not client.status().ready:
            time.sleep(0.1)
        started = time.perf_counter()
        while time.perf_counter() - started < 60 * minutes:
            n_sessions += 1
            session_id = client.open(scan)
            client.wait_ready(session_id, 600)
            for body in bodies:
                due = time.perf_counter() + pace
                client.send_image(session_id, body)
                resident.append((time.perf_counter() - started, resident_bytes(process)))
                time.sleep(max(0.0, due - time.perf_counter()))
            client.close_session(session_id, 600)
    return {"scan": scan.name, "encoder": encoder, "minutes": minutes, "n_sessions": n_sessions, **by_minute(resident)}


def by_minute(resident: list[tuple[float, int]]) -> dict[str, Any]:
    """Mean resident memory of every minute [MiB], and the last over the second."""
    last = int(resident[-1][0] // 60)
    means = [float(np.mean([size for at, size in resident if at // 60 == minute])) / 2**20 for minute in range(last + 1)]
    whole = means[:-1] if resident[-1][0] % 60 < 30 else means
    return {"resident_mib": [round(mean, 1) for mean in whole], "last_over_second": whole[-1] / whole[1] if len(whole) > 1 else None}


def resident_bytes(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(process: int) -> float:
    """Of all threads of a process, in user and system mode."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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
    parser.add_argument("--scan", default=PUBLISHED.name)
    parser.add_argument("--encoder", default="shipped", help="shipped, none, or a file")
    parser.add_argument("--threads", type=int, default=1, help="worker threads of the service")
    parser.add_argument("--only", choices=("ingest", "durability"))
    parser.add_argument("--memory-minutes", type=float, default=0)
    options = parser.parse_args()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # for the service's process, as `scansteer serve` has it
    result: dict[str, Any] = {"machine": machine()}
    if options.sessions:
        scan = load(options.scan)
        result["sessions_at_once"] = sessions_at_once(options.sessions, options.seconds, scan, options.encoder, options.threads)
    elif options.memory_minutes:
        result["memory"] = memory(options.memory_minutes, load(options.scan), options.encoder)
    else:
        if options.only != "durability":
            result["ingest"] = {f"{size}x{size}": ingest(size, 3000 if size == 64 else 600) for size in SIZES}
        if options.only != "ingest":
            result["durability"] = {f"{size}x{size}": durability(size, 1000 if size == 64 else 300) for size in SIZES}
    text = json.dumps(result, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
