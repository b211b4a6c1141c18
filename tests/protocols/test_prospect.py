"""What is suggested next: never outside limits and quota, and predicted as the simulator would play it."""

from __future__ import annotations

import copy

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from any_limits import any_limits
from scansteer.core.design import Answer, Question
from scansteer.core.errors import ScansteerError
from scansteer.protocols import limits
from scansteer.protocols.candidates import AT_LEAST, candidates
from scansteer.protocols.larg_phantom import PUBLISHED
from scansteer.protocols.limits import Played
from scansteer.protocols.prospect import Course, Prospect
from scansteer.protocols.scan import Auxiliary, Limits, Range, SaturationBlock

SCAN = PUBLISHED.model_copy(
    update={"auxiliaries": {**PUBLISHED.auxiliaries, "t2_s": Auxiliary(lower=0.8, upper=0.8)}, "schedule": PUBLISHED.schedule[:4]}
)
STEP_S = 0.01
ROWS = np.full((1, 2, 10), 0.1), np.full((1, 2, 10), 0.1) + 0.02 * np.arange(2)[None, :, None]
"""From coarse points to two draws."""


@pytest.fixture(scope="module")
def prospect():
    return Prospect(SCAN)


def with_limits(prospect: Prospect, changed: Limits) -> Prospect:
    """The same candidates under other limits."""
    other = copy.copy(prospect)
    other.scan = SCAN.model_copy(update={"limits": changed})
    return other


def an_answer(gains) -> Answer:
    return Answer(np.asarray(gains), np.asarray(0.1), np.asarray(1.0), np.zeros(0))


def breaches(allowed: Limits, history: list[Played], block: SaturationBlock) -> list[str]:
    """What a block played next would break, counted on a fine time grid."""
    said = [
        name for name in ("offset_ppm", "t_sat_s", "t_rec_s")
        if not getattr(allowed, name).lower - 1e-6 <= getattr(block, name) <= getattr(allowed, name).upper + 1e-6
    ]  # fmt: skip
    if block.b1_ut > allowed.b1_max_ut + 1e-6:
        said.append("b1")
    if block.b1_ut == 0:
        return said
    if block.t_sat_s > allowed.duty_cycle_max * block.duration_s + 1e-6:
        said.append("duty cycle")
    start = history[-1].end_s if history else 0.0
    steps = round((start + block.duration_s) / STEP_S) + 1
    square = np.zeros(steps)
    for one in (*history, Played(start, block)):
        square[round((one.start_s + one.block.t_rec_s) / STEP_S) : round(one.end_s / STEP_S)] = one.block.b1_ut**2
    energy = np.concatenate([[0.0], np.cumsum(square) * STEP_S])
    for window, most in ((10.0, allowed.b1rms_10s_ut), (360.0, allowed.b1rms_6min_ut)):
        ends = np.arange(round((start + block.t_rec_s) / STEP_S) + 1, steps + 1)  # windows that hold some of its RF
        within = energy[ends] - energy[np.maximum(ends - round(window / STEP_S), 0)]
        if np.max(within) > window * most**2 + 3 * STEP_S * 36:  # edges fall between grid points
            said.append(f"{window:g} s window")
    return said


@settings(max_examples=60, deadline=None)
@given(any_limits(), st.lists(st.tuples(st.floats(0, 6), st.floats(0.5, 3), st.floats(1, 4)), max_size=30), st.integers(0, 2**31))
def test_no_suggestion_is_ever_outside_the_limits(prospect, allowed, before, seed):
    limited, rng = with_limits(prospect, allowed), np.random.default_rng(seed)
    history = limits.back_to_back([SaturationBlock(b1_ut=b1, offset_ppm=3, t_sat_s=t_sat, t_rec_s=t_rec) for b1, t_sat, t_rec in before])
    for _ in range(4):
        advice = limited.advise(Course(limited.begin().magnetisation, tuple(history)), an_answer(rng.exponential(size=len(limited.candidates))))
        if advice.block is None:
            return
        assert breaches(allowed, history, advice.block) == []
        history.append(Played(history[-1].end_s if history else 0.0, advice.block))


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
