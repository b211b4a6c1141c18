"""A stop that waits for the operator, from the command on the wire to the decision that goes back."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from scansteer.core.errors import InputError
from scansteer.realtime.client import Client
from scansteer.realtime.messages import Decision
from scansteer.realtime.worker import Setup


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
    client.control(session_id, "confirm")
    confirmed = given(client)
    assert (proposed.action, confirmed.action) == ("continue", "stop")
    assert (confirmed.sequence_number, confirmed.repetition) == (proposed.sequence_number + 1, proposed.repetition)


def test_a_confirmation_without_a_proposal_changes_nothing_and_is_said(opened, make_image):
    client, session_id = opened
    client.send_image(session_id, make_image(0))
    given(client)
    client.control(session_id, "confirm")
    client.send_image(session_id, make_image(1))
    following = given(client)
    assert (following.action, following.sequence_number) == ("continue", 1)
    assert client.session_status(session_id).warnings == ("There is no stop to confirm.",)
