"""The virtual scanner and the virtual controller, in memory: pace, obedience, and what is sent."""

from types import SimpleNamespace

import numpy as np

from scansteer.protocols.builtin import BUILTIN
from scansteer.protocols.scan import SaturationBlock
from scansteer.realtime.controller import Advice
from scansteer.realtime.images import Geometry, decode_frame
from scansteer.realtime.messages import Pulse
from scansteer.simulators.controller import SequenceController
from scansteer.simulators.scanner import run_scan

SCAN = BUILTIN["larg-phantom-9.4T"]
GEOMETRY = Geometry((4, 3, 1))
CONTINUE = Advice("continue", None, "go on")


class FakeAdviser:
    """Gives the advice it was made with, then *continue*."""

    def __init__(self, *advice: Advice) -> None:
        self.advice = list(advice)
        self.asked: list[tuple[int, float]] = []
        self.reported: list[tuple[int, Pulse]] = []

    def advise(self, repetition: int, deadline_s: float) -> Advice:
        self.asked.append((repetition, deadline_s))
        return self.advice.pop(0) if self.advice else CONTINUE

    def played(self, repetition: int, pulse: Pulse, *, next_pulse_in_ms: float | None = None) -> None:
        self.reported.append((repetition, pulse))


class FakeMagnet:
    def __init__(self) -> None:
        self.phantom = SimpleNamespace(geometry=GEOMETRY)
        self.played: list[SaturationBlock] = []

    def play(self, block: SaturationBlock) -> np.ndarray:
        self.played.append(block)
        return np.full((1, 3, 4), 100.4 + len(self.played))


def scan_with(adviser: FakeAdviser, **options) -> tuple[int, FakeMagnet, list[bytes], list[float]]:
    magnet, sent, slept = FakeMagnet(), [], []
    controller = SequenceController(SCAN, adviser)
    options |= {"sleep": slept.append, "clock": lambda: 0.0}
    count = run_scan(SCAN, magnet, controller, sent.append, **options)  # type: ignore[arg-type]
    return count, magnet, sent, slept


def test_the_schedule_is_played_to_its_end_when_nobody_objects() -> None:
    count, magnet, sent, _ = scan_with(FakeAdviser())
    assert count == len(sent) == 30
    assert magnet.played == list(SCAN.schedule)
    frames = [decode_frame(body) for body in sent]
    assert [frame.repetition for frame in frames] == list(range(30))
    assert frames[4].role == "image"
    np.testing.assert_array_equal(frames[4].pixels, np.full((1, 3, 4), 105.0))


def test_a_stop_is_obeyed() -> None:
    controller = SequenceController(SCAN, FakeAdviser(CONTINUE, CONTINUE, Advice("stop", None, "enough")))
    sent: list[bytes] = []
    assert run_scan(SCAN, FakeMagnet(), controller, sent.append, sleep=lambda _: None) == 2  # type: ignore[arg-type]
    assert len(sent) == 2
    assert controller.stopped_by is not None and controller.stopped_by.reason == "enough"


def test_another_pulse_is_played_and_reported() -> None:
    pulse = Pulse(b1_ut=1.5, offset_ppm=3.0, t_sat_s=2.0, t_rec_s=1.5)
    adviser = FakeAdviser(CONTINUE, Advice("continue", pulse, "better"), Advice("stop", None, "enough"))
    _, magnet, _, _ = scan_with(adviser)
    assert magnet.played == [SCAN.schedule[0], SaturationBlock(**pulse.model_dump())]
    assert [repetition for repetition, _ in adviser.reported] == [0, 1]
    assert adviser.reported[1][1] == pulse


def test_a_pause_is_waited_out() -> None:
    pause = Advice("pause", None, "operator")
    adviser = FakeAdviser(pause, pause, CONTINUE, Advice("abort", None, "no"))
    count, *_ = scan_with(adviser)
    assert count == 1
    assert [repetition for repetition, _ in adviser.asked] == [0, 0, 0, 1]


def test_pace_is_the_protocols_and_the_time_to_decide_is_not_shortened() -> None:
    adviser = FakeAdviser()
    *_, slept = scan_with(adviser, speed=2.0)
    assert set(slept) == {2.0}  # 4 s a repetition
    assert {deadline for _, deadline in adviser.asked} == {1.0}
