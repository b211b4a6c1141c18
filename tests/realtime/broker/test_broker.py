"""Gaps, time, limits, and sessions that fail: what the service says of them."""

from __future__ import annotations

from scansteer.core.errors import InputError
from scansteer.realtime.config import Limits
from scansteer.realtime.messages import Close, GetMaps, Subscribe


def test_a_gap_is_asked_for_at_intervals_until_it_is_filled(stage, opening, make_image, kinds):
    stage.say(opening)
    stage.image("s", make_image(0))
    assert kinds(stage.image("s", make_image(2))) == ["gap", "accepted"]
    assert kinds(stage.tick(0.01)) == []
    assert kinds(stage.tick(1.0)) == ["gap"]
    stage.image("s", make_image(1))
    assert stage.tick(1.0) == []


def test_a_jump_of_the_wall_clock_changes_nothing(stage, opening, make_image, monkeypatch):
    import time

    stage.say(opening)
    stage.image("s", make_image(0))
    monkeypatch.setattr(time, "time", lambda: 0.0)
    stage.image("s", make_image(1))
    monkeypatch.setattr(time, "time", lambda: 4e9)
    stage.image("s", make_image(2))
    assert stage.broker.status().sessions[0].waiting == 0
    stage.tick(0.1)
    assert stage.broker.status().sessions[0].state == "opening"


def test_a_session_that_nobody_uses_is_closed_at_last(stage, opening, make_image):
    stage.say(opening)
    stage.image("s", make_image(0))
    stage.work()
    stage.tick(13 * 3600.0)
    stage.work()
    assert stage.broker.status().sessions[0].state == "closed"


def test_no_more_sessions_than_allowed_are_open(serve_config, fake_session, opening, kinds, make_stage):
    stage = make_stage(serve_config.model_copy(update={"limits": Limits(max_sessions=2)}), fake_session)
    for name in ("a", "b"):
        assert kinds(stage.say(opening.model_copy(update={"session_id": name}))) == ["opened"]
    (answer,) = stage.say(opening.model_copy(update={"session_id": "c"}))
    assert (answer.kind, answer.code) == ("refused", "limit")
    stage.say(Close(session_id="a"))
    stage.work()
    assert kinds(stage.say(opening.model_copy(update={"session_id": "c"}))) == ["opened"]
    stage.broker.close()


def test_a_journal_has_a_bound(serve_config, fake_session, opening, make_image, kinds, make_stage):
    stage = make_stage(serve_config.model_copy(update={"limits": Limits(max_session_bytes=2**20)}), fake_session)
    stage.say(opening)
    answers = [stage.image("s", make_image(repetition, shape=(1, 300, 300)))[-1] for repetition in range(4)]
    assert kinds(answers) == ["accepted", "accepted", "refused", "refused"]
    stage.broker.close()


def test_a_scan_that_is_none_is_refused_with_the_field(stage, opening):
    (answer,) = stage.say(opening.model_copy(update={"scan": {**opening.scan, "field_t": -1}}))
    assert answer.code == "malformed"
    assert "field_t" in answer.reason


def test_a_session_that_cannot_be_made_fails_and_keeps_its_images(serve_config, opening, make_image, kinds, make_stage):
    def impossible(setup):
        raise InputError("This scan has too many pools.")

    stage = make_stage(serve_config, impossible)
    stage.say(opening)
    assert kinds(stage.work()) == ["session"]
    status = stage.broker.status().sessions[0]
    assert (status.state, status.warnings[-1]) == ("failed", "This scan has too many pools.")
    assert kinds(stage.image("s", make_image(0))) == ["accepted"]
    assert stage.work() == []
    stage.broker.close()


def test_a_session_that_breaks_fails_alone(serve_config, fake_session, opening, make_image, caplog, make_stage):
    class Breaking(fake_session):
        def absorb(self, frame, **options):
            if self.setup.session_id == "broken":
                raise ZeroDivisionError
            return super().absorb(frame, **options)

    stage = make_stage(serve_config, Breaking)
    for name in ("broken", "s"):
        stage.say(opening.model_copy(update={"session_id": name}))
        stage.say(Subscribe(session_id=name), identity=b"controller")
        stage.image(name, make_image(0))
    said = stage.work()
    assert [message.session_id for message in said if message.kind == "decision"] == ["s"]
    states = {session.session_id: session.state for session in stage.broker.status().sessions}
    assert states == {"broken": "failed", "s": "ready"}
    stage.broker.close()


def test_a_session_that_fails_while_it_is_closed_is_closed_once(serve_config, fake_session, opening, make_image, kinds, make_stage, caplog):
    class Breaking(fake_session):
        def absorb(self, frame, **options):
            raise ZeroDivisionError

    stage = make_stage(serve_config, Breaking)
    stage.say(opening)
    stage.image("s", make_image(0))
    closing = Close(session_id="s", request_id=7)
    stage.say(closing)
    name, last_job = stage.jobs.pop()
    stage.work()
    assert stage.broker.status().sessions[0].state == "closing"
    stage.say(closing)
    stage.jobs.append((name, last_job))
    assert kinds(stage.work()) == ["closed"]
    assert kinds(stage.image("s", make_image(1))) == ["refused"]
    stage.broker.close()


def test_a_session_that_cannot_be_summed_up_is_closed_all_the_same(serve_config, fake_session, opening, make_image, kinds, make_stage, caplog):
    class Speechless(fake_session):
        def summary(self):
            raise ZeroDivisionError

    stage = make_stage(serve_config, Speechless)
    stage.say(opening)
    stage.image("s", make_image(0))
    stage.say(Close(session_id="s", request_id=7))
    assert kinds(stage.work())[-2:] == ["session", "closed"]
    assert stage.broker.status().sessions[0].state == "closed"
    stage.broker.close()


def test_an_idle_session_that_the_disk_keeps_open_is_tried_again_now_and_then(stage, opening, make_image, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    stage.say(opening)
    stage.work()
    with monkeypatch.context() as disk:
        disk.setattr("os.pwritev", full)
        stage.tick(13 * 3600.0)
        for _ in range(100):
            stage.tick(0.1)
    assert caplog.text.count("cannot close idle session") == 1
    stage.tick(61.0)
    stage.work()
    assert stage.broker.status().sessions[0].state == "closed"


def test_what_cannot_be_passed_on_is_refused_and_ends_nothing(serve_config, fake_session, opening, make_image, kinds, make_stage, caplog):
    class Odd(fake_session):
        def maps(self):
            return {"not a name": next(iter(super().maps().values()))}

    stage = make_stage(serve_config, Odd)
    stage.say(opening)
    stage.image("s", make_image(0))
    stage.say(GetMaps(session_id="s", request_id=5))
    answer = stage.work()[-1]
    assert (answer.code, answer.request_id) == ("failed", 5)
    assert kinds(stage.image("s", make_image(1))) == ["accepted"]
    stage.broker.close()


def test_maps_of_many_long_slices_are_sent(stage, opening, make_image):
    stage.say(opening.model_copy(update={"n_slices": 2}))
    for slice_ in range(2):
        stage.image("s", make_image(0, shape=(40_000, 1, 1), slice=slice_))
    stage.say(GetMaps(session_id="s", request_id=5))
    assert stage.work()[-1].arrays[0].shape == (80_000, 1, 1)


def test_expected_scans_are_compiled_before_the_service_is_ready(serve_config, fake_session, scan, make_stage):
    made: list[str] = []

    def make(setup):
        made.append(setup.scan.name)
        return fake_session(setup)

    stage = make_stage(serve_config, make)
    stage.broker.warm([scan])
    assert not stage.broker.is_ready
    stage.work()
    assert stage.broker.is_ready
    assert made == [scan.name]
    assert stage.broker.status().sessions == ()
    stage.broker.close()


def test_an_expected_scan_that_cannot_be_compiled_keeps_nobody_waiting(serve_config, scan, make_stage):
    def make(setup):
        raise InputError("The lattice is too large.")

    stage = make_stage(serve_config, make)
    stage.broker.warm([scan])
    stage.work()
    assert stage.broker.is_ready
    stage.broker.close()


def test_nothing_builds_on_a_posterior_that_failed_half_way(serve_config, fake_session, make_stage, opening, make_image):
    class Breaks(fake_session):
        def absorb(self, frame, **moment):
            decision = super().absorb(frame, **moment)
            if frame.repetition == 1:
                raise RuntimeError("out of memory")
            return decision

    stage = make_stage(serve_config, Breaks)
    stage.say(opening)
    for repetition in range(4):
        stage.image("s", make_image(repetition))
    stage.work()
    session = stage.broker.sessions.get("s")
    assert session.state == "failed"
    assert [decision.repetition for decision in session.decisions] == [0]
    stage.broker.close()
