"""The rule by which images reach the posterior."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from scansteer.realtime.journal import Entry
from scansteer.realtime.messages import Pulse
from scansteer.realtime.order import Sequencer

PULSE = Pulse(b1_ut=1.0, offset_ppm=2.0, t_sat_s=1.0, t_rec_s=1.0)


def entry(number: int) -> Entry:
    return Entry(number, number, (1,), (0,))


def given_by(sequencer: Sequencer) -> list[int]:
    return [step.repetition for step in sequencer.take()]


@given(st.permutations(range(8)))
def test_any_order_of_arrival_gives_the_played_order(order):
    sequencer = Sequencer()
    found = []
    for repetition in order:
        sequencer.add(repetition, 0, entry(repetition))
        found += given_by(sequencer)
    assert found == list(range(8))


def test_a_repetition_waits_for_all_its_slices():
    sequencer = Sequencer(n_slices=2)
    sequencer.add(0, 1, entry(5))
    assert sequencer.take() == []
    sequencer.add(0, 0, entry(6))
    (step,) = sequencer.take()
    assert [found.sequence for found in step.entries] == [6, 5]


def test_gaps_are_those_that_later_ones_wait_for():
    sequencer = Sequencer()
    for repetition in (0, 3, 5):
        sequencer.add(repetition, 0, entry(repetition))
    assert given_by(sequencer) == [0]
    assert sequencer.gaps() == (1, 2, 4)


def test_a_missing_repetition_is_given_empty():
    sequencer = Sequencer()
    sequencer.add(1, 0, entry(1))
    sequencer.declare_missing(0)
    steps = sequencer.take()
    assert [(step.repetition, len(step.entries)) for step in steps] == [(0, 0), (1, 1)]


def test_an_image_that_comes_after_it_was_declared_missing_is_not_used():
    sequencer = Sequencer()
    sequencer.declare_missing(1)
    assert not sequencer.add(1, 0, entry(1))
    sequencer.add(0, 0, entry(0))
    assert [len(step.entries) for step in sequencer.take()] == [1, 0]
    assert not sequencer.add(0, 0, entry(9))


def test_what_is_complete_cannot_be_declared_missing():
    sequencer = Sequencer()
    sequencer.add(1, 0, entry(1))
    sequencer.declare_missing(1)
    sequencer.add(0, 0, entry(0))
    assert [len(step.entries) for step in sequencer.take()] == [1, 1]


def test_a_repetition_waits_for_the_report_of_its_pulse():
    sequencer = Sequencer()
    sequencer.waits_for_played = True
    sequencer.add(0, 0, entry(0))
    assert sequencer.take() == []
    sequencer.report_played(0, PULSE)
    (step,) = sequencer.take()
    assert step.pulse == PULSE


def test_giving_up_gaps_releases_what_waits():
    sequencer = Sequencer(n_slices=2)
    for repetition, slice_ in ((1, 0), (1, 1), (2, 0)):
        sequencer.add(repetition, slice_, entry(repetition))
    sequencer.give_up_gaps()
    assert [(step.repetition, len(step.entries)) for step in sequencer.take()] == [(0, 0), (1, 2)]
