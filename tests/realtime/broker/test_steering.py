"""Controllers that do not answer, one way or another."""

from __future__ import annotations

from scansteer.realtime.messages import DecisionAck, GetMaps, Subscribe


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
