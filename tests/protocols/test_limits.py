"""Limits against a brute-force time grid, over random limits, trains and histories."""

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from any_limits import any_limits
from scansteer.protocols import limits
from scansteer.protocols.builtin import BUILTIN
from scansteer.protocols.candidates import candidates
from scansteer.protocols.limits import Blocks, Played
from scansteer.protocols.scan import Limits, Range, SaturationBlock, Train

STEP_S = 0.02


any_train = st.one_of(
    st.just(Train()),
    st.builds(Train, n_pulses=st.integers(2, 6), duty_cycle=st.floats(0.2, 1)),
)
any_block = st.builds(
    SaturationBlock,
    b1_ut=st.one_of(st.just(0.0), st.floats(0.1, 10)),
    offset_ppm=st.floats(-10, 10),
    t_sat_s=st.floats(0.1, 12),
    t_rec_s=st.floats(0.0, 8),
)


@st.composite
def any_history(draw):
    described = draw(st.lists(any_block, max_size=4)) * draw(st.integers(1, 8))
    history, now = [], 0.0
    for block in described:
        history.append(Played(now, block))
        now = history[-1].end_s + draw(st.sampled_from([0.0, 0.0, 0.3, 20.0]))
    return history


@st.composite
def any_candidates(draw, allowed: Limits):
    """Around the corners of the box as well as inside and outside it."""
    span, corner = allowed.t_sat_s, {"t_rec_s": allowed.t_rec_s.upper, "offset_ppm": allowed.offset_ppm.upper}
    return limits.blocks(
        [
            draw(any_block).model_copy(update={"t_sat_s": draw(st.sampled_from([span.lower, span.upper])), **corner})
            for _ in range(6)
        ]
    )


def power(train: Train, played: Played, time_s: np.ndarray) -> np.ndarray:
    """B1^2 at each time, by the definition of a train."""
    block = played.block
    since = time_s - played.start_s - block.t_rec_s
    length = block.t_sat_s / (train.n_pulses + (train.n_pulses - 1) * (1 / train.duty_cycle - 1))
    period = length / train.duty_cycle
    number = np.floor(since / period)
    on = (since >= 0) & (since < block.t_sat_s) & (since - number * period < length) & (number < train.n_pulses)
    return on * block.b1_ut**2


def worst_b1rms(train: Train, history: list[Played], candidate: Played, window_s: float) -> float:
    """Largest rms over windows that end within the candidate's block and contain some of its RF."""
    time_s = np.arange(candidate.start_s - window_s, candidate.end_s, STEP_S) + STEP_S / 2
    total = np.concatenate([[0.0], np.cumsum(sum(power(train, one, time_s) for one in [*history, candidate]))]) * STEP_S
    n = round(window_s / STEP_S)
    since_rf = int(candidate.block.t_rec_s / STEP_S)
    return float(np.sqrt(max(np.max((total[n:] - total[:-n])[since_rf:], initial=0.0), 0.0) / window_s))


def slack(train: Train, history: list[Played], b1_ut: float, window_s: float) -> float:
    """What the grid may misplace: a step at either end of every pulse."""
    n_pulses = train.n_pulses * (len(history) + 1)
    strongest = max([b1_ut, *(one.block.b1_ut for one in history)])
    return 2 * n_pulses * STEP_S * strongest**2 / window_s


def excesses(bounds: Limits, train: Train, history: list[Played], candidate: Played) -> tuple[np.ndarray, np.ndarray]:
    """Worst B1^2 of each window above its limit, and what the grid may misplace."""
    ceilings = np.array([bounds.b1rms_10s_ut, bounds.b1rms_6min_ut])
    worst = np.array([worst_b1rms(train, history, candidate, window) for window in limits.WINDOWS_S])
    return worst**2 - ceilings**2, np.array([slack(train, history, candidate.block.b1_ut, window) for window in limits.WINDOWS_S])


@settings(max_examples=80, deadline=None)
@given(data=st.data(), bounds=any_limits(), train=any_train, history=any_history())
def test_nothing_outside_the_limits_is_allowed_and_nothing_inside_refused(data, bounds, train, history):
    made = data.draw(any_candidates(bounds))
    start = history[-1].end_s if history else 0.0
    allowed = limits.allowed(bounds, train, history, made)
    for number, may in enumerate(allowed):
        block = made.block(number)
        candidate = Played(start, block)
        rf_time = block.t_sat_s * limits.rf_fraction(train)
        duty_kept = block.b1_ut == 0 or rf_time <= bounds.duty_cycle_max * block.duration_s * (1 + 1e-9)
        inside = block.b1_ut <= bounds.b1_max_ut and duty_kept
        excess, blur = excesses(bounds, train, history, candidate)
        if may:
            assert inside
            assert block.b1_ut == 0 or np.all(excess <= blur)
        elif inside:
            assert np.any(excess >= -blur)


@settings(max_examples=40, deadline=None)
@given(bounds=any_limits(), train=any_train, history=any_history(), scan=st.sampled_from(sorted(BUILTIN)))
@example(bounds=BUILTIN["mt-mouse-7T-30"].limits, train=Train(), history=[], scan="mt-mouse-7T-30")
def test_every_allowed_candidate_of_any_scan_lies_inside_every_limit(bounds, train, history, scan):
    scan = BUILTIN[scan].model_copy(update={"limits": bounds, "train": train})
    made = candidates(scan)
    assume(len(made) > 0)
    chosen = made.take(limits.allowed(bounds, train, history, made))
    for name in ("offset_ppm", "t_sat_s", "t_rec_s"):
        values, box = getattr(chosen, name), getattr(bounds, name)
        assert np.all((values >= box.lower - 1e-8) & (values <= box.upper + 1e-8))
    assert np.all(chosen.b1_ut <= bounds.b1_max_ut + 1e-8)
    strongest = int(np.argmax(chosen.b1_ut)) if len(chosen) else None
    if strongest is not None and chosen.b1_ut[strongest] > 0:
        start = history[-1].end_s if history else 0.0
        excess, blur = excesses(bounds, train, history, Played(start, chosen.block(strongest)))
        assert np.all(excess <= blur)


def ten_seconds(b1rms: float) -> Limits:
    box = Range(lower=0.0, upper=20.0)
    return Limits(b1_max_ut=20, offset_ppm=box, t_sat_s=box, t_rec_s=box, b1rms_10s_ut=b1rms, b1rms_6min_ut=20)


def one(b1_ut: float, t_sat_s: float = 2.5, t_rec_s: float = 1.0) -> Blocks:
    return limits.blocks([SaturationBlock(b1_ut=b1_ut, offset_ppm=3.0, t_sat_s=t_sat_s, t_rec_s=t_rec_s)])


def test_four_microtesla_for_two_and_a_half_of_ten_seconds_is_two_microtesla_rms():
    assert limits.allowed(ten_seconds(2.0), Train(), [], one(4.0))[0]
    assert not limits.allowed(ten_seconds(1.999), Train(), [], one(4.0))[0]


def test_what_was_played_counts_until_it_has_left_the_window():
    history = limits.back_to_back([one(4.0).block(0)])
    assert not limits.allowed(ten_seconds(2.0), Train(), history, one(4.0))[0]
    assert limits.allowed(ten_seconds(2.0), Train(), history, one(4.0), start_s=10.0)[0]


def test_a_window_that_ends_inside_the_block_is_looked_at():
    """Ten seconds that begin with a strong pulse end in the middle of the block, and are worse than those that end with it."""
    history = [Played(0.0, one(8.0, 1.0, 0.0).block(0))]
    ceiling = np.sqrt((8.0**2 * 1 + 4.0**2 * 4) / 10)
    timing = np.array([[6.0, 0.0]])
    assert limits.largest_amplitude(ten_seconds(ceiling), Train(), history, timing, 6.0)[0] == pytest.approx(4.0)


def test_a_train_counts_with_its_own_duty_cycle():
    train = Train(n_pulses=2, duty_cycle=0.5)
    assert limits.rf_fraction(train) == pytest.approx(2 / 3)
    assert limits.allowed(ten_seconds(4 * np.sqrt(2.5 * 2 / 3 / 10)), train, [], one(4.0))[0]


def test_an_image_without_saturation_may_always_follow():
    history = limits.back_to_back([one(20.0, 10.0, 0.0).block(0)])
    assert limits.allowed(ten_seconds(0.1), Train(), history, one(0.0))[0]


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_built_in_schedules_keep_their_own_limits(name):
    assert limits.check_schedule(BUILTIN[name]) == []


def test_a_schedule_that_exceeds_its_limits_is_named_block_by_block():
    scan = BUILTIN["larg-phantom-9.4T"]
    tight = scan.limits.model_copy(update={"b1rms_10s_ut": 4.5, "offset_ppm": Range(lower=-5, upper=5)})
    said = limits.check_schedule(scan.model_copy(update={"limits": tight}))
    assert said
    assert not said[0].startswith("repetition 0 ")
    assert "limits.b1rms_10s_ut = 4.5 uT leaves " in said[0]
    elsewhere = scan.limits.model_copy(update={"offset_ppm": Range(lower=4, upper=5)})
    outside = limits.check_schedule(scan.model_copy(update={"limits": elsewhere}))
    assert len(outside) == 30
    assert "offset_ppm = 3 ppm, outside limits.offset_ppm = 4 .. 5 ppm" in outside[0]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"t_sat_s": Range(lower=0.1, upper=2.0)}, "(4 uT at 3 ppm for 2.5 s after 1 s) has t_sat_s = 2.5 s, outside limits.t_sat_s = 0.1 .. 2 s"),
        ({"t_rec_s": Range(lower=2.0, upper=3.0)}, "has t_rec_s = 1 s, outside limits.t_rec_s = 2 .. 3 s"),
        ({"duty_cycle_max": 0.7}, "has RF during 0.714 of its time, above limits.duty_cycle_max = 0.7"),
        ({"b1_max_ut": 3.0}, "has 4 uT, above limits.b1_max_ut = 3 uT"),
        ({"b1rms_6min_ut": 0.3}, "has 4 uT, where limits.b1rms_6min_ut = 0.3 uT leaves 3.6 uT"),  # sqrt(360 x 0.09 / 2.5)
    ],
)
def test_the_limit_that_a_schedule_leaves_is_named_with_its_value(changed, expected):
    block = one(4.0).block(0)
    scan = BUILTIN["larg-phantom-9.4T"].model_copy(update={"schedule": (block,), "limits": ten_seconds(19.0).model_copy(update=changed)})
    (said,) = limits.check_schedule(scan)
    assert expected in said
