"""The protocol without sockets: time, disk and worker are the test's own."""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Sequence

import ismrmrd
import pytest

from scansteer.core.errors import InputError
from scansteer.realtime import images, journal
from scansteer.realtime.broker import Broker
from scansteer.realtime.client import image_of
from scansteer.realtime.codec import decode, encode
from scansteer.realtime.config import Limits, ServeConfig
from scansteer.realtime.image_check import IMAGE_FACTS
from scansteer.realtime.messages import (
    Close,
    Control,
    DecisionAck,
    GetMaps,
    Image,
    Missing,
    Open,
    Ping,
    Played,
    PlayedPulse,
    Subscribe,
    WireMessage,
)
from scansteer.realtime.outbox import Outgoing
from scansteer.realtime.worker import run_job

PULSE = PlayedPulse(b1_ut=1.0, offset_ppm=3.0, t_sat_s=1.0, t_rec_s=1.0)


class Stage:
    """A broker whose jobs run when `work` says so and whose clock stands still."""

    def __init__(self, config: ServeConfig, make) -> None:
        self.now = 1000.0
        self.jobs: list[tuple[str, object]] = []
        self.recorded: list[tuple[bytes, list[bytes]]] = []
        self.broker = Broker(config, make, lambda session_id, job, slow: self.jobs.append((session_id, job)), lambda: self.now)

    def say(self, message: WireMessage, bodies: Sequence[bytes] = (), identity: bytes = b"client") -> list[WireMessage]:
        frames = [bytes(frame) for frame in encode(message, bodies)]
        self.recorded.append((identity, frames))
        return self.send(identity, frames)

    def send(self, identity: bytes, frames: list[bytes]) -> list[WireMessage]:
        out = self.broker.handle(identity, frames)
        return heard(out + self.broker.commit())

    def work(self) -> list[WireMessage]:
        out: list[Outgoing] = []
        while self.jobs:
            session_id, job = self.jobs.pop(0)
            out += self.broker.finished(session_id, run_job(job))
        return heard(out + self.broker.commit())

    def tick(self, seconds: float) -> list[WireMessage]:
        self.now += seconds
        return heard(self.broker.tick() + self.broker.commit())

    def image(self, session_id: str, body: bytes) -> list[WireMessage]:
        return self.say(image_of(session_id, body), [body])


def heard(outgoing: list[Outgoing]) -> list[WireMessage]:
    """Messages to clients; those to watchers left out."""
    return [decode(out.frames)[0] for out in outgoing if out.identity is not None]


def kinds(messages: list[WireMessage]) -> list[str]:
    return [message.kind for message in messages]  # type: ignore[attr-defined]


@pytest.fixture
def stage(serve_config, fake_session):
    stage = Stage(serve_config, fake_session)
    yield stage
    stage.broker.close()


@pytest.fixture
def opening(scan) -> Open:
    return Open(session_id="s", scan=scan.model_dump(mode="json"))


def test_accepted_is_said_only_after_the_sync(stage, opening, make_image, monkeypatch):
    stage.say(opening)
    order: list[str] = []
    really_sync = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: (order.append("sync"), really_sync(descriptor))[0])
    body = make_image(0)
    assert stage.broker.handle(b"client", encode(image_of("s", body), [body])) == []
    assert order == []
    assert kinds(heard(stage.broker.commit())) == ["accepted"]
    assert order == ["sync"]


def test_many_images_share_one_sync(stage, opening, make_image, monkeypatch):
    stage.say(opening)
    count: list[int] = []
    monkeypatch.setattr(os, "fdatasync", count.append)
    for repetition in range(10):
        body = make_image(repetition)
        stage.broker.handle(b"client", encode(image_of("s", body), [body]))
    assert kinds(heard(stage.broker.commit())) == ["accepted"] * 10
    assert len(count) == 1


def test_images_that_arrive_together_are_written_with_one_call(stage, opening, make_image, monkeypatch, serve_config):
    stage.say(opening)
    stage.image("s", make_image(0))
    writes: list[int] = []
    really_write = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda *arguments: (writes.append(1), really_write(*arguments))[1])
    for repetition in (1, 2, 3, 3, 4):  # one comes twice
        body = make_image(repetition)
        stage.broker.handle(b"client", encode(image_of("s", body), [body]))
    answers = heard(stage.broker.commit())
    assert [answer.repetition for answer in answers] == [1, 2, 3, 3, 4]
    assert [answer.duplicate for answer in answers] == [False, False, False, True, False]
    assert len(writes) == 2
    stage.work()
    decisions = stage.broker.sessions.get("s").decisions
    assert [decision.repetition for decision in decisions] == [0, 1, 2, 3, 4]


def test_images_are_written_before_a_message_that_came_after_them(stage, opening, make_image, serve_config):
    stage.say(opening)
    for repetition in (0, 1):
        body = make_image(repetition)
        stage.broker.handle(b"client", encode(image_of("s", body), [body]))
    stage.say(Close(session_id="s"))
    written = [decode(frames)[0] for _, frames in journal.read_all(serve_config.data_dir / "s" / "journal")]
    assert kinds(written) == ["open", "image", "image", "close"]


def test_images_that_arrive_together_are_refused_together_when_the_disk_is_full(stage, opening, make_image, monkeypatch):
    def full(descriptor, parts, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    stage.say(opening)
    monkeypatch.setattr(os, "pwritev", full)
    bodies = [make_image(repetition) for repetition in range(3)]
    for number, body in enumerate(bodies):
        stage.broker.handle(b"client", encode(image_of("s", body).model_copy(update={"request_id": number}), [body]))
    answers = heard(stage.broker.commit())
    assert [(answer.kind, answer.code, answer.request_id) for answer in answers] == [("refused", "disk", n) for n in range(3)]
    monkeypatch.undo()
    assert [kinds(stage.image("s", body)) for body in bodies] == [["accepted"]] * 3


def test_a_failed_sync_turns_answers_into_refusals(stage, opening, make_image, monkeypatch):
    stage.say(opening)

    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    (answer,) = stage.image("s", make_image(0))
    assert (answer.kind, answer.code) == ("refused", "disk")
    monkeypatch.undo()
    (answer,) = stage.image("s", make_image(1))
    assert (answer.kind, answer.code) == ("refused", "disk")


def test_a_full_disk_refuses_one_image_and_takes_it_later(stage, opening, make_image, monkeypatch):
    stage.say(opening)

    def full(descriptor, parts, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    (answer,) = stage.image("s", make_image(0))
    assert (answer.kind, answer.code) == ("refused", "disk")
    monkeypatch.undo()
    assert kinds(stage.image("s", make_image(0))) == ["accepted"]


def test_every_recorded_message_sent_again_changes_nothing(stage, opening, make_image, serve_config):
    stage.say(opening)
    stage.say(Subscribe(session_id="s", reports_played=True), identity=b"controller")
    for repetition in (0, 1, 3):
        stage.say(Played(session_id="s", repetition=repetition, pulse=PULSE))
        stage.image("s", make_image(repetition))
    stage.say(Missing(session_id="s", repetitions=(2,)))
    stage.say(Played(session_id="s", repetition=2, pulse=PULSE))
    stage.say(Control(session_id="s", command_id="a", command="pause"))
    stage.say(Control(session_id="s", command_id="b", command="resume"))
    stage.say(Control(session_id="s", command_id="c", command="exclude", repetition=1))
    stage.work()
    stage.say(DecisionAck(session_id="s", sequence_number=0, outcome="advice"), identity=b"controller")
    before, size = stage.broker.status(), (serve_config.data_dir / "s" / "journal").stat().st_size
    for identity, frames in list(stage.recorded):
        stage.send(identity, frames)
    stage.work()
    assert stage.broker.status() == before
    assert (serve_config.data_dir / "s" / "journal").stat().st_size <= size + 200  # a repeated `Missing` is written down again


def test_a_recorded_opening_does_not_bring_a_purged_session_back(stage, opening, serve_config, fake_session):
    from scansteer.realtime.sessions import purge_sessions

    stage.say(opening)
    stage.say(Close(session_id="s"))
    stage.work()
    stage.broker.close()
    assert purge_sessions(serve_config.data_dir) == ["s"]
    stage = Stage(serve_config, fake_session)
    (answer,) = stage.say(opening)
    assert (answer.kind, answer.code) == ("refused", "closed")
    stage.broker.close()


def test_a_controller_that_never_acknowledges_gets_only_the_newest_decision_again(stage, opening, make_image):
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


def test_a_gap_is_asked_for_at_intervals_until_it_is_filled(stage, opening, make_image):
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


def test_no_more_sessions_than_allowed_are_open(serve_config, fake_session, opening):
    stage = Stage(serve_config.model_copy(update={"limits": Limits(max_sessions=2)}), fake_session)
    for name in ("a", "b"):
        assert kinds(stage.say(opening.model_copy(update={"session_id": name}))) == ["opened"]
    (answer,) = stage.say(opening.model_copy(update={"session_id": "c"}))
    assert (answer.kind, answer.code) == ("refused", "limit")
    stage.say(Close(session_id="a"))
    stage.work()
    assert kinds(stage.say(opening.model_copy(update={"session_id": "c"}))) == ["opened"]
    stage.broker.close()


def test_a_journal_has_a_bound(serve_config, fake_session, opening, make_image):
    stage = Stage(serve_config.model_copy(update={"limits": Limits(max_session_bytes=2**20)}), fake_session)
    stage.say(opening)
    answers = [stage.image("s", make_image(repetition, shape=(1, 300, 300)))[-1] for repetition in range(4)]
    assert kinds(answers) == ["accepted", "accepted", "refused", "refused"]
    stage.broker.close()


def test_controllers_and_map_requests_are_bounded(stage, opening, make_image):
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


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"crc32": 1}, "checksum"),
        ({"repetition": 5}, "in the image's header, not in its message"),
        ({"series": 9}, "in the image's header"),
        ({"role": "t1"}, "Meta says"),
    ],
)
def test_an_envelope_that_contradicts_its_image_is_refused(stage, opening, make_image, change, match):
    stage.say(opening)
    body = make_image(0)
    (answer,) = stage.say(image_of("s", body).model_copy(update=change), [body])
    assert answer.code == "malformed"
    assert match in answer.reason


@pytest.mark.parametrize(
    ("make_body", "code"),
    [
        (lambda body: body[:100], "malformed"),
        (lambda body: body[:-1], "malformed"),
        (lambda body: body + b"\0", "malformed"),
        (lambda body: body[:2] + b"\x63\x00" + body[4:], "malformed"),
        (lambda body: body[:16] + b"\xff\xff\xff\xff" + body[20:], "too-large"),
        (lambda body: body[:198] + b"\xff" * 8 + body[206:], "malformed"),
        (lambda body: body[:16] + bytes(6) + body[22:], "too-large"),
    ],
)
def test_a_body_that_contradicts_its_header_is_refused(stage, opening, make_image, make_body, code):
    stage.say(opening)
    body = make_image(0)
    changed = make_body(body)
    envelope = image_of("s", body).model_copy(update={"crc32": zlib.crc32(changed)})
    (answer,) = stage.say(envelope, [changed])
    assert (answer.kind, answer.code) == ("refused", code)
    assert kinds(stage.image("s", body)) == ["accepted"]


def test_images_of_another_series_or_slice_are_refused_by_name(stage, opening, make_image):
    stage.say(opening)
    stage.image("s", make_image(0))
    assert "not this session's" in stage.image("s", make_image(1, series_index=2))[0].reason
    assert "opened with 1 slices" in stage.image("s", make_image(1, slice=1))[0].reason
    assert "beyond the 4096" in stage.image("s", make_image(5000))[0].reason


def test_a_scan_that_is_none_is_refused_with_the_field(stage, opening):
    (answer,) = stage.say(opening.model_copy(update={"scan": {**opening.scan, "field_t": -1}}))
    assert answer.code == "malformed"
    assert "field_t" in answer.reason


def test_a_session_that_cannot_be_made_fails_and_keeps_its_images(serve_config, opening, make_image):
    def impossible(setup):
        raise InputError("This scan has too many pools.")

    stage = Stage(serve_config, impossible)
    stage.say(opening)
    assert kinds(stage.work()) == ["session"]
    status = stage.broker.status().sessions[0]
    assert (status.state, status.warnings[-1]) == ("failed", "This scan has too many pools.")
    assert kinds(stage.image("s", make_image(0))) == ["accepted"]
    assert stage.work() == []
    stage.broker.close()


def test_a_session_that_breaks_fails_alone(serve_config, fake_session, opening, make_image, caplog):
    class Breaking(fake_session):
        def absorb(self, frame, **options):
            if self.setup.session_id == "broken":
                raise ZeroDivisionError
            return super().absorb(frame, **options)

    stage = Stage(serve_config, Breaking)
    for name in ("broken", "s"):
        stage.say(opening.model_copy(update={"session_id": name}))
        stage.say(Subscribe(session_id=name), identity=b"controller")
        stage.image(name, make_image(0))
    said = stage.work()
    assert [message.session_id for message in said if message.kind == "decision"] == ["s"]
    states = {session.session_id: session.state for session in stage.broker.status().sessions}
    assert states == {"broken": "failed", "s": "ready"}
    stage.broker.close()


def test_auxiliary_images_wait_for_each_other_and_compile_once(serve_config, fake_session, opening, make_image):
    made = []

    class Recording(fake_session):
        def __init__(self, setup):
            made.append(set(setup.auxiliaries))
            super().__init__(setup)

    stage = Stage(serve_config, Recording)
    stage.say(opening.model_copy(update={"n_auxiliary": 2}))
    for role, name in (("t1", "T1"), ("t2", "T2")):
        assert stage.jobs == []
        body = make_image(0, meta={"DataRole": name})
        stage.say(image_of("s", body, role=role), [body])
    stage.work()
    assert made == [{"t1", "t2"}]
    stage.image("s", make_image(0))
    body = make_image(0, meta={"DataRole": "B1MAP"})
    (answer,) = stage.say(image_of("s", body, role="b1"), [body])
    assert "after image 0" in answer.reason
    stage.broker.close()


def test_a_map_is_judged_without_decoding_its_pixels(stage, opening, make_image, monkeypatch):
    stage.say(opening)
    monkeypatch.setattr(images, "_widened", lambda stored: pytest.fail("pixels were decoded on the event loop"))
    good = make_image(0, meta={"DataRole": "T1"})
    bad = make_image(0, meta={"DataRole": "T1", "RescaleSlope": "-1"}, slice=1)
    assert kinds(stage.say(image_of("s", good, role="t1"), [good])) == ["accepted"]
    (answer,) = stage.say(image_of("s", bad, role="t1"), [bad])
    assert (answer.code, answer.reason) == ("malformed", "RescaleSlope of the image must be positive, got -1.")


def test_a_new_mask_during_the_scan_changes_the_region(stage, opening, make_image):
    stage.say(opening)
    stage.say(Subscribe(session_id="s"), identity=b"controller")
    for repetition in range(2):
        stage.image("s", make_image(repetition))
    before = [message.decision for message in stage.work() if message.kind == "decision"]
    body = make_image(0, meta={"DataRole": "MASK"})
    stage.say(image_of("s", body, role="mask"), [body])
    (after,) = [message.decision for message in stage.work() if message.kind == "decision"]
    assert (after.sequence_number, after.n_images) == (2, 2)
    assert after.reason != before[-1].reason
    assert "region was changed" in after.warnings[-1]


def recovered(stage: Stage, config: ServeConfig, make) -> Stage:
    """Another broker on the same folder, as after a kill: nothing is flushed or closed."""
    assert stage.broker.sessions._lock is not None
    os.close(stage.broker.sessions._lock)  # what the kernel does with a lock when its process dies
    stage.broker.sessions._lock = None
    return Stage(config, make)


def test_recovery_repeats_everything_that_has_to_do_with_order(stage, opening, make_image, serve_config, fake_session):
    def act(target: Stage, part: int) -> None:
        if part == 0:
            target.say(opening)
            target.say(Subscribe(session_id="s", reports_played=True), identity=b"controller")
            target.image("s", make_image(2))
            target.say(Played(session_id="s", repetition=0, pulse=PULSE))
            target.image("s", make_image(0))
        if part == 1:
            target.work()
            target.say(Missing(session_id="s", repetitions=(1,)))
            target.say(Played(session_id="s", repetition=1, pulse=PULSE))
        if part == 2:
            target.say(Played(session_id="s", repetition=2, pulse=PULSE))
            target.say(Control(session_id="s", command_id="x", command="exclude", repetition=0))
        if part == 3:
            target.say(Played(session_id="s", repetition=3, pulse=PULSE))
            target.image("s", make_image(3))
            target.work()

    for part in range(4):
        act(stage, part)
    expected = stage.broker.sessions.get("s").decisions
    for crash_after in range(4):
        config = serve_config.model_copy(update={"data_dir": serve_config.data_dir / f"crash-{crash_after}"})
        other = Stage(config, fake_session)
        for part in range(4):
            act(other, part)
            if part == crash_after:
                other = recovered(other, config, fake_session)
        other.work()
        assert other.broker.sessions.get("s").decisions == expected
        other.broker.close()


def test_a_damaged_record_is_asked_for_again(stage, opening, make_image, serve_config, fake_session):
    stage.say(opening)
    for repetition in range(3):
        stage.image("s", make_image(repetition))
    path = serve_config.data_dir / "s" / "journal"
    entries, _ = journal.scan(path)
    content = bytearray(path.read_bytes())
    content[entries[2].body_offset + 300] ^= 4  # within the image of repetition 1
    path.write_bytes(content)
    second = recovered(stage, serve_config, fake_session)
    (session,) = second.broker.status().sessions
    assert session.gaps == (1,)
    assert "damaged" in session.warnings[0]
    assert [message.kind for message in second.image("s", make_image(1))] == ["accepted"]
    second.work()
    assert [decision.repetition for decision in second.broker.sessions.get("s").decisions] == [0, 1, 2]
    second.broker.close()


def test_a_journal_whose_beginning_is_lost_is_left_alone(stage, opening, make_image, serve_config, fake_session, caplog):
    stage.say(opening)
    stage.image("s", make_image(0))
    path = serve_config.data_dir / "s" / "journal"
    content = bytearray(path.read_bytes())
    content[60] ^= 1
    path.write_bytes(content)
    second = recovered(stage, serve_config, fake_session)
    assert second.broker.status().sessions == ()
    assert "cannot be taken up again" in caplog.text
    assert kinds(second.say(Ping(request_id=1))) == ["pong"]
    second.broker.close()


def test_a_decision_is_written_once_although_it_is_computed_again(stage, opening, make_image, serve_config, fake_session):
    stage.say(opening)
    stage.image("s", make_image(0))
    stage.work()
    with open(serve_config.data_dir / "s" / "decisions.jsonl", "a") as file:
        file.write('{"torn')
    second = recovered(stage, serve_config, fake_session)
    second.work()
    second.image("s", make_image(1))
    second.work()
    assert (serve_config.data_dir / "s" / "decisions.jsonl").read_text().count("\n") == 2
    second.broker.close()


def test_an_image_is_not_mistaken_for_one_in_another_role(stage, opening, make_image):
    stage.say(opening)
    body = make_image(0)
    assert kinds(stage.say(Image(session_id="s", crc32=zlib.crc32(body)), [body])) == ["accepted"]
    mask = make_image(0, meta={"DataRole": "MASK"})
    assert kinds(stage.say(image_of("s", mask, role="mask"), [mask])) == ["accepted"]


def test_the_layout_of_an_image_is_that_of_its_library():
    header = ismrmrd.ImageHeader(
        data_type=1, matrix_size=(2, 3, 4), channels=5, slice=6, repetition=7, set=8, image_series_index=9, image_index=99
    )
    assert IMAGE_FACTS.unpack_from(bytes(header) + (10).to_bytes(8, "little")) == (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)


def test_expected_scans_are_compiled_before_the_service_is_ready(serve_config, fake_session, scan):
    made: list[str] = []

    def make(setup):
        made.append(setup.scan.name)
        return fake_session(setup)

    stage = Stage(serve_config, make)
    stage.broker.warm([scan])
    assert not stage.broker.is_ready
    stage.work()
    assert stage.broker.is_ready
    assert made == [scan.name]
    assert stage.broker.status().sessions == ()
    stage.broker.close()


def test_an_expected_scan_that_cannot_be_compiled_keeps_nobody_waiting(serve_config, scan):
    def make(setup):
        raise InputError("The lattice is too large.")

    stage = Stage(serve_config, make)
    stage.broker.warm([scan])
    stage.work()
    assert stage.broker.is_ready
    stage.broker.close()
