"""State is a function of the journal: after a kill everything is as it was, and nothing happens twice."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest

from scansteer.realtime import journal, session_folder
from scansteer.realtime.messages import Close, Control, DecisionAck, Missing, Ping, Played, PlayedPulse, Subscribe

PULSE = PlayedPulse(b1_ut=1.0, offset_ppm=3.0, t_sat_s=1.0, t_rec_s=1.0)


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


def test_a_recorded_opening_does_not_bring_a_purged_session_back(stage, opening, serve_config, fake_session, make_stage):
    from scansteer.realtime.sessions import purge_sessions

    stage.say(opening)
    stage.say(Close(session_id="s"))
    stage.work()
    stage.broker.close()
    assert purge_sessions(serve_config.data_dir) == ["s"]
    stage = make_stage(serve_config, fake_session)
    (answer,) = stage.say(opening)
    assert (answer.kind, answer.code) == ("refused", "closed")
    stage.broker.close()


def test_recovery_repeats_everything_that_has_to_do_with_order(stage, opening, make_image, serve_config, fake_session, make_stage):
    def act(target, part: int) -> None:
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
        other = make_stage(config, fake_session)
        for part in range(4):
            act(other, part)
            if part == crash_after:
                other = other.restarted(config, fake_session)
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
    second = stage.restarted(serve_config, fake_session)
    (session,) = second.broker.status().sessions
    assert session.gaps == (1,)
    assert "damaged" in session.warnings[0]
    assert [message.kind for message in second.image("s", make_image(1))] == ["accepted"]
    second.work()
    assert [decision.repetition for decision in second.broker.sessions.get("s").decisions] == [0, 1, 2]
    second.broker.close()


@pytest.mark.parametrize("is_last", [True, False])
def test_for_a_damaged_report_of_what_was_played_the_schedule_stands_in(
    is_last, stage, opening, make_image, serve_config, fake_session
):
    stage.say(opening)
    stage.say(Subscribe(session_id="s", reports_played=True), identity=b"controller")
    for repetition in range(2 if is_last else 3):
        stage.image("s", make_image(repetition))
        stage.say(Played(session_id="s", repetition=repetition, pulse=PULSE))
    path = serve_config.data_dir / "s" / "journal"
    entries, _ = journal.scan(path)
    content = bytearray(path.read_bytes())
    content[entries[5].body_offset + 10] ^= 4  # the report of repetition 1
    path.write_bytes(content)
    second = stage.restarted(serve_config, fake_session)
    if is_last:
        second.image("s", make_image(2))
        second.work()
        second.say(Played(session_id="s", repetition=2, pulse=PULSE))
    second.work()
    decisions = second.broker.sessions.get("s").decisions
    assert [decision.repetition for decision in decisions] == [0, 1, 2]
    assert ["is lost: the scheduled pulse" in " ".join(decision.warnings) for decision in decisions] == [False, True, False]
    third = second.restarted(serve_config, fake_session)
    third.work()
    assert third.broker.sessions.get("s").decisions == decisions
    third.broker.close()


def test_a_journal_whose_beginning_is_lost_is_left_alone(stage, opening, make_image, serve_config, fake_session, caplog, kinds):
    stage.say(opening)
    stage.image("s", make_image(0))
    path = serve_config.data_dir / "s" / "journal"
    content = bytearray(path.read_bytes())
    content[60] ^= 1
    path.write_bytes(content)
    second = stage.restarted(serve_config, fake_session)
    assert second.broker.status().sessions == ()
    assert "cannot be taken up again" in caplog.text
    assert kinds(second.say(Ping(request_id=1))) == ["pong"]
    second.broker.close()


@pytest.mark.parametrize("left", [None, b"", journal.FILE_MARK, journal.FILE_MARK + b"\xabREC torn"])
def test_a_session_that_a_kill_left_before_its_first_record_can_be_opened(left, opening, make_image, serve_config, fake_session, make_stage, kinds):
    (serve_config.data_dir / "s").mkdir(parents=True)
    if left is not None:
        (serve_config.data_dir / "s" / "journal").write_bytes(left)
    stage = make_stage(serve_config, fake_session)
    assert kinds(stage.say(opening)) == ["opened"]
    assert kinds(stage.image("s", make_image(0))) == ["accepted"]
    assert stage.restarted(serve_config, fake_session).broker.status().sessions[0].n_accepted == 1


def test_an_opening_that_the_disk_refused_may_be_tried_again(stage, opening, monkeypatch, kinds):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr("os.pwritev", full)
        (refused,) = stage.say(opening)
    assert refused.code == "disk"
    assert kinds(stage.say(opening)) == ["opened"]


def test_a_clock_that_jumped_while_the_service_was_down_costs_no_session(stage, opening, make_image, serve_config, fake_session):
    stage.say(opening)
    stage.image("s", make_image(0))
    os.utime(serve_config.data_dir / "s" / "journal", (0, 0))
    second = stage.restarted(serve_config, fake_session)
    assert second.broker.status().sessions[0].n_accepted == 1
    second.tick(13 * 3600.0)
    second.work()
    assert second.broker.status().sessions[0].state == "closed"
    second.broker.close()


@pytest.mark.parametrize("name", ["purged", "lock"])
def test_no_session_takes_the_place_of_the_folders_own_files(name, stage, opening, kinds):
    (refused,) = stage.say(opening.model_copy(update={"session_id": name}))
    assert refused.code == "conflict"
    assert kinds(stage.say(opening)) == ["opened"]


def numbers_in(path) -> list[int]:
    return [json.loads(line)["sequence_number"] for line in path.read_text().splitlines()]


def test_decisions_that_a_full_disk_kept_out_come_with_the_next_one(stage, opening, make_image, serve_config, monkeypatch):
    stage.say(opening)
    path = serve_config.data_dir / "s" / "decisions.jsonl"
    write = session_folder._append_line
    for repetition in range(4):
        full = repetition in (1, 2)
        monkeypatch.setattr(session_folder, "_append_line", lambda path, line, full=full: not full and write(path, line))
        stage.image("s", make_image(repetition))
        stage.work()
    assert numbers_in(path) == [0, 1, 2, 3]
    assert stage.broker.status().sessions[0].n_decisions == 4


def test_a_line_that_does_not_fit_leaves_nothing_behind(tmp_path):
    """A device that is full takes nothing; what was there before stays."""
    folder = session_folder.SessionFolder(tmp_path)
    (tmp_path / "decisions.jsonl").symlink_to("/dev/full")
    assert not folder.write_decision("{}")
    (tmp_path / "decisions.jsonl").unlink()
    assert folder.write_decision('{"sequence_number": 0}')
    assert numbers_in(folder.decisions) == [0]


def test_of_a_line_that_fits_in_half_nothing_stays(tmp_path):
    """The system takes the bytes up to its limit, and says how many."""
    folder = session_folder.SessionFolder(tmp_path)
    assert folder.write_decision('{"sequence_number": 0}')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (folder.decisions.stat().st_size + 5, hard))
        assert not folder.write_decision('{"sequence_number": 1}')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert numbers_in(folder.decisions) == [0]
    assert folder.write_decision('{"sequence_number": 1}')
    assert numbers_in(folder.decisions) == [0, 1]


def test_a_closing_note_is_whole_or_not_there(tmp_path):
    folder = session_folder.SessionFolder(tmp_path)
    assert folder.read_closed() is None
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
        folder.write_closed({"n_images": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert folder.read_closed() is None
    assert folder.is_free
    folder.write_closed({"n_images": 3})
    assert folder.read_closed() == {"n_images": 3}
    assert [file.name for file in tmp_path.iterdir()] == [folder.closed.name]


def test_a_session_whose_closing_note_was_damaged_stays_closed(stage, opening, make_image, serve_config, fake_session):
    stage.say(opening)
    stage.image("s", make_image(0))
    stage.say(Close(session_id="s"))
    stage.work()
    folder = session_folder.SessionFolder(serve_config.data_dir / "s")
    assert folder.read_closed()
    folder.closed.write_text(folder.closed.read_text()[:20])
    second = stage.restarted(serve_config, fake_session)
    (answer,) = second.say(Close(session_id="s"))
    assert (answer.kind, answer.summary) == ("closed", {})
    (refused,) = second.say(opening)
    assert refused.code == "closed"
    second.broker.close()


@pytest.mark.parametrize("spoiled", ['{"sequence_number": 1, "act{"sequence_number": 2}\n', '{"sequence_number": 7}\n', "[]\n"])
def test_spoiled_decisions_are_written_again_from_the_journal(spoiled, stage, opening, make_image, serve_config, fake_session):
    stage.say(opening)
    for repetition in range(3):
        stage.image("s", make_image(repetition))
    stage.work()
    path = serve_config.data_dir / "s" / "decisions.jsonl"
    whole = path.read_text()
    path.write_text(whole.splitlines(keepends=True)[0] + spoiled)
    second = stage.restarted(serve_config, fake_session)
    second.work()
    assert path.read_text() == whole
    second.broker.close()


def test_what_may_not_be_looked_into_keeps_no_service_from_starting(stage, opening, serve_config, fake_session, monkeypatch, caplog):
    stage.say(opening)
    (serve_config.data_dir / "lost+found").mkdir()
    is_file = Path.is_file

    def guarded(self) -> bool:
        if self.parent.name == "lost+found":
            raise PermissionError(13, "Permission denied", str(self))
        return is_file(self)

    monkeypatch.setattr(Path, "is_file", guarded)
    second = stage.restarted(serve_config, fake_session)
    assert [session.session_id for session in second.broker.status().sessions] == ["s"]
    assert "lost+found" in caplog.text
    second.broker.close()


def test_a_close_whose_answer_was_lost_is_answered_after_a_restart(stage, opening, make_image, serve_config, fake_session):
    stage.say(opening)
    stage.image("s", make_image(0))
    stage.work()
    stage.say(Close(session_id="s"))
    (first,) = [message for message in stage.work() if message.kind == "closed"]
    second = stage.restarted(serve_config, fake_session)
    (again,) = second.say(Close(session_id="s"))
    assert (again.kind, again.summary) == ("closed", first.summary)
    assert second.say(Close(session_id="other"))[0].code == "unknown-session"
    second.broker.close()


def test_a_decision_is_written_once_although_it_is_computed_again(stage, opening, make_image, serve_config, fake_session):
    stage.say(opening)
    stage.image("s", make_image(0))
    stage.work()
    with open(serve_config.data_dir / "s" / "decisions.jsonl", "a") as file:
        file.write('{"torn')
    second = stage.restarted(serve_config, fake_session)
    second.work()
    second.image("s", make_image(1))
    second.work()
    assert (serve_config.data_dir / "s" / "decisions.jsonl").read_text().count("\n") == 2
    second.broker.close()
