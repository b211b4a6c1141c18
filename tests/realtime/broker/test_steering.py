"""Controllers that do not answer, one way or another."""

from __future__ import annotations

import pytest

from scansteer.realtime.client import image_of
from scansteer.realtime.codec import decode, encode
from scansteer.realtime.config import Limits
from scansteer.realtime.messages import Control, DecisionAck, GetMaps, Played, PlayedPulse, Subscribe


def test_a_controller_that_never_acknowledges_gets_only_the_newest_decision_again(stage, opening, make_image, kinds):
    stage.say(opening)
    stage.say(Subscribe(session_id="s"), identity=b"controller")
    for repetition in range(5):
        stage.image("s", make_image(repetition))
    assert kinds(stage.work()).count("decision") == 5
    again = [message for message in stage.tick(1.0) if message.kind == "decision"]
    assert [message.decision.repetition for message in again] == [4]


def test_an_acknowledged_decision_is_not_sent_again(stage, opening, make_image):
    stage.say(opening)
    stage.say(Subscribe(session_id="s"), identity=b"controller")
    stage.image("s", make_image(0))
    stage.work()
    stage.say(DecisionAck(session_id="s", sequence_number=0, outcome="obeyed"), identity=b"controller")
    assert stage.tick(1.0) == []


def test_a_silent_controller_is_forgotten_and_costs_nothing_more(stage, opening, make_image):
    stage.say(opening)
    stage.say(Subscribe(session_id="s"), identity=b"controller")
    stage.image("s", make_image(0))
    stage.work()
    stage.tick(3600.0)
    assert stage.broker.status().sessions[0].controllers == 0
    assert stage.tick(3600.0) == []


def test_controllers_and_map_requests_are_bounded(stage, opening, make_image, kinds):
    stage.say(opening)
    answers = [stage.say(Subscribe(session_id="s"), identity=b"%d" % number)[-1] for number in range(10)]
    assert kinds(answers) == ["done"] * 8 + ["refused"] * 2
    stage.image("s", make_image(0))
    answers = [stage.say(GetMaps(session_id="s", request_id=number + 1)) for number in range(20)]
    assert [kinds(answer) for answer in answers] == [[]] * 16 + [["refused"]] * 4
    assert len(stage.jobs) == 18
    stage.say(GetMaps(session_id="s", request_id=1))
    assert len(stage.jobs) == 18
    assert kinds(stage.work()).count("maps") == 16


def test_what_absorbs_everything_again_does_not_pile_up(stage, opening, make_image, kinds):
    stage.say(opening)
    stage.image("s", make_image(0))
    stage.work()
    excludes = [Control(session_id="s", command_id=f"c{number}", command="exclude", repetition=5) for number in range(3)]
    assert [kinds(stage.say(command)) for command in excludes] == [["done"]] * 3
    assert len(stage.jobs) == 1
    others = [Control(session_id="s", command_id=f"d{number}", command="exclude", repetition=10 + number) for number in range(100)]
    answers = [stage.say(command)[0] for command in others]
    assert kinds(answers) == ["done"] * 63 + ["refused"] * 37
    assert answers[-1].code == "busy"
    mask = make_image(0, meta={"DataRole": "MASK"})
    (answer,) = stage.say(image_of("s", mask, role="mask"), [mask])
    assert answer.code == "busy"
    stage.work()
    assert kinds(stage.say(others[-1])) == ["done"]


def test_a_controller_whose_line_dropped_acts_again_at_once(stage, opening, make_image, kinds):
    stage.say(opening)
    stage.say(Subscribe(session_id="s", mode="acting", controller_id="a"), identity=b"old")
    stage.say(Played(session_id="s", repetition=0, pulse=PlayedPulse(b1_ut=1.0, offset_ppm=3.0, t_sat_s=1.0, t_rec_s=1.0)))
    stage.image("s", make_image(0))
    stage.work()
    answers = stage.say(Subscribe(session_id="s", mode="acting", controller_id="a"), identity=b"new")
    assert sorted(kinds(answers)) == ["decision", "done"]
    assert list(stage.broker.sessions.get("s").attendance.controllers) == [b"new"]


def test_a_pulse_beyond_the_accepted_repetitions_is_refused(serve_config, fake_session, make_stage, opening):
    stage = make_stage(serve_config.model_copy(update={"limits": Limits(max_repetitions=100)}), fake_session)
    stage.say(opening)
    pulse = PlayedPulse(b1_ut=1.0, offset_ppm=3.0, t_sat_s=1.0, t_rec_s=1.0)
    assert not [each for each in stage.say(Played(session_id="s", repetition=99, pulse=pulse)) if each.kind == "error"]
    (refused,) = stage.say(Played(session_id="s", repetition=100, pulse=pulse))
    assert (refused.code, refused.reason) == ("limit", "Repetition 100 is beyond the 100 accepted.")
    stage.broker.close()


@pytest.mark.parametrize("other", ["", "b"])
def test_no_other_controller_takes_the_acting_role_away(other, stage, opening, kinds):
    stage.say(opening)
    stage.say(Subscribe(session_id="s", mode="acting", controller_id=other and "a"), identity=b"first")
    (refused,) = stage.say(Subscribe(session_id="s", mode="acting", controller_id=other), identity=b"second")
    assert refused.code == "not-allowed"


def test_under_another_key_a_controllers_id_is_of_no_use(stage, opening):
    stage.say(opening)
    subscribe = Subscribe(session_id="s", mode="acting", controller_id="a")
    stage.broker.handle(b"first", encode(subscribe), "console")
    ((_, frames),) = stage.broker.handle(b"second", encode(subscribe), "scanner")
    assert decode(frames)[0].code == "not-allowed"
