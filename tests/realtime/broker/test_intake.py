"""Images on their way to the disk: written together, answered when that is durable, none twice."""

from __future__ import annotations

import errno
import os

from scansteer.realtime import journal
from scansteer.realtime.client import image_of
from scansteer.realtime.codec import decode, encode
from scansteer.realtime.messages import Close, Subscribe


def test_accepted_is_said_only_after_the_sync(stage, opening, make_image, monkeypatch, kinds):
    stage.say(opening)
    order: list[str] = []
    really_sync = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: (order.append("sync"), really_sync(descriptor))[0])
    body = make_image(0)
    assert stage.broker.handle(b"client", encode(image_of("s", body), [body])) == []
    assert order == []
    assert kinds(stage.commit()) == ["accepted"]
    assert order == ["sync"]


def test_many_images_share_one_sync(stage, opening, make_image, monkeypatch, kinds):
    stage.say(opening)
    count: list[int] = []
    monkeypatch.setattr(os, "fdatasync", count.append)
    for repetition in range(10):
        body = make_image(repetition)
        stage.broker.handle(b"client", encode(image_of("s", body), [body]))
    assert kinds(stage.commit()) == ["accepted"] * 10
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
    answers = stage.commit()
    assert [answer.repetition for answer in answers] == [1, 2, 3, 3, 4]
    assert [answer.duplicate for answer in answers] == [False, False, False, True, False]
    assert len(writes) == 2
    stage.work()
    decisions = stage.broker.sessions.get("s").decisions
    assert [decision.repetition for decision in decisions] == [0, 1, 2, 3, 4]


def test_images_are_written_before_a_message_that_came_after_them(stage, opening, make_image, serve_config, kinds):
    stage.say(opening)
    for repetition in (0, 1):
        body = make_image(repetition)
        stage.broker.handle(b"client", encode(image_of("s", body), [body]))
    stage.say(Close(session_id="s"))
    written = [decode(frames)[0] for _, frames in journal.read_all(serve_config.data_dir / "s" / "journal")]
    assert kinds(written) == ["open", "image", "image", "close"]


def test_images_that_arrive_together_are_refused_together_when_the_disk_is_full(stage, opening, make_image, monkeypatch, kinds):
    def full(descriptor, parts, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    stage.say(opening)
    monkeypatch.setattr(os, "pwritev", full)
    bodies = [make_image(repetition) for repetition in range(3)]
    for number, body in enumerate(bodies):
        stage.broker.handle(b"client", encode(image_of("s", body).model_copy(update={"request_id": number}), [body]))
    answers = stage.commit()
    assert [(answer.kind, answer.code, answer.request_id) for answer in answers] == [("refused", "disk", n) for n in range(3)]
    monkeypatch.undo()
    assert [kinds(stage.image("s", body)) for body in bodies] == [["accepted"]] * 3


def test_a_failed_sync_turns_answers_into_refusals(stage, opening, make_image, monkeypatch):
    stage.say(opening)

    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    (notice, answer) = stage.image("s", make_image(0))
    assert (notice.kind, notice.state) == ("session", "failed")
    assert (answer.kind, answer.code) == ("refused", "disk")
    monkeypatch.undo()
    (answer,) = stage.image("s", make_image(1))
    assert (answer.kind, answer.code) == ("refused", "disk")
    assert "scansteer_session_failures_total 1\n" in stage.broker.metrics_text()


def test_after_a_failed_sync_controllers_are_told_and_nothing_is_decided(stage, opening, make_image, monkeypatch, kinds):
    stage.say(opening)
    stage.say(Subscribe(session_id="s"), identity=b"controller")

    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    assert kinds(stage.image("s", make_image(0))) == ["session", "session", "refused"]
    monkeypatch.undo()
    assert "decision" not in kinds(stage.work())
    (session,) = stage.broker.status().sessions
    assert (session.state, session.n_decisions) == ("failed", 0)


def test_a_full_disk_refuses_one_image_and_takes_it_later(stage, opening, make_image, monkeypatch, kinds):
    stage.say(opening)

    def full(descriptor, parts, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    (answer,) = stage.image("s", make_image(0))
    assert (answer.kind, answer.code) == ("refused", "disk")
    monkeypatch.undo()
    assert kinds(stage.image("s", make_image(0))) == ["accepted"]
