"""Where sessions compute: threads beside the event loop, and what they are asked to do.

`Session` is what the service expects of the posterior's side; it knows no sockets. `Actor` feeds one session from its journal.
`Worker` runs the jobs of each session one after the other, in two lanes: a session that compiles keeps no other one waiting.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from scansteer.core.errors import InputError
from scansteer.protocols.scan import Scan
from scansteer.realtime.freed_memory import return_freed_memory
from scansteer.realtime.images import Frame, Geometry, decode_frame
from scansteer.realtime.journal import Entry, JournalError
from scansteer.realtime.messages import Decision, Pulse
from scansteer.realtime.order import Step

log = logging.getLogger("scansteer.worker")


class Session(Protocol):
    """The posterior's side of a session: a deterministic function of the frames absorbed. No sockets, no threads."""

    @property
    def ready_s(self) -> float:
        """How long compiling and warming up took."""
        ...

    def absorb(self, frame: Frame, *, received_at: float, pulse: Pulse | None = None, deadline: float | None = None) -> Decision:
        """Update with one repetition's volume and decide; blocks 50-250 ms.

        Parameters
        ----------
        frame
            The volume; frames come in the order of `repetition`, each at most once.
        received_at
            `time.perf_counter()` when the image (its last slice) was received.
        pulse
            What was really played; none: the schedule's block of that repetition.
        deadline
            `time.perf_counter()` of the next repetition's first pulse, for `margin_ms`; none: not known.

        Raises
        ------
        InputError
            The image cannot be used. The session is as before; the caller goes on with `absorb_missing`.
        """
        ...

    def absorb_missing(self, repetition: int, pulse: Pulse | None = None) -> None:
        """No usable image of this repetition exists, but its pulse was played: carry the magnetisation on."""
        ...

    def confirm_stop(self) -> Decision:
        """The operator agrees to the stop that the latest decision proposed: the same decision, as a stop.

        Raises
        ------
        InputError
            No stop is proposed.
        """
        ...

    def maps(self) -> dict[str, np.ndarray]:
        """Name -> (z, y, x) float32, NaN outside the region."""
        ...

    def summary(self) -> Any:
        """A pydantic model; what `summary.json` holds."""
        ...

    def close(self) -> None:
        """Let go of threads and memory; nothing is asked afterwards."""
        ...


@dataclass(frozen=True)
class Setup:
    """What a session is made from."""

    session_id: str
    scan: Scan
    region: Frame | None = None
    """Label image (0: outside), in the geometry of the images."""
    region_names: tuple[str, ...] = ()
    auxiliaries: dict[str, Frame] = field(default_factory=dict)
    """Maps by role (`t1`, `t2`, `b0`, ..), in the units in which they travel: ms, Hz, relative."""
    use_encoder: bool = True


MakeSession = Callable[[Setup], Session]
"""Compiles and warms up: seconds. Raises InputError if the setup cannot be used."""


# What a job has to say when it is done.


@dataclass(frozen=True)
class Ready:
    ready_s: float
    build: int = 0
    """Number of the build that is done."""


@dataclass(frozen=True)
class Decided:
    decision: Decision


@dataclass(frozen=True)
class ImageUnusable:
    repetition: int
    reason: str


@dataclass(frozen=True)
class Warned:
    reason: str


@dataclass(frozen=True)
class MapsMade:
    requester: object
    n_images: int
    arrays: dict[str, np.ndarray]


@dataclass(frozen=True)
class NotMade:
    requester: object
    reason: str


@dataclass(frozen=True)
class Summarised:
    summary: dict[str, Any]


@dataclass(frozen=True)
class Failed:
    """The session gives no more decisions: the approved schedule goes on."""

    reason: str


Event = Ready | Decided | ImageUnusable | Warned | MapsMade | NotMade | Summarised | Failed
Job = Callable[[], list[Event]]
SideImages = dict[str, tuple[Entry, ...]]
"""Role -> the journal's records of its slices, in their order."""


class Actor:
    """One session's computing side: every method is a job that blocks and returns what happened.

    What it says is a function of the jobs in their order, so the journal can be replayed through a new one.
    """

    def __init__(self, setup: Setup, read: Callable[[Entry], list[bytes]], make: MakeSession, max_voxels: int) -> None:
        self._setup = setup
        self._read = read
        self._make = make
        self._max_voxels = max_voxels
        self._session: Session | None = None
        self._history: list[Step] = []
        self._side_images: SideImages = {}
        self._excluded: set[int] = set()
        self._n_decisions = 0
        self._has_used_images = False
        """The present session has: another region must not put an end to that."""

    def run(self, job: Job) -> list[Event]:
        """A job of this actor. An error that nobody foresaw ends the posterior: half an image may be in it, and nothing builds on that."""
        try:
            return job()
        except InputError:
            raise
        except Exception:
            self._session = None
            raise

    def build(self, side_images: SideImages, number: int = 0) -> list[Event]:
        """Compile the session, with the auxiliary and mask images that came before image 0."""
        started = time.perf_counter()
        self._side_images = side_images
        if self._session is not None:
            self._session.close()
            self._session = None
        self._session = self._make(self._complete_setup())
        return [Ready(time.perf_counter() - started, number)]

    def absorb(self, step: Step, received_at: float, deadline: float | None) -> list[Event]:
        """Give one repetition to the posterior."""
        self._history.append(step)
        if self._session is None:
            return []
        events, decision = self._give(self._session, step, received_at, deadline)
        self._has_used_images |= decision is not None
        if step.report_is_lost:
            assumed = f"The report of what was played in repetition {step.repetition} is lost: the scheduled pulse is assumed."
            events = [*events, Warned(assumed)]
            decision = decision and decision.model_copy(update={"warnings": (*decision.warnings, assumed)})
        return [*events, *self._published(decision)]

    def exclude(self, repetition: int) -> list[Event]:
        """Take an image out of the posterior: everything else is absorbed again by a new session."""
        self._excluded.add(repetition)
        return self._rebuild(f"The image of repetition {repetition} was excluded by the operator.")

    def confirm_stop(self, decision: int | None) -> list[Event]:
        """The operator agrees to the stop that a decision proposes (none: the latest one), unless another one was made meanwhile.

        It holds for the posterior that it was given for: what absorbs everything again asks anew.
        """
        if self._session is None:
            return [Warned("A stop was confirmed before there was a posterior; nothing follows from it.")]
        if decision is not None and decision != self._n_decisions - 1:
            return [Warned(f"Decision {decision} was confirmed when there was a later one already; nothing follows from it.")]
        try:
            return self._published(self._session.confirm_stop())
        except InputError as error:
            return [Warned(str(error))]

    def change_region(self, side_images: SideImages) -> list[Event]:
        """Absorb everything again with another mask; one on which no image can be used changes nothing."""
        session, before, self._side_images = self._session, self._side_images, side_images
        events = self._rebuild("The region was changed by the operator.", must_use_images=self._has_used_images)
        if self._session is session:
            self._side_images = before
        return events

    def correct_pulse(self, repetition: int, pulse: Pulse) -> list[Event]:
        """A pulse turned out to be another than was assumed: absorb everything again."""
        self._history = [replace(step, pulse=pulse) if step.repetition == repetition else step for step in self._history]
        return self._rebuild(f"Repetition {repetition} was played differently than had been assumed.")

    def maps(self, requester: object) -> list[Event]:
        if self._session is None:
            return [NotMade(requester, "The session has no posterior.")]
        try:
            return [MapsMade(requester, len(self._history), self._session.maps())]
        except InputError as error:
            return [NotMade(requester, str(error))]

    def close(self) -> list[Event]:
        """The last job: the summary; the session is let go."""
        if self._session is None:
            return [Summarised({})]
        events = run_job(self._summarise)
        self._session.close()
        self._session = None
        return_freed_memory()
        return events if isinstance(events[-1], Summarised) else [*events, Summarised({})]  # it ends all the same

    def _summarise(self) -> list[Event]:
        assert self._session is not None
        return [Summarised(self._session.summary().model_dump(mode="json"))]

    def _rebuild(self, reason: str, *, must_use_images: bool = False) -> list[Event]:
        if self._session is None:
            return []
        try:
            session = self._make(self._complete_setup())
        except InputError as error:
            return [Warned(f"{reason} It had no effect: {error}")]
        last, said = self._again(session)
        if last is None and must_use_images:
            session.close()
            return [Warned(" ".join([reason, "It had no effect: no image can be used so.", *said[:1]]))]
        self._session.close()
        self._session, self._has_used_images = session, last is not None
        return_freed_memory()
        if last is None:
            return [Warned(reason)]
        return [Warned(reason), *self._published(last.model_copy(update={"warnings": (*last.warnings, reason)}))]

    def _again(self, session: Session) -> tuple[Decision | None, list[str]]:
        """Give a new session everything so far: its last decision, and why images could not be used."""
        last: Decision | None = None
        said: list[str] = []
        for step in self._history:
            events, decision = self._give(session, step, time.perf_counter(), None)
            said += [event.reason for event in events if isinstance(event, ImageUnusable)]
            last = decision or last
        return last, said

    def _give(
        self, session: Session, step: Step, received_at: float, deadline: float | None
    ) -> tuple[list[Event], Decision | None]:
        if not step.entries or step.repetition in self._excluded:
            return self._give_missing(session, step), None
        try:
            frame = replace(self._volume(step.entries, "image"), repetition=step.repetition)
            return [], session.absorb(frame, received_at=received_at, pulse=step.pulse, deadline=deadline)
        except (InputError, JournalError) as error:
            return [ImageUnusable(step.repetition, str(error)), *self._give_missing(session, step)], None

    def _give_missing(self, session: Session, step: Step) -> list[Event]:
        try:
            session.absorb_missing(step.repetition, step.pulse)
        except InputError as error:
            return [Warned(str(error))]
        return []

    def _published(self, decision: Decision | None) -> list[Event]:
        if decision is None:
            return []
        numbered = decision.model_copy(update={"session_id": self._setup.session_id, "sequence_number": self._n_decisions})
        self._n_decisions += 1
        return [Decided(numbered)]

    def _volume(self, entries: tuple[Entry, ...], role: str) -> Frame:
        frames = [decode_frame(self._read(entry)[1], max_voxels=self._max_voxels) for entry in entries]
        for frame in frames:
            if frame.role != role:
                raise InputError(
                    f"The image of repetition {frame.repetition} calls itself {frame.role!r} in its Meta, not {role!r}."
                )
        return stack_slices(frames)

    def _complete_setup(self) -> Setup:
        volumes = {role: self._volume(entries, role) for role, entries in self._side_images.items()}
        region = volumes.pop("mask", None)
        return replace(self._setup, region=region, auxiliaries=volumes)


class Worker:
    """Runs jobs in threads: those of one session in order and one at a time, slow ones in a lane of their own."""

    def __init__(self, deliver: Callable[[str, list[Event]], None], n_threads: int = 1) -> None:
        """`deliver` is called from the threads, with the session and what its job said."""
        self._deliver = deliver
        self._lock = threading.Lock()
        self._waiting: dict[str, deque[tuple[Job, bool]]] = {}
        self._fast: queue.SimpleQueue[tuple[str, Job] | None] = queue.SimpleQueue()
        self._slow: queue.SimpleQueue[tuple[str, Job] | None] = queue.SimpleQueue()
        lanes = [self._fast] * n_threads + [self._slow]
        self._threads = [threading.Thread(target=self._run, args=(lane,), daemon=True, name="scansteer-worker") for lane in lanes]
        for thread in self._threads:
            thread.start()

    def submit(self, session_id: str, job: Job, *, slow: bool = False) -> None:
        """Run a job after all earlier jobs of the same session."""
        with self._lock:
            jobs = self._waiting.setdefault(session_id, deque())
            jobs.append((job, slow))
            if len(jobs) == 1:
                (self._slow if slow else self._fast).put((session_id, job))

    def stop(self, timeout_s: float) -> bool:
        """Finish the jobs that run, start no others; false if one still runs after the time-out."""
        with self._lock:
            for jobs in self._waiting.values():
                while len(jobs) > 1:
                    jobs.pop()
        for _ in self._threads[:-1]:
            self._fast.put(None)
        self._slow.put(None)
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self, lane: queue.SimpleQueue[tuple[str, Job] | None]) -> None:
        while (item := lane.get()) is not None:
            session_id, job = item
            self._deliver(session_id, run_job(job))
            self._next(session_id)

    def _next(self, session_id: str) -> None:
        with self._lock:
            jobs = self._waiting[session_id]
            jobs.popleft()
            if not jobs:
                del self._waiting[session_id]
                return
            job, slow = jobs[0]
            (self._slow if slow else self._fast).put((session_id, job))


def run_job(job: Job) -> list[Event]:
    """Run a job; whatever it raises becomes that session's failure and nobody else's."""
    try:
        return job()
    except InputError as error:
        return [Failed(str(error))]
    except Exception as error:  # whatever it is, it must not reach the other sessions
        log.exception("a session failed")
        return [Failed(f"Internal error: {type(error).__name__}.")]


def warm_up(make: MakeSession, scan: Scan) -> list[Event]:
    """A job without a session: compile for a scan, so that the sessions to come find it done."""
    try:
        make(Setup("warm-up", scan)).close()
    except InputError as error:
        log.error("scan %s cannot be compiled beforehand: %s", scan.name, error)
    return []


def stack_slices(frames: list[Frame]) -> Frame:
    """One volume of the slices of a repetition, in their order along z.

    Raises
    ------
    InputError
        The slices differ in matrix or orientation.
    """
    if len(frames) == 1:
        return frames[0]
    first, last = frames[0].geometry, frames[-1].geometry
    for frame in frames:
        if frame.geometry.matrix != first.matrix:
            raise InputError(
                f"Slice {frame.slice} of repetition {frame.repetition} has another matrix than slice {frames[0].slice}."
            )
    x, y, z = first.matrix
    distance = np.linalg.norm(np.subtract(last.position_mm, first.position_mm))
    spacing = float(distance) / (len(frames) - 1) if distance > 0 else first.voxel_mm[2]
    centre = 0.5 * np.add(first.position_mm, last.position_mm)
    geometry = Geometry(
        matrix=(x, y, z * len(frames)),
        field_of_view_mm=(first.field_of_view_mm[0], first.field_of_view_mm[1], spacing * len(frames)),
        position_mm=(float(centre[0]), float(centre[1]), float(centre[2])),
        read_dir=first.read_dir,
        phase_dir=first.phase_dir,
        slice_dir=first.slice_dir,
    )
    return replace(frames[0], pixels=np.concatenate([frame.pixels for frame in frames]), geometry=geometry)
