"""What is suggested next: never outside limits and quota, and predicted as the simulator would play it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scansteer.core.design import Answer, Question
from scansteer.core.errors import ScansteerError
from scansteer.protocols import limits
from scansteer.protocols.candidates import AT_LEAST, candidates
from scansteer.protocols.larg_phantom import PUBLISHED
from scansteer.protocols.limits import Played
from scansteer.protocols.prospect import Course, Prospect
from scansteer.protocols.scan import Auxiliary, Limits, Range, SaturationBlock, Train

SCAN = PUBLISHED.model_copy(
    update={"auxiliaries": {**PUBLISHED.auxiliaries, "t2_s": Auxiliary(lower=0.8, upper=0.8)}, "schedule": PUBLISHED.schedule[:4]}
)
ROWS = np.full((1, 2, 10), 0.1), np.full((1, 2, 10), 0.1) + 0.02 * np.arange(2)[None, :, None]
"""From coarse points to two draws."""


@pytest.fixture(scope="module")
def prospect():
    return Prospect(SCAN)


def with_limits(prospect: Prospect, changed: Limits, train: Train = SCAN.train) -> Prospect:
    """The same candidates under other limits, and played with another train."""
    other = copy.copy(prospect)
    other.scan = SCAN.model_copy(update={"limits": changed, "train": train})
    return other


def an_answer(gains) -> Answer:
    return Answer(np.asarray(gains), np.asarray(0.1), np.asarray(1.0), np.zeros(0))


def pulses(train: Train, played: Played) -> np.ndarray:
    """Start, end and squared amplitude of each RF pulse of a block [s, s, uT^2]."""
    block, n = played.block, train.n_pulses
    length = block.t_sat_s / (1 + (n - 1) / train.duty_cycle)  # n pulses, the last without its pause
    starts = played.start_s + block.t_rec_s + length / train.duty_cycle * np.arange(n)
    return np.stack([starts, starts + length, np.full(n, block.b1_ut**2)])


def breaches(allowed: Limits, history: Sequence[Played], block: SaturationBlock, train: Train = SCAN.train) -> list[str]:
    """What a block played next would break; B1rms over windows that end at many times, and where a pulse enters, leaves, begins or ends."""
    said = [
        name for name in ("offset_ppm", "t_sat_s", "t_rec_s")
        if not getattr(allowed, name).lower - 1e-6 <= getattr(block, name) <= getattr(allowed, name).upper + 1e-6
    ]  # fmt: skip
    if block.b1_ut > allowed.b1_max_ut + 1e-6:
        said.append("b1")
    if block.b1_ut == 0:
        return said
    now = Played(history[-1].end_s if history else 0.0, block)
    starts, ends, squares = np.concatenate([pulses(train, one) for one in (*history, now)], axis=1)
    own_starts, own_ends, _ = pulses(train, now)
    if np.sum(own_ends - own_starts) > allowed.duty_cycle_max * block.duration_s + 1e-6:
        said.append("duty cycle")
    for window, most in ((10.0, allowed.b1rms_10s_ut), (360.0, allowed.b1rms_6min_ut)):
        edges = np.concatenate([starts, ends])
        closing = np.concatenate([np.linspace(own_starts[0], now.end_s, 200), edges, edges + window])
        closing = closing[(closing >= own_starts[0]) & (closing <= now.end_s)][:, None]  # windows that hold some of its RF
        overlap = np.minimum(closing, ends) - np.maximum(closing - window, starts)
        energy = np.clip(overlap, 0.0, None) @ squares
        if np.max(energy) > window * most**2 * (1 + 1e-6):
            said.append(f"{window:g} s window")
    return said


def about(box: Range) -> st.SearchStrategy[Range]:
    """Within a range, most of it: each end is moved by less than a third, or not at all."""
    ends = st.tuples(*[st.one_of(st.just(0.0), st.floats(0.0, 0.33))] * 2)
    width = box.upper - box.lower
    return ends.map(lambda cut: Range(lower=box.lower + cut[0] * width, upper=box.upper - cut[1] * width))


some_trains = st.one_of(st.just(Train()), st.builds(Train, n_pulses=st.integers(2, 6), duty_cycle=st.floats(0.3, 1)))
some_blocks = st.builds(
    SaturationBlock,
    b1_ut=st.one_of(st.just(0.0), st.floats(0, 4)),
    offset_ppm=st.sampled_from([-4.0, 3.0]),
    t_sat_s=st.floats(0.5, 3),
    t_rec_s=st.floats(1, 4),
)
some_histories = st.tuples(st.lists(some_blocks, max_size=6), st.integers(1, 16)).map(lambda drawn: limits.back_to_back(drawn[0] * drawn[1]))
"""Up to some minutes."""


@st.composite
def some_limits(draw: st.DrawFn, train: Train, history: Sequence[Played]) -> Limits:
    """Within those of the candidates; after the history each window has room for some candidates [uT^2 s], or for all."""
    ceilings = []
    for window in (10.0, 360.0):
        starts, ends, squares = np.concatenate([np.zeros((3, 1)), *(pulses(train, one) for one in history)], axis=1)
        spent = np.clip(ends - np.maximum(starts, (history[-1].end_s if history else 0.0) - window), 0.0, None) @ squares
        room = draw(st.one_of(st.just(2000.0), st.floats(3.0, 60.0)))
        ceilings.append(float(np.sqrt((spent + room) / window)))
    box = SCAN.limits
    return Limits(
        b1_max_ut=draw(st.floats(3, 6)),
        offset_ppm=draw(about(box.offset_ppm)),
        t_sat_s=draw(about(box.t_sat_s)),
        t_rec_s=draw(about(box.t_rec_s)),
        duty_cycle_max=draw(st.floats(0.3, 0.8)),
        b1rms_10s_ut=ceilings[0],
        b1rms_6min_ut=ceilings[1],
    )


@settings(max_examples=50, deadline=None)
@given(st.data(), some_trains, some_histories, st.lists(st.booleans(), min_size=4, max_size=4), st.floats(0, 2), st.integers(0, 2**31))
def test_no_suggestion_is_ever_outside_the_limits(prospect, data, train, history, probes, power, seed):
    """Between a tenth and nine tenths of the candidates may be played; those with much RF are expected to tell more."""
    allowed = data.draw(some_limits(train, history))
    limited, rng, magnetisation = with_limits(prospect, allowed, train), np.random.default_rng(seed), prospect.begin().magnetisation
    with_rf = prospect.candidates.b1_ut > 0
    assume(0.1 < np.mean(limited.allowed(Course(magnetisation, tuple(history)))[with_rf]) < 0.9)
    promise = (prospect.candidates.b1_ut**2 * prospect.candidates.t_sat_s + 0.1) ** power
    for is_enough in probes:
        answer = an_answer(rng.exponential(size=len(promise)) * promise)
        block = limited.advise(Course(magnetisation, tuple(history)), answer, is_enough=is_enough).block
        if block is None:
            return
        assert breaches(allowed, history, block, train) == []
        history.append(Played(history[-1].end_s if history else 0.0, block))


def test_a_favourite_is_played_no_more_often_than_the_quota_says(prospect):
    gains = np.full(len(prospect.candidates), 1e-3)
    gains[np.flatnonzero(prospect.candidates.b1_ut > 2)[0]] = 1.0
    played, favourite = (), prospect.candidates.block(int(np.argmax(gains)))
    for _ in range(16):
        advice = prospect.advise(Course(prospect.begin().magnetisation, played), an_answer(gains))
        played = (*played, Played(played[-1].end_s if played else 0.0, advice.block))
    chosen = np.array([one.block == favourite for one in played])
    assert np.convolve(chosen, np.ones(prospect.quota.window, int)).max() == prospect.quota.most


def after(prospect: Prospect, block: SaturationBlock) -> Course:
    return Course(prospect.begin().magnetisation, (Played(0.0, block),))


def test_of_pulses_as_good_the_one_with_least_rf_is_advised(prospect):
    energy = prospect.candidates.b1_ut**2 * prospect.candidates.t_sat_s
    weak, strong = np.argsort(energy)[[5, -1]]
    course, costs = after(prospect, SCAN.schedule[0]), prospect.cost(prospect.candidates)
    for worth, expected in ((0.98, weak), (0.9, strong)):
        gains = np.zeros(len(costs))
        gains[[weak, strong]] = worth * costs[weak], costs[strong]
        assert prospect.advise(course, an_answer(gains)).block == prospect.candidates.block(int(expected))


def test_the_first_unsaturated_image_may_be_worth_less_than_others(prospect):
    unsaturated, other = np.flatnonzero(prospect.candidates.b1_ut == 0)[0], len(prospect.candidates) - 1
    costs, gains = prospect.cost(prospect.candidates), np.zeros(len(prospect.candidates))
    gains[[unsaturated, other]] = 0.6 * costs[unsaturated], costs[other]
    reference, pulse = (prospect.candidates.block(int(index)) for index in (unsaturated, other))
    assert prospect.advise(after(prospect, SCAN.schedule[0]), an_answer(gains)).block == reference
    assert prospect.advise(after(prospect, reference), an_answer(gains)).block == pulse


def test_a_pulse_is_worth_its_gain_over_a_root_of_its_duration(prospect):
    strong = prospect.candidates.b1_ut > 3
    durations = np.where(strong, prospect.candidates.duration_s, np.nan)
    short, long = int(np.nanargmin(durations)), int(np.nanargmax(durations))
    ratio = (durations[long] / durations[short]) ** 0.25
    for factor, expected in ((0.9, short), (1.1, long)):
        gains = np.zeros(len(prospect.candidates))
        gains[[short, long]] = 1.0, factor * ratio
        assert prospect.advise(after(prospect, SCAN.schedule[0]), an_answer(gains)).block == prospect.candidates.block(expected)


def test_nothing_is_advised_where_the_limits_leave_nothing(prospect):
    nothing = SCAN.limits.model_copy(update={"t_rec_s": Range(lower=20, upper=30)})
    advice = with_limits(prospect, nothing).advise(prospect.begin(), an_answer(np.ones(len(prospect.candidates))))
    assert advice.block is None
    assert advice.gain == 0


def test_where_targets_are_met_the_next_pulse_puts_the_model_to_the_test(prospect):
    """Within the limits: the first image once more, then the other side of water, and nothing like what was played; no gain is promised."""
    course = prospect.play(prospect.begin(), SCAN.schedule[0])
    answer = an_answer(np.ones(len(prospect.candidates)))
    again = prospect.advise(course, answer, is_enough=True).block
    assert again == SCAN.schedule[0]
    course, offsets = prospect.play(course, again), []
    for _ in range(4):
        advice = prospect.advise(course, answer, is_enough=True)
        assert breaches(SCAN.limits, list(course.played), advice.block) == []
        assert advice.block not in course.blocks
        assert advice.gain == 0
        offsets.append(advice.block.offset_ppm)
        course = prospect.play(course, advice.block)
    assert offsets[0] < 0
    assert len({round(abs(offset), 3) for offset in offsets}) >= 3


def test_where_limits_leave_no_probe_the_usual_pulse_is_advised(prospect):
    slow = SCAN.limits.model_copy(update={"t_sat_s": Range(lower=0.5, upper=1.0)})
    answer = an_answer(np.ones(len(prospect.candidates)))
    assert with_limits(prospect, slow).advise(prospect.begin(), answer, is_enough=True).gain == 1


def test_pulses_that_bend_along_an_unknown_field_are_set_aside(monkeypatch):
    """With B0 unknown, weak pulses at the solute's own offset, whose lines are narrow; where the likelihood describes none, nothing is advised."""
    unknown = SCAN.model_copy(update={"auxiliaries": {**SCAN.auxiliaries, "b0_ppm": Auxiliary(lower=-0.1, upper=0.1)}})
    prospect = Prospect(unknown)
    offered, kept = candidates(unknown), prospect.candidates
    assert prospect.n_offered == len(offered) >= AT_LEAST
    assert 0.3 * len(offered) < len(kept) < len(offered)
    solute, beside = (kept.b1_ut[(kept.offset_ppm == offset) & (kept.b1_ut > 0)] for offset in (3.0, -3.0))
    assert len(solute) < len(beside)
    assert np.min(beside) < 0.3 < np.max(solute) == np.max(offered.b1_ut)
    assert np.sum(kept.b1_ut == 0) == np.sum(offered.b1_ut == 0)
    predicted = prospect.read_candidates(course := after(prospect, SCAN.schedule[0]))
    index = int(np.flatnonzero(kept.b1_ut > 0)[-1])
    np.testing.assert_allclose(predicted[:, index], prospect.read(course, kept.block(index))[:, 0], atol=3e-6)

    monkeypatch.setattr("scansteer.core.predictive.curvature", lambda star, signals: np.full((1, signals.shape[1]), 1.0 * (signals.shape[1] > 4)))
    none = Prospect(SCAN)  # the four images of the schedule do not bend, all others do
    assert len(none.candidates) == 0
    answer = none.answer(none.begin(), a_question(none), ROWS, 0)
    assert none.advise(none.begin(), answer).block is None
    assert none.advise(none.begin(), answer, is_enough=True).block is None


def test_single_precision_is_refused():
    with jax.enable_x64(False), pytest.raises(ScansteerError, match="jax_enable_x64"):
        Prospect(SCAN)


def test_candidates_read_what_the_simulator_plays(prospect):
    course = prospect.play(prospect.play(prospect.begin(), SCAN.schedule[0]), SCAN.schedule[1])
    predicted = prospect.read_candidates(course)
    for index in (0, 40, 300, len(prospect.candidates) - 1):
        played = prospect.read(course, prospect.candidates.block(index))
        np.testing.assert_allclose(predicted[:, index], played[:, 0], atol=3e-6)  # float32


def test_the_end_of_the_schedule_is_worth_nothing_more(prospect):
    course = prospect.begin()
    for block in SCAN.schedule:
        course = prospect.play(course, block)
    question = a_question(prospect)
    answer = prospect.answer(course, question, ROWS, len(SCAN.schedule))
    assert float(answer.scheduled) == 0 == float(answer.remaining)
    assert np.all(np.asarray(answer.candidates) >= 0)
    before = prospect.answer(prospect.begin(), question, ROWS, 0)
    assert float(before.remaining) >= float(before.scheduled) > 0


def a_question(prospect: Prospect) -> Question:
    """About one voxel with two draws."""
    columns = prospect.columns({})
    n_columns = columns.shape[1]
    return Question(
        weights=columns[None],
        gram=np.broadcast_to(np.eye(n_columns), (1, 2, len(columns), n_columns, n_columns)),
        projection=np.ones((1, 2, len(columns), n_columns)),
        energy=np.ones(1),
        n_images=np.asarray(4.0),
        shift=np.zeros((1, n_columns - 1)),
        draw_weights=np.full((1, 2), 0.5),
        mean_weights=np.full((1, 2), 0.5),
        contrast=np.array([[[-0.5, 0.5]]]),
        importance=np.ones(1),
        variance=np.asarray(1e-4),
        dof=np.asarray(10.0),
        discrepancy=np.asarray(0.0),
    )
