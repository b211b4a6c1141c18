"""Replay a stored scan, image by image, as if it arrived from the scanner: in this process, or through a running service."""

from __future__ import annotations

import gc
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from scansteer.core.errors import InputError, ScansteerError
from scansteer.protocols.scan import Scan
from scansteer.realtime import maps as map_files
from scansteer.realtime import roi as roi_files
from scansteer.realtime.client import Client
from scansteer.realtime.connection import RefusedError
from scansteer.realtime.encoded import engine_maker
from scansteer.realtime.images import Frame, Geometry, Role, encode_frame
from scansteer.realtime.messages import Decision, DecisionMessage, Refused, Unusable
from scansteer.realtime.outputs import DecisionLog, write_outputs
from scansteer.realtime.retrospective import Comparison, Recorder, TooFewImages, clipped
from scansteer.realtime.session import AUXILIARIES, Files, Session, to_scan_unit
from scansteer.realtime.sources import Source, StoredImage, check_against, open_source
from scansteer.realtime.worker import Setup


@dataclass(frozen=True)
class Options:
    """What a user may ask of a replay."""

    images: int | None = None
    """Only the first so many."""
    maps_at: tuple[int, ...] = ()
    stop: bool = False
    """End where a stop is called."""
    realtime: bool = False
    connect: str | None = None
    roi: Path | None = None
    maps: dict[str, str] = field(default_factory=dict)
    """Role -> NIfTI file."""
    encoder: str | None = None
    """File, `none`, or nothing: the shipped one."""


class UnusableError(InputError):
    """An image is not used; its pulse is simulated, and the session goes on."""

    def __init__(self, repetition: int, reason: str) -> None:
        named = f"repetition {repetition}"
        super().__init__(reason if named in reason else f"The image of {named} is not used: {reason}")


class Streamed(NamedTuple):
    """What came of giving the images to a runner, decisions apart."""

    troubles: list[str]
    """What went wrong, one sentence each."""
    maps_at: dict[int, dict[str, np.ndarray]]
    geometry: Geometry | None
    """That of the first image that could be used."""


class Runner(Protocol):
    """Whoever turns images into decisions: a session here, or one at a service."""

    def decide(self, image: StoredImage) -> Decision:
        """
        Raises
        ------
        UnusableError
            The image is not used.
        """
        ...

    def maps(self) -> dict[str, np.ndarray]: ...
    def finish(self) -> dict[str, Any]: ...


class Here:
    """A session in this process."""

    def __init__(self, setup: Setup, encoder: str | None) -> None:
        self._session = session_maker(encoder=encoder)(setup)
        gc.freeze()  # what was compiled stays: looking through it for garbage takes 0.2 s, in the middle of an image

    def decide(self, image: StoredImage) -> Decision:
        try:
            return self._session.absorb(image.frame, received_at=time.perf_counter())
        except InputError as error:
            self._session.absorb_missing(image.frame.repetition)
            raise UnusableError(image.frame.repetition, str(error)) from error

    def maps(self) -> dict[str, np.ndarray]:
        return self._session.maps()

    def finish(self) -> dict[str, Any]:
        self._session.close()
        return self._session.summary().model_dump(mode="json")


class Remote:
    """A session at a service that already runs."""

    READY_TIMEOUT_S = 600.0
    DECISION_TIMEOUT_S = 60.0

    def __init__(self, setup: Setup, client: Client) -> None:
        self._client = client
        side = dict(setup.auxiliaries) | ({"mask": setup.region} if setup.region is not None else {})
        self._session_id = self._client.open(
            setup.scan, setup.session_id, n_auxiliary=len(side), region_names=setup.region_names, use_encoder=setup.use_encoder
        )
        for role, frame in side.items():
            self._client.send_image(self._session_id, encode_frame(replace(frame, role=role)), role=role)  # type: ignore[arg-type]
        self._client.wait_ready(self._session_id, self.READY_TIMEOUT_S)
        self._seen = -1
        self._next = 0

    def decide(self, image: StoredImage) -> Decision:
        repetition = image.frame.repetition
        self._client.subscribe(self._session_id, last_decision=self._seen)  # a controller that is not heard of is forgotten
        if repetition > self._next:
            self._client.declare_missing(self._session_id, range(self._next, repetition))
            self._next = repetition
        self._client.send_image(self._session_id, image.message)
        self._next = repetition + 1
        decision = self._answer(repetition)
        self._client.acknowledge(decision)
        self._seen = decision.sequence_number
        return decision

    def _answer(self, repetition: int) -> Decision:
        deadline = time.monotonic() + self.DECISION_TIMEOUT_S
        while (message := self._client.receive(max(0.0, deadline - time.monotonic()))) is not None:
            match message:
                case DecisionMessage(decision=decision) if decision.repetition == repetition:
                    return decision
                case DecisionMessage(decision=late):
                    self._client.acknowledge(late)
                case Unusable(repetition=unused, reason=reason) if unused == repetition:
                    raise UnusableError(repetition, reason)
                case Refused() if message.request_id:
                    raise RefusedError(message)
        raise InputError(f"The service gave no decision on repetition {repetition} within {self.DECISION_TIMEOUT_S:g} s.")

    def maps(self) -> dict[str, np.ndarray]:
        return self._client.maps(self._session_id)

    def finish(self) -> dict[str, Any]:
        return self._client.close_session(self._session_id)


def replay_file(path: Path, scan: Scan, out: Path, options: Options) -> None:
    """Replay a file and write everything into `out`; what came before a failure is written too.

    Raises
    ------
    InputError
        The file, the scan, the region or a map do not fit together, or no image can be used; nothing was replayed.
    ScansteerError
        The file was cut off, or images could not be used; what could be is in `out`.
    """
    console = Console(stderr=True)
    if options.connect is not None and options.encoder not in (None, "none"):
        raise InputError(f"--encoder {options.encoder} with --connect: the service uses its own; give the file to `scansteer serve`.")
    with open_source(path) as source, ExitStack() as stack:
        warnings = [*check_against(source, scan, options.images), *source.warnings]
        for warning in warnings:
            console.print(f"[yellow]Warning:[/yellow] {warning}", highlight=False)
        setup = _setup(source, scan, options)
        _check_images(options, source)
        log = stack.enter_context(DecisionLog(out / "decisions.jsonl"))
        with console.status("compiling and simulating the schedule"):
            if options.connect is None:
                runner: Runner = Here(setup, options.encoder)
            else:
                runner = Remote(setup, stack.enter_context(Client(options.connect)))
        recorder = Recorder(scan)
        try:
            troubles, maps_at, geometry = _stream(source, runner, scan, log, recorder, options, console)
        except ScansteerError:
            runner.finish()
            raise
        maps = runner.maps() if log.decisions else {}
        said = dict.fromkeys([*warnings, *(warning for decision in log.decisions for warning in decision.warnings), *troubles])
        summary = runner.finish() | {"warnings": list(said)}
        write_outputs(out, log.decisions, geometry, maps, summary, maps_at, partial(_look_back, recorder, setup))
    console.print(_farewell(summary, log.decisions, out), highlight=False)
    if troubles:
        raise ScansteerError(" ".join(troubles))


def session_maker(roi: Path | None = None, maps: dict[str, str] | None = None, encoder: str | None = None) -> Callable[[Setup], Session]:
    """How the service makes a session: with the region and the maps of its own command line, where a peer sends none.

    Raises
    ------
    InputError
        A file is missing, or the encoder's is not one.
    """
    files = Files(roi, {role: Path(file) for role, file in (maps or {}).items()})
    files.check()
    encoded, reference = engine_maker(encoder), engine_maker("none")
    return lambda setup: Session(setup, files, encoded if setup.use_encoder else reference)


def _setup(source: Source, scan: Scan, options: Options) -> Setup:
    """What the session is made from: maps of the file, then those of the command line; the region if one was drawn."""
    first = source.first()
    if first is None:
        raise InputError(f"{source.path} holds no whole image.")
    stored: dict[Role, Frame] = {image.frame.role: image.frame for image in source.auxiliaries()}
    region, names = stored.pop("mask", None), ()
    if options.roi is not None:
        region, names = roi_files.labels_from_file(options.roi, first.frame.geometry)
    given = {role: map_files.from_file(role, file, first.frame.geometry) for role, file in options.maps.items()}
    return Setup(
        session_id=f"replay-{uuid.uuid4().hex[:8]}",
        scan=scan,
        region=region,
        region_names=tuple(names),
        auxiliaries={**stored, **given},
        use_encoder=options.encoder != "none",
    )


def _check_images(options: Options, source: Source) -> None:
    total = min(options.images or source.n_images, source.n_images)
    if beyond := [number for number in options.maps_at if number > total]:
        raise InputError(f"--maps-at asks for the maps after {beyond[0]} images; {total} are replayed.")


def _stream(
    source: Source, runner: Runner, scan: Scan, log: DecisionLog, recorder: Recorder, options: Options, console: Console
) -> Streamed:
    """Give the images to the runner one by one.

    Raises
    ------
    InputError
        None of them can be used.
    """
    troubles: list[str] = []
    maps_at: dict[int, dict[str, np.ndarray]] = {}
    geometry = None
    wanted = source.repetitions[: options.images]
    ends_s = np.cumsum([block.duration_s for block in scan.schedule])
    columns = (TextColumn("image"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    started = time.perf_counter()
    n_unusable = 0
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=len(wanted))
        try:
            for image in source.images():
                if image.frame.repetition > wanted[-1]:
                    break
                if options.realtime:
                    due_s = ends_s[min(image.frame.repetition, len(ends_s) - 1)]
                    time.sleep(max(0.0, started + due_s - time.perf_counter()))
                try:
                    decision = runner.decide(image)
                except InputError as error:
                    troubles.append(str(error))
                    n_unusable += isinstance(error, UnusableError)
                    continue
                geometry = geometry or image.frame.geometry
                log.append(decision)
                recorder.note(image.frame, decision, runner.maps())
                progress.update(task, advance=1, description=decision.action)
                if decision.n_images in options.maps_at:
                    maps_at[decision.n_images] = runner.maps()
                if options.stop and decision.action == "stop":
                    break
        except ScansteerError as error:
            if isinstance(error, InputError) and not log.decisions:
                raise
            troubles.append(str(error))
    if n_unusable and n_unusable == len(troubles) and not log.decisions:
        raise InputError(f"{source.path}: none of {n_unusable} images can be used; the first: {troubles[0]}")
    return Streamed(troubles, maps_at, geometry)


def _look_back(recorder: Recorder, setup: Setup) -> Comparison | TooFewImages:
    """The finished scan seen twice, with the maps that were used."""
    scan = setup.scan
    used = {AUXILIARIES[role]: (role, frame) for role, frame in setup.auxiliaries.items() if AUXILIARIES[role] in scan.auxiliaries}
    scaled = {name: frame.pixels * to_scan_unit(role, scan.larmor_hz_per_ppm) for name, (role, frame) in used.items()}
    return recorder.compare({name: clipped(values, scan.auxiliaries[name]) for name, values in scaled.items()})  # type: ignore[index]


def _farewell(summary: dict[str, Any], decisions: list[Decision], out: Path) -> str:
    at = summary.get("would_stop_at")
    said = f"a stop was first called at image {at}" if at is not None else "no stop was called"
    return f"{len(decisions)} decisions, {said}; report: {out / 'report.html'}"
