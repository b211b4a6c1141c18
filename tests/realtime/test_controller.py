"""The controller's library: what a sequence is told, in the good case and in all others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from scansteer.realtime.client import Client
from scansteer.realtime.connection import RefusedError
from scansteer.realtime.controller import Controller
from scansteer.realtime.messages import CommandOutcome, Decision, Pulse, SuggestedPulse

SUGGESTION = SuggestedPulse(b1_ut=1.0, offset_ppm=2.0, t_sat_s=1.0, t_rec_s=1.0, expected_gain=0.5)
OTHER_PULSE = Pulse(b1_ut=1.5, offset_ppm=3.0, t_sat_s=2.0, t_rec_s=1.0)


@pytest.fixture
def suggesting_session(fake_session):
    """Suggests a pulse after every image, and says stop from the fourth on."""

    class Suggesting(fake_session):
        def absorb(self, frame, **options) -> Decision:
            decision = super().absorb(frame, **options)
            stop = decision.n_images >= 4
            return decision.model_copy(update={"next_pulse": SUGGESTION, "action": "stop" if stop else "continue"})

    return Suggesting


@pytest.fixture
def running(serve_config, run_service, suggesting_session):
    return run_service(serve_config, suggesting_session)


@pytest.fixture
def scanner(running, scan) -> Iterator[Client]:
    with Client(running.endpoint) as client:
        client.open(scan, "s")
        client.wait_ready("s")
        yield client


@pytest.fixture
def control(running, scanner) -> Iterator[Callable[..., Controller]]:
    controllers: list[Controller] = []

    def start(**options) -> Controller:
        controller = Controller("s", running.endpoint, heartbeat_s=0.1, **options)
        controllers.append(controller)
        assert controller.wait_connected(5)
        return controller

    yield start
    for controller in controllers:
        controller.close(0.5)


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def outcome_of(operator: Client) -> CommandOutcome:
    message = operator.receive(5)
    while not isinstance(message, CommandOutcome):
        assert message is not None
        message = operator.receive(5)
    return message


def audit(serve_config) -> str:
    return (serve_config.data_dir / "s" / "audit.jsonl").read_text()


def test_advice_only_shows_decisions_and_obeys_none(control, scanner, make_image, scan):
    controller = control()
    for repetition in range(5):
        advice = controller.advise(repetition, 5)
        assert (advice.action, advice.pulse) == ("continue", None)
        assert repetition == 0 or advice.decision.repetition == repetition - 1
        controller.played(repetition, OTHER_PULSE)
        scanner.send_image("s", make_image(repetition))


def test_an_acting_controller_plays_the_suggestion_and_stops(control, scanner, make_image, serve_config):
    controller = control(mode="acting")
    repetition, advice = 0, controller.advise(0, 5)
    while advice.action == "continue":
        assert advice.pulse == (SUGGESTION if repetition else None)
        controller.played(repetition, advice.pulse or OTHER_PULSE)
        scanner.send_image("s", make_image(repetition))
        repetition += 1
        advice = controller.advise(repetition, 5)
    assert (advice.action, repetition) == ("stop", 4)
    wait_until(lambda: audit(serve_config).count('"outcome": "obeyed"') == 4)


def test_what_was_really_played_is_what_the_posterior_gets(serve_config, run_service, fake_session, scan, make_image):
    pulses = []

    class Recording(fake_session):
        def absorb(self, frame, *, pulse=None, **options):
            pulses.append(pulse)
            return super().absorb(frame, pulse=pulse, **options)

    running = run_service(serve_config, Recording)
    with Client(running.endpoint) as scanner:
        scanner.open(scan, "s")
        with Controller("s", running.endpoint, mode="acting", heartbeat_s=0.1) as controller:
            assert controller.wait_connected(5)
            scanner.send_image("s", make_image(0))
            assert controller.advise(1, 0.1).is_fallback  # the image waits for the report
            assert pulses == []
            controller.played(0, OTHER_PULSE)
            assert not controller.advise(1, 5).is_fallback
    assert [pulse.model_dump() for pulse in pulses] == [OTHER_PULSE.model_dump()]


def test_a_pulse_that_the_sequence_refuses_is_not_played_and_said(control, scanner, make_image, serve_config):
    controller = control(mode="acting", refuse=lambda pulse: "The amplifier is warm.")
    controller.played(0, OTHER_PULSE)
    scanner.send_image("s", make_image(0))
    advice = controller.advise(1, 5)
    assert (advice.action, advice.pulse, advice.reason) == ("continue", None, "The amplifier is warm.")
    wait_until(lambda: '"outcome": "refused", "reason": "The amplifier is warm."' in audit(serve_config))


def test_a_decision_that_is_no_longer_valid_is_not_obeyed(control, scanner, make_image, serve_config):
    controller = control(mode="acting")
    controller.played(0, OTHER_PULSE)
    scanner.send_image("s", make_image(0))
    assert controller.advise(1, 5).pulse == SUGGESTION
    advice = controller.advise(2, 0.1)  # the decision of image 0 is void once repetition 1 has begun
    assert (advice.action, advice.pulse, advice.is_fallback) == ("continue", None, True)


def test_without_a_service_the_schedule_is_played_at_once(tmp_path):
    with Controller("s", f"ipc://{tmp_path}/nobody", mode="acting", heartbeat_s=0.05) as controller:
        started = time.monotonic()
        advice = controller.advise(3, 30)
        assert time.monotonic() - started < 5  # it did not wait for the deadline
        assert (advice.action, advice.pulse, advice.is_fallback) == ("continue", None, True)
        assert "silent" in advice.reason


def test_a_restarted_service_is_found_again_and_nothing_is_lost(serve_config, run_service, scan, make_image, tmp_path):
    fixed = serve_config.model_copy(update={"endpoint": f"ipc://{tmp_path}/service"})
    running = run_service(fixed)
    with Client(fixed.endpoint) as scanner, Controller("s", fixed.endpoint, mode="acting", heartbeat_s=0.1) as controller:
        scanner.open(scan, "s")
        assert controller.wait_connected(5)
        controller.played(0, OTHER_PULSE)
        scanner.send_image("s", make_image(0))
        assert controller.advise(1, 5).decision.repetition == 0
        running.stop()
        controller.played(1, OTHER_PULSE)  # nobody listens now
        run_service(fixed)
        scanner.send_image("s", make_image(1), timeout_s=10)
        assert controller.advise(2, 10).decision.repetition == 1
        assert controller.n_unreported == 0


@pytest.mark.parametrize("command", ["stop", "abort", "pause"])
def test_the_operators_commands_are_obeyed_and_confirmed(control, scanner, command, running):
    heard: list[str] = []
    controller = control(on_command=heard.append)
    with Client(running.endpoint) as operator:
        command_id = operator.control("s", command)
        wait_until(lambda: heard == [command])
        assert controller.advise(7, 0.1).action == command
        outcome = outcome_of(operator)
        assert (outcome.command_id, outcome.outcome) == (command_id, "done")


def test_a_callback_that_fails_ends_neither_scan_nor_connection(control, scanner, make_image, serve_config, scan, running):
    def fail(_):
        raise ZeroDivisionError

    controller = control(mode="acting", refuse=fail, on_command=fail)
    controller.played(0, scan.schedule[0])
    scanner.send_image("s", make_image(0))
    advice = controller.advise(1, 5)
    assert (advice.action, advice.pulse) == ("continue", None)
    wait_until(lambda: "could not be judged: ZeroDivisionError" in audit(serve_config))
    with Client(running.endpoint) as operator:
        operator.control("s", "stop")
        wait_until(lambda: controller.advise(1, 0.1).action == "stop")
        assert outcome_of(operator).outcome == "done"


def test_a_paused_scan_goes_on_after_resume(control, scanner, running):
    heard: list[str] = []
    controller = control(on_command=heard.append)
    with Client(running.endpoint) as operator:
        operator.control("s", "pause")
        wait_until(lambda: heard == ["pause"])
        assert controller.advise(3, 5).action == "pause"
        started = time.monotonic()
        assert controller.advise(3, 0.2).action == "pause"
        assert time.monotonic() - started >= 0.2  # it waits for the end of the pause
        assert operator.session_status("s").paused
        operator.control("s", "resume")
        wait_until(lambda: heard == ["pause", "resume"])
        assert controller.advise(3, 0.1).action == "continue"
        assert not operator.session_status("s").paused


def test_a_command_that_nobody_answers_expires(serve_config, run_service, scan):
    running = run_service(serve_config.model_copy(update={"command_expires_s": 0.2}))
    with Client(running.endpoint) as operator:
        operator.open(scan, "s")
        operator.control("s", "stop")
        assert outcome_of(operator).outcome == "expired"


def test_a_recorded_command_sent_again_changes_nothing(control, scanner, running):
    heard: list[str] = []
    control(on_command=heard.append)
    with Client(running.endpoint) as operator:
        operator.control("s", "pause", command_id="first")
        operator.control("s", "resume", command_id="second")
        operator.control("s", "pause", command_id="first")
        assert not operator.session_status("s").paused


def test_only_one_controller_acts(control, scanner, running):
    control(mode="acting")
    with Client(running.endpoint) as second, pytest.raises(RefusedError, match="Another controller is acting"):
        second.subscribe("s", mode="acting")


def test_a_controller_that_falls_silent_makes_room(serve_config, run_service, scan):
    running = run_service(serve_config.model_copy(update={"controller_timeout_s": 0.2}))
    with Client(running.endpoint) as client:
        client.open(scan, "s")
        first = Client(running.endpoint)
        first.subscribe("s", mode="acting")
        first.disconnect()

        def admitted() -> bool:
            try:
                client.subscribe("s", mode="acting")
            except RefusedError:
                return False
            return True

        wait_until(admitted)


def test_an_image_can_be_excluded_by_the_operator(scanner, make_image):
    scanner.subscribe("s")
    for repetition in range(3):
        scanner.send_image("s", make_image(repetition))
    decisions = [scanner.next_decision(5) for _ in range(3)]
    scanner.control("s", "exclude", repetition=1)
    after = scanner.next_decision(5)
    assert (after.sequence_number, after.repetition, after.n_images) == (3, 2, 2)
    assert after.reason != decisions[2].reason
    assert "repetition 1 was excluded" in after.warnings[-1]


def test_a_report_that_differs_from_what_was_assumed_corrects_the_posterior(scanner, make_image, scan):
    scanner.subscribe("s")
    scanner.send_image("s", make_image(0))
    first = scanner.next_decision(5)
    scanner.played("s", 0, OTHER_PULSE)
    corrected = scanner.next_decision(5)
    assert corrected.repetition == 0
    assert corrected.reason != first.reason
    with pytest.raises(RefusedError, match="otherwise before"):
        scanner.played("s", 0, SUGGESTION)


def test_taking_the_role_away_lets_images_go_on_without_reports(control, scanner, make_image):
    control(mode="acting")
    scanner.send_image("s", make_image(0))
    assert scanner.session_status("s").waiting == 1
    scanner.control("s", "advice")
    wait_until(lambda: scanner.session_status("s").n_decisions == 1)
    with pytest.raises(RefusedError, match="advice only"):
        scanner.subscribe("s", mode="acting")


def test_a_report_that_met_a_mistake_of_the_service_is_sent_again(control, scanner, make_image, scan, running, monkeypatch):
    steering = running.server.broker._steering
    really_played, calls = steering.played, []

    def fail_once(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise ZeroDivisionError
        return really_played(*arguments)

    monkeypatch.setattr(steering, "played", fail_once)
    controller = control()
    controller.played(0, scan.schedule[0])
    wait_until(lambda: controller.n_unreported == 0)
    assert len(calls) == 2
    assert running.server.broker.sessions.get("s").sequencer.played(0) is not None


def test_a_deadline_makes_the_margin_known(control, scanner, make_image):
    controller = control()
    controller.played(0, OTHER_PULSE, next_pulse_in_ms=500.0)
    scanner.send_image("s", make_image(0))
    assert controller.advise(1, 5).decision.margin_ms is not None
