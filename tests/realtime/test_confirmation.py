"""A stop that waits for the operator, from the command on the wire to the decision that goes back."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from scansteer.core.errors import InputError
from scansteer.protocols.larg_phantom import PUBLISHED
from scansteer.protocols.scan import Scan
from scansteer.realtime.client import Client
from scansteer.realtime.connection import RefusedError
from scansteer.realtime.journal import Entry
from scansteer.realtime.messages import Decision
from scansteer.realtime.order import Step
from scansteer.realtime.worker import Actor, Decided, Setup, Warned


def proposing(fake_session: type) -> Callable[[Setup], object]:
    """Sessions that propose a stop after every second image."""

    class Proposing(fake_session):  # type: ignore[misc, valid-type]
        last: Decision | None = None

        def absorb(self, *args, **kwargs) -> Decision:
            decision = super().absorb(*args, **kwargs)
            self.last = decision.model_copy(update={"cause": "operator" if decision.n_images % 2 == 0 else "target"})
            return self.last

        def confirm_stop(self) -> Decision:
            if self.last is None or self.last.cause != "operator":
                raise InputError("There is no stop to confirm.")
            return self.last.model_copy(update={"action": "stop"})

    return Proposing


@pytest.fixture
def scan(scan: Scan) -> Scan:
    return scan.model_copy(update={"stop": scan.stop.model_copy(update={"operator_confirmation": True})})


@pytest.fixture
def opened(serve_config, run_service, fake_session, scan):
    service = run_service(serve_config, proposing(fake_session))
    with Client(service.endpoint) as client:
        session_id = client.open(scan)
        client.wait_ready(session_id)
        client.subscribe(session_id)
        yield client, session_id


def given(client: Client) -> Decision:
    decision = client.next_decision(5)
    assert decision is not None
    client.acknowledge(decision)
    return decision


def test_the_confirmed_decision_comes_again_as_a_stop(opened, make_image):
    client, session_id = opened
    for repetition in range(2):
        client.send_image(session_id, make_image(repetition))
    proposed = [given(client) for _ in range(2)][-1]
    client.control(session_id, "confirm", decision=proposed.sequence_number)
    confirmed = given(client)
    assert (proposed.action, confirmed.action) == ("continue", "stop")
    assert (confirmed.sequence_number, confirmed.repetition) == (proposed.sequence_number + 1, proposed.repetition)


def test_a_confirmation_names_the_decision_that_the_operator_saw(opened, make_image):
    client, session_id = opened
    for repetition in range(4):
        client.send_image(session_id, make_image(repetition))
    proposals = [decision for decision in (given(client) for _ in range(4)) if decision.cause == "operator"]
    with pytest.raises(RefusedError, match="Decision 1 cannot be confirmed: the latest is 3"):
        client.control(session_id, "confirm", decision=proposals[0].sequence_number)
    client.control(session_id, "confirm")  # as older clients say it
    assert given(client).action == "stop"


def test_a_confirmation_that_a_later_decision_overtakes_has_no_effect(make_image, scan, fake_session):
    actor = Actor(Setup("s", scan), lambda entry: [b"", make_image(entry.sequence)], proposing(fake_session), 1000)
    actor.build({})
    for repetition in range(2):
        actor.absorb(Step(repetition, (Entry(repetition, 0, (), ()),), None), 0.0, None)
    assert [type(event) for event in actor.confirm_stop(0)] == [Warned]
    (event,) = actor.confirm_stop(1)
    assert isinstance(event, Decided)
    assert event.decision.action == "stop"


def test_only_a_confirmation_names_a_decision(opened):
    client, session_id = opened
    with pytest.raises(ValueError, match="decision is given with the command confirm only"):
        client.control(session_id, "pause", decision=1)


def test_a_confirmation_without_a_proposal_changes_nothing_and_is_said(opened, make_image):
    client, session_id = opened
    client.send_image(session_id, make_image(0))
    given(client)
    client.control(session_id, "confirm")
    client.send_image(session_id, make_image(1))
    following = given(client)
    assert (following.action, following.sequence_number) == ("continue", 1)
    assert client.session_status(session_id).warnings == ("There is no stop to confirm.",)


def test_a_scan_that_asks_for_no_confirmation_refuses_one(service, make_image):
    with Client(service.endpoint) as client:
        session_id = client.open(PUBLISHED)
        client.wait_ready(session_id)
        client.subscribe(session_id)
        client.send_image(session_id, make_image(0))
        latest = given(client)
        for decision in (None, latest.sequence_number):
            with pytest.raises(RefusedError, match=r"no stop to confirm: scan 'larg-phantom-9\.4T' asks for none") as refused:
                client.control(session_id, "confirm", decision=decision)
            assert refused.value.code == "conflict"
        client.control(session_id, "pause")
        assert client.session_status(session_id).warnings == ()
