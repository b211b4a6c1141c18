"""A client that takes part in a session stays in it, or learns that it does not."""

from __future__ import annotations

import time

import pytest

from scansteer.core.errors import InputError
from scansteer.realtime import client as client_module
from scansteer.realtime.client import Client
from scansteer.realtime.connection import RefusedError
from scansteer.realtime.controller import Controller


@pytest.fixture
def forgetful(serve_config, run_service):
    """A service that forgets a controller soon."""
    return run_service(serve_config.model_copy(update={"controller_timeout_s": 0.3}))


def wait_until_alone(client: Client, session_id: str) -> None:
    """Return when the session has no controller any more."""
    deadline = time.monotonic() + 10
    while client.session_status(session_id).controllers and time.monotonic() < deadline:
        client.receive(0.02)
    assert client.session_status(session_id).controllers == 0


@pytest.mark.parametrize(
    "ask",
    [
        lambda client, scan: client.open(scan, "../x"),
        lambda client, scan: client.open(scan, "s", n_slices=0),
        lambda client, scan: client.maps("a b"),
        lambda client, scan: client.last_decision(""),
        lambda client, scan: client.close_session("x" * 10_000),
        lambda client, scan: client.declare_missing("s", []),
        lambda client, scan: client.control("s", "dance"),
        lambda client, scan: client.control("s", "exclude"),
        lambda client, scan: client.subscribe("s", mode="driving"),
        lambda client, scan: client.played("s", 0, scan.schedule[0].model_copy(update={"b1_ut": -1.0})),
        lambda client, scan: client.send_image("ü", bytes(300)),
        lambda client, scan: Controller("../x"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_sentence(scan, ask):
    with Client("tcp://127.0.0.1:9") as client, pytest.raises(InputError, match=r"^[^\n]*(field|repetition) [^\n]*\.$") as caught:
        ask(client, scan)
    assert len(str(caught.value)) < 400


def test_a_client_that_was_forgotten_takes_part_again_and_gets_what_it_missed(forgetful, scan, make_image, monkeypatch):
    monkeypatch.setattr(client_module, "_HEARTBEAT_S", 0.02)
    with Client(forgetful.endpoint) as sender, Client(forgetful.endpoint) as listener:
        sender.open(scan, "s")
        listener.subscribe("s")
        wait_until_alone(sender, "s")
        for repetition in range(3):
            sender.send_image("s", make_image(repetition))
        numbers = set()
        while len(numbers) < 3:
            decision = listener.next_decision(10)
            assert decision is not None
            numbers.add(decision.sequence_number)
            listener.acknowledge(decision)
        assert numbers == {0, 1, 2}


def test_a_client_that_waits_is_not_forgotten(forgetful, scan, make_image, monkeypatch):
    monkeypatch.setattr(client_module, "_HEARTBEAT_S", 0.02)
    with Client(forgetful.endpoint) as sender, Client(forgetful.endpoint) as listener:
        sender.open(scan, "s")
        listener.subscribe("s")
        assert listener.next_decision(0.8) is None
        assert sender.session_status("s").controllers == 1


def test_a_client_whose_role_was_taken_is_told(forgetful, scan, monkeypatch):
    with Client(forgetful.endpoint) as slow, Client(forgetful.endpoint) as quick:
        slow.open(scan, "s")
        slow.subscribe("s", mode="acting")
        wait_until_alone(quick, "s")
        monkeypatch.setattr(client_module, "_HEARTBEAT_S", 0.02)
        quick.subscribe("s", mode="acting")
        with pytest.raises(RefusedError, match="Another controller is acting"):
            while True:
                quick.receive(0.02)
                slow.next_decision(0.02)
        assert slow.next_decision(0.02) is None


def test_a_line_that_drops_does_not_cost_the_acting_role(service, client, connect, scan, make_image, monkeypatch):
    monkeypatch.setattr(client_module, "_HEARTBEAT_S", 0.02)
    acting = connect()
    client.open(scan, "s")
    acting.subscribe("s", mode="acting")
    acting._socket.disconnect(service.endpoint)
    acting._socket.connect(service.endpoint)
    client.send_image("s", make_image(0))
    client.played("s", 0, scan.schedule[0])
    decision = acting.next_decision(3)
    assert decision is not None and decision.repetition == 0
    assert list(acting._subscriptions) == ["s"]
    assert client.session_status("s").controllers == 1


def test_a_session_that_was_closed_asks_for_no_more(forgetful, scan, monkeypatch):
    monkeypatch.setattr(client_module, "_HEARTBEAT_S", 0.02)
    with Client(forgetful.endpoint) as client:
        client.open(scan, "s")
        client.subscribe("s")
        client.close_session("s")
        assert client.next_decision(0.1) is None
        assert client._subscriptions == {}
