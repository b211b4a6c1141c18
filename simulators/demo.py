"""The demonstration: service, virtual scanner and virtual controller over real sockets, from first pulse to report."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from scansteer.core.errors import ScansteerError
from scansteer.protocols.scan import SaturationBlock, Scan, load
from scansteer.realtime.client import Client
from scansteer.realtime.controller import Controller
from scansteer.realtime.images import image_message
from scansteer.realtime.messages import Decision, DecisionMessage, SessionNotice, WireMessage
from scansteer.realtime.outputs import DecisionLog, write_outputs
from scansteer.realtime.report import stop_sentence
from scansteer.simulators.controller import SequenceController
from scansteer.simulators.phantom import Magnet, Phantom, three_vials
from scansteer.simulators.scanner import run_scan

SCAN = "larg-phantom-9.4T"
SPEED = 20.0
VIALS = ("vial 1", "vial 2", "vial 3")
_START_S = 60.0
_READY_S = 120.0
_DECISION_S = 30.0


def run_demo(out: Path, console: Console | None = None, *, scan: Scan | None = None, speed: float = SPEED) -> list[Decision]:
    """Scan a digital phantom under the service's control and write decisions, maps and report.

    Parameters
    ----------
    out
        Folder for the results.
    console
        Where progress is shown; none: the terminal.
    scan
        What is acquired; none: the L-arginine phantom as published.
    speed
        How many times faster than the protocol.

    Raises
    ------
    ScansteerError
        The service did not start or gave up.
    """
    console = console or Console()
    scan = load(SCAN) if scan is None else scan
    planned_s = sum(block.duration_s for block in scan.schedule)
    console.print(
        f"A virtual scanner plays {scan.name!r} ({len(scan.schedule)} images, {planned_s:.0f} s at the protocol's pace) on three "
        f"digital vials, {speed:g} times faster than that. The service compiles first."
    )
    with tempfile.TemporaryDirectory(prefix="scansteer-demo-") as folder, running_service(Path(folder)) as endpoint:
        phantom = three_vials(scan)
        with Client(endpoint, timeout_s=20.0) as client, DecisionLog(out / "decisions.jsonl") as log:
            session_id = _open_session(client, scan, phantom)
            magnet = _wait_until_ready(client, session_id, scan, phantom, console)
            _scan(client, endpoint, session_id, scan, magnet, log, console, speed)
            maps = client.maps(session_id)
            summary = client.close_session(session_id)
    write_outputs(out, log.decisions, phantom.geometry, maps, summary)
    _say_what_came_out(console, out, scan, phantom, maps, log.decisions)
    return log.decisions


@contextlib.contextmanager
def running_service(folder: Path) -> Iterator[str]:
    """`scansteer serve` in a process of its own, on free loopback ports; gives its endpoint and ends it afterwards."""
    endpoints = [f"tcp://127.0.0.1:{port}" for port in _free_ports(2)]
    settings = {"endpoint": endpoints[0], "publish_endpoint": endpoints[1], "data_dir": str(folder / "sessions")}
    (folder / "serve.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    command = [sys.executable, "-m", "scansteer.realtime.cli", "serve", "--config", str(folder / "serve.yaml")]
    with (folder / "service.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            _wait_for(process, endpoints[0], folder / "service.log")
            yield endpoints[0]
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for(process: subprocess.Popen, endpoint: str, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    with Client(endpoint) as client:
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(ScansteerError):
                client.ping(timeout_s=0.5)
                return
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    raise ScansteerError(f"The service did not start: {said[-1] if said else 'it said nothing'}")


def _free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on at the moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _open_session(client: Client, scan: Scan, phantom: Phantom) -> str:
    """Open a session with the vials as regions of interest; the service begins to compile."""
    session_id = client.open(scan, f"demo-{uuid.uuid4().hex[:8]}", n_auxiliary=1, region_names=VIALS)
    mask = image_message(phantom.labels.astype(np.uint16), phantom.geometry, meta={"DataRole": "Mask"})
    client.send_image(session_id, mask, role="mask")
    return session_id


def _wait_until_ready(client: Client, session_id: str, scan: Scan, phantom: Phantom, console: Console) -> Magnet:
    """Compile the virtual scanner while the service compiles the session."""
    started = time.monotonic()
    with console.status("compiling and simulating the schedule"):
        magnet = Magnet(phantom, scan)
        client.wait_ready(session_id, _READY_S)
    console.print(f"Ready after {time.monotonic() - started:.0f} s.")
    return magnet


def _scan(
    client: Client,
    endpoint: str,
    session_id: str,
    scan: Scan,
    magnet: Magnet,
    log: DecisionLog,
    console: Console,
    speed: float,
) -> None:
    """Run the scan with a progress display, until every image has its decision."""
    columns = (TextColumn("image"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Controller(session_id, endpoint, mode="acting") as adviser, Progress(*columns, console=console) as progress:
        if not adviser.wait_connected(10.0):
            raise ScansteerError("The controller found no service to listen to.")
        task = progress.add_task("", total=len(scan.schedule))

        def show(repetition: int, block: SaturationBlock) -> None:
            _take_decisions(client, session_id, log)
            progress.update(task, completed=repetition + 1, description=_brief(log.decisions))

        n_images = run_scan(
            scan,
            magnet,
            SequenceController(scan, adviser),
            lambda body: client.send_image(session_id, body),
            speed=speed,
            on_image=show,
        )
        _take_decisions(client, session_id, log, n_images)
        progress.update(task, description=_brief(log.decisions))


def _take_decisions(client: Client, session_id: str, log: DecisionLog, n_expected: int | None = None) -> None:
    """Write down the decisions that have come; with a number, wait until that image's decision is among them.

    Subscribing again says that somebody still listens, and asks for what has been missed.

    Raises
    ------
    ScansteerError
        The session has failed.
    """
    deadline = time.monotonic() + _DECISION_S
    while True:
        client.subscribe(session_id, last_decision=log.decisions[-1].sequence_number if log.decisions else -1)
        while (message := client.receive()) is not None:
            _note(message, client, log)
        is_complete = n_expected is None or (log.decisions and log.decisions[-1].n_images >= n_expected)
        if is_complete or time.monotonic() >= deadline:
            return
        client.take_in(0.5)


def _note(message: WireMessage, client: Client, log: DecisionLog) -> None:
    if isinstance(message, SessionNotice) and message.state == "failed":
        raise ScansteerError(f"The session failed: {message.reason}")
    if not isinstance(message, DecisionMessage):
        return
    client.acknowledge(message.decision)
    if not log.decisions or message.decision.sequence_number > log.decisions[-1].sequence_number:
        log.append(message.decision)


def _brief(decisions: list[Decision]) -> str:
    if not decisions:
        return "no decision yet"
    last = decisions[-1]
    converged = min((region.fraction_converged for region in last.regions), default=0.0)
    return f"{last.action}, {converged:.0%} converged"


def _say_what_came_out(
    console: Console, out: Path, scan: Scan, phantom: Phantom, maps: dict[str, np.ndarray], decisions: list[Decision]
) -> None:
    fraction, rate = scan.parameter_names
    for number, name in enumerate(VIALS, start=1):
        inside = phantom.labels == number
        found_f, found_k = (float(np.nanmedian(maps[f"{parameter}_map"][inside])) for parameter in (fraction, rate))
        true_f, true_k = (float(phantom.values[parameter][number - 1]) for parameter in (fraction, rate))
        found = f"{fraction} {100 * found_f:.3g} % (true {100 * true_f:.3g} %), {rate} {found_k:.0f} 1/s (true {true_k:.0f} 1/s)"
        console.print(f"{name}: {found}")
    if decisions:
        console.print(stop_sentence(decisions))
    console.print(f"Report: {(out / 'report.html').resolve()}", soft_wrap=True)
