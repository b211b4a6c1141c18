"""Threads: order within a session, no waiting between sessions; slices become volumes."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest

from scansteer.core.errors import InputError
from scansteer.realtime.images import Frame, Geometry
from scansteer.realtime.worker import Actor, Failed, Setup, Warned, Worker, run_job, stack_slices


@pytest.fixture
def delivered():
    return []


@pytest.fixture
def worker(delivered):
    worker = Worker(lambda session_id, events: delivered.append((session_id, events)))
    yield worker
    worker.stop(5)


def quietly(*actions):
    """A job that does something and says nothing."""

    def job():
        for action in actions:
            action()
        return []

    return job


def test_jobs_of_a_session_run_in_order_even_across_lanes(worker, delivered):
    done = threading.Event()
    for number in range(20):
        worker.submit("s", lambda number=number: [Warned(str(number))], slow=number % 3 == 0)
    worker.submit("s", quietly(done.set))
    assert done.wait(5)
    assert [events[0].reason for _, events in delivered if events] == [str(number) for number in range(20)]


def test_a_session_that_compiles_keeps_no_other_waiting(worker, delivered):
    compiling, go_on, done = threading.Event(), threading.Event(), threading.Event()
    worker.submit("slow", quietly(compiling.set, lambda: go_on.wait(10)), slow=True)
    assert compiling.wait(5)
    worker.submit("fast", quietly(done.set))
    assert done.wait(5)
    go_on.set()


def test_what_a_job_raises_is_its_sessions_failure(caplog):
    def refuse():
        raise InputError("A sentence.")

    def crash():
        raise KeyError("x")

    assert run_job(refuse) == [Failed("A sentence.")]
    assert run_job(crash) == [Failed("Internal error: KeyError.")]


def test_stopping_starts_no_further_job(delivered):
    worker = Worker(lambda session_id, events: delivered.append(events))
    running, go_on = threading.Event(), threading.Event()
    worker.submit("s", quietly(running.set, lambda: go_on.wait(10)))
    worker.submit("s", lambda: [Warned("never")])
    assert running.wait(5)
    threading.Timer(0.05, go_on.set).start()
    worker.stop(5)
    assert delivered == [[]]


def slice_frame(index: int, z_mm: float, value: float, shape: tuple[int, int, int] = (1, 3, 2)) -> Frame:
    matrix = (shape[2], shape[1], shape[0])
    geometry = Geometry(matrix, (20.0, 30.0, 4.0), (0.0, 0.0, z_mm), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    return Frame(np.full(shape, value), geometry, slice=index)


def test_slices_are_stacked_with_their_spacing_and_centre():
    volume = stack_slices([slice_frame(0, -5.0, 1.0), slice_frame(1, 0.0, 2.0), slice_frame(2, 5.0, 3.0)])
    assert volume.pixels.shape == (3, 3, 2)
    np.testing.assert_array_equal(volume.pixels[:, 0, 0], [1, 2, 3])
    assert volume.geometry.matrix == (2, 3, 3)
    assert volume.geometry.field_of_view_mm == (20.0, 30.0, 15.0)
    assert volume.geometry.position_mm == (0.0, 0.0, 0.0)


def test_slices_of_different_matrices_are_refused():
    with pytest.raises(InputError, match="another matrix"):
        stack_slices([slice_frame(0, 0.0, 1.0), slice_frame(1, 5.0, 1.0, shape=(1, 4, 2))])


def test_a_closed_session_leaves_nothing_behind(scan, fake_session):
    sessions = []

    class Circular(fake_session):
        def __init__(self, setup):
            super().__init__(setup)
            self.itself = self
            sessions.append(weakref.ref(self))

    actor = Actor(Setup("s", scan), lambda entry: [], Circular, 100)
    actor.build({})
    gc.disable()
    try:
        actor.close()
    finally:
        gc.enable()
    assert sessions[0]() is None
