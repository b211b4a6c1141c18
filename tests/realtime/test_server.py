"""The service over real sockets on loopback."""

from __future__ import annotations

import contextlib
import json
import time

import numpy as np
import pytest
import zmq

from scansteer.core.errors import InputError, ScansteerError
from scansteer.realtime.client import Client
from scansteer.realtime.codec import encode
from scansteer.realtime.config import Limits, ServeConfig
from scansteer.realtime.connection import RefusedError, ServiceSilentError
from scansteer.realtime.messages import Gap, GetMaps, Unusable
from scansteer.realtime.server import Server
from scansteer.realtime.watcher import Watcher


def decisions_of(client: Client, count: int) -> list:
    found = []
    for _ in range(count):
        decision = client.next_decision(5)
        assert decision is not None
        client.acknowledge(decision)
        found.append(decision)
    return found


def receive_kind(client: Client, kind: type, timeout_s: float = 5.0):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        message = client.receive(0.1)
        if isinstance(message, kind):
            return message
    raise AssertionError(f"no {kind.__name__} came")


def test_every_image_is_accepted_and_answered_with_a_decision(client, scan, make_image):
    session_id = client.open(scan)
    client.wait_ready(session_id)
    client.subscribe(session_id)
    accepted = [client.send_image(session_id, make_image(repetition)) for repetition in range(5)]
    assert [answer.repetition for answer in accepted] == [0, 1, 2, 3, 4]
    assert len({answer.sequence_number for answer in accepted}) == 5
    decisions = decisions_of(client, 5)
    assert [decision.repetition for decision in decisions] == [0, 1, 2, 3, 4]
    assert [decision.sequence_number for decision in decisions] == [0, 1, 2, 3, 4]


def test_a_watcher_sees_the_decisions_of_its_session(service, client, scan, make_image):
    with Watcher(service.publish_endpoint, session_id="watched") as watcher:
        client.open(scan, "watched")
        client.open(scan, "other")
        decision, repetition = None, 0
        while decision is None:  # a subscription takes a moment to arrive, and PUB sends nothing twice
            client.send_image("other", make_image(repetition))
            client.send_image("watched", make_image(repetition))
            decision, repetition = watcher.next_decision(0.1), repetition + 1
        assert decision.session_id == "watched"


def test_a_late_joiner_gets_the_last_decision_and_a_controller_those_it_has_not_seen(client, connect, scan, make_image):
    client.open(scan, "s")
    client.subscribe("s")
    for repetition in range(4):
        client.send_image("s", make_image(repetition))
    decisions = decisions_of(client, 4)
    late = connect()
    assert late.last_decision("s") == decisions[-1]
    late.subscribe("s", last_decision=1)
    assert decisions_of(late, 2) == decisions[2:]


def test_an_image_sent_again_is_answered_the_same_and_counted_once(client, scan, make_image):
    client.open(scan, "s")
    first = client.send_image("s", make_image(0))
    again = client.send_image("s", make_image(0))
    assert (again.sequence_number, again.duplicate) == (first.sequence_number, True)
    assert client.session_status("s").n_accepted == 1


def test_another_image_under_the_same_identity_is_refused(client, scan, make_image):
    client.open(scan, "s")
    client.send_image("s", make_image(0))
    with pytest.raises(RefusedError, match="never replaced") as caught:
        client.send_image("s", make_image(0, seed=99))
    assert caught.value.code == "conflict"


def test_images_out_of_order_are_put_in_order(client, scan, make_image):
    client.open(scan, "s")
    client.subscribe("s")
    for repetition in (2, 0, 1):
        client.send_image("s", make_image(repetition))
    assert [decision.repetition for decision in decisions_of(client, 3)] == [0, 1, 2]


def test_a_gap_is_asked_for_and_filled(client, scan, make_image):
    client.open(scan, "s")
    client.subscribe("s")
    client.send_image("s", make_image(0))
    client.send_image("s", make_image(3))
    assert receive_kind(client, Gap).repetitions == (1, 2)
    for repetition in (1, 2):
        client.send_image("s", make_image(repetition))
    decision = None
    while decision is None or decision.repetition < 3:
        decision = client.next_decision(5)
    assert decision.n_images == 4


def test_a_repetition_declared_missing_is_skipped_but_its_pulse_counts(client, scan, make_image):
    client.open(scan, "s")
    client.subscribe("s")
    client.send_image("s", make_image(0))
    client.send_image("s", make_image(2))
    client.declare_missing("s", [1])
    decisions = decisions_of(client, 2)
    assert [(decision.repetition, decision.n_images) for decision in decisions] == [(0, 1), (2, 2)]


def test_an_image_that_cannot_be_used_costs_only_itself(client, scan, make_image):
    from scansteer.realtime.images import image_message

    client.open(scan, "s")
    client.subscribe("s")
    client.send_image("s", image_message(np.full((1, 5, 4), np.nan, np.float32), repetition=0))
    assert "not finite" in receive_kind(client, Unusable).reason
    client.send_image("s", make_image(1))
    assert decisions_of(client, 1)[0].repetition == 1


def test_maps_come_as_arrays(client, scan, make_image):
    client.open(scan, "s")
    for repetition in range(3):
        client.send_image("s", make_image(repetition))
    maps = client.maps("s")
    assert set(maps) == {"fs_map", "fs_lower", "fs_upper", "nrmse"}
    np.testing.assert_array_equal(maps["fs_map"], np.full((1, 5, 4), 3, np.float32))


def test_maps_before_the_first_image_are_refused(client, scan):
    client.open(scan, "s")
    with pytest.raises(RefusedError, match="no map before"):
        client.maps("s")


def test_closing_gives_the_summary_and_ends_the_session(client, scan, make_image, serve_config):
    client.open(scan, "s")
    for repetition in range(3):
        client.send_image("s", make_image(repetition))
    summary = client.close_session("s")
    assert summary["n_images"] == 3
    assert client.close_session("s") == summary
    with pytest.raises(RefusedError, match="closed"):
        client.send_image("s", make_image(3))
    assert json.loads((serve_config.data_dir / "s" / "closed.json").read_text())["summary"] == summary


def test_opening_twice_is_one_session_and_with_another_scan_refused(client, scan):
    client.open(scan, "s")
    client.open(scan, "s")
    with pytest.raises(RefusedError, match="another scan"):
        client.open(scan.model_copy(update={"description": "another"}), "s")


def test_unknown_sessions_are_named(client, make_image):
    with pytest.raises(RefusedError, match="no session nowhere") as caught:
        client.send_image("nowhere", make_image(0))
    assert caught.value.code == "unknown-session"


def test_metrics_status_and_ping_are_answered(service, client, scan, make_image):
    client.open(scan, "s")
    client.wait_ready("s")
    client.send_image("s", make_image(0))
    assert "scansteer_images_total 1" in client.metrics()
    status = client.status()
    assert status.ready
    assert status.sessions[0].session_id == "s"
    pong = client.ping()
    assert (pong.service_id, pong.publish_endpoint) == (status.service_id, service.publish_endpoint)


def test_two_sessions_do_not_mix(client, connect, scan, make_image):
    other = connect()
    client.open(scan, "a")
    other.open(scan, "b")
    client.subscribe("a")
    other.subscribe("b")
    for repetition in range(3):
        client.send_image("a", make_image(repetition))
        other.send_image("b", make_image(repetition, seed=50 + repetition))
    mine, theirs = decisions_of(client, 3), decisions_of(other, 3)
    assert {decision.session_id for decision in mine} == {"a"}
    assert [decision.reason for decision in mine] != [decision.reason for decision in theirs]


def test_images_can_be_posted_ahead_of_their_answers(client, scan, make_image):
    client.open(scan, "s")
    numbers = [client.post_image("s", make_image(repetition)) for repetition in range(20)]
    assert [client.collect(number).repetition for number in numbers] == list(range(20))


def test_a_client_of_an_absent_service_gives_up_in_time(tmp_path):
    absent = f"ipc://{tmp_path}/nobody"
    with Client(absent, timeout_s=0.2) as client, pytest.raises(ServiceSilentError, match="approved schedule"):
        client.ping()


def test_a_session_goes_on_after_a_restart_with_equal_decisions(serve_config, run_service, scan, make_image, tmp_path):
    undisturbed = run_service(serve_config.model_copy(update={"data_dir": tmp_path / "other"}))
    with Client(undisturbed.endpoint) as client:
        client.open(scan, "s")
        client.subscribe("s")
        for repetition in range(6):
            client.send_image("s", make_image(repetition))
        expected = decisions_of(client, 6)
    first = run_service(serve_config)
    with Client(first.endpoint) as client:
        client.open(scan, "s")
        for repetition in range(3):
            client.send_image("s", make_image(repetition))
    first.stop()
    second = run_service(serve_config)
    with Client(second.endpoint) as client:
        assert client.send_image("s", make_image(2)).duplicate
        client.subscribe("s")
        for repetition in range(3, 6):
            client.send_image("s", make_image(repetition))
        assert decisions_of(client, 6) == expected
    lines = (serve_config.data_dir / "s" / "decisions.jsonl").read_text().splitlines()
    assert [json.loads(line)["sequence_number"] for line in lines] == list(range(6))


def test_a_second_service_on_the_same_folder_does_not_start(service, serve_config, fake_session):
    with pytest.raises(ScansteerError, match="Another service"):
        Server(serve_config, fake_session)


def test_a_port_in_use_is_named(service, serve_config, fake_session, tmp_path):
    config = serve_config.model_copy(update={"endpoint": service.endpoint, "data_dir": tmp_path / "x"})
    with pytest.raises(InputError, match="Cannot listen"):
        Server(config, fake_session)


def test_an_open_address_without_keys_does_not_start(fake_session, tmp_path):
    with pytest.raises(InputError, match="can be reached by others"):
        Server(ServeConfig(endpoint="tcp://0.0.0.0:9010", data_dir=tmp_path), fake_session)


def test_raw_garbage_is_refused_and_the_service_lives_on(service, client):
    with zmq.Context.instance().socket(zmq.DEALER) as stranger:
        stranger.linger = 0
        stranger.connect(service.endpoint)
        for frames in ([b""], [b"\x00" * 100], [b"\xff"] * 200, [b"{}"], [b"\x81\xa8protocol\x01"]):
            stranger.send_multipart(frames)
            assert stranger.poll(5000)
            assert b"refused" in stranger.recv_multipart()[0]
    assert client.ping()


def test_a_peer_that_asks_for_maps_and_never_reads_is_not_sent_any_number(serve_config, run_service, scan, make_image):
    service = run_service(serve_config.model_copy(update={"limits": Limits(max_unread_bytes=2**23)}))
    with Client(service.endpoint) as client, raw_socket(zmq.DEALER, service.endpoint) as deaf:
        client.open(scan, "s")
        client.send_image("s", make_image(0, shape=(1, 512, 512)))
        refusals, asked = service.server.broker.metrics.refusals, 0
        while not refusals["busy"]:
            asked += 1
            assert asked < 100
            deaf.send_multipart(encode(GetMaps(session_id="s", request_id=asked)))
            assert client.maps("s")["fs_map"].shape == (1, 512, 512)
        waiting = [n_bytes for unread in list(service.server._unread.values()) for _, n_bytes in unread]
    assert 0 < sum(waiting) <= 2**24  # those of the peer that reads are perhaps not written off yet


def test_a_watcher_that_never_reads_costs_nobody_else_anything(run_service, serve_config, fake_session, tmp_path, scan, make_image):
    class Wordy(fake_session):
        def absorb(self, frame, **options):
            return super().absorb(frame, **options).model_copy(update={"reason": 900 * "x"})

    addresses = {"endpoint": f"ipc://{tmp_path}/service", "publish_endpoint": f"ipc://{tmp_path}/publish"}
    service = run_service(serve_config.model_copy(update={**addresses, "limits": Limits(max_queue=50)}), Wordy)
    with raw_socket(zmq.SUB, service.publish_endpoint) as deaf, Client(service.endpoint) as client, Client(service.endpoint) as controller:
        deaf.subscribe("")
        deaf.poll(100)
        client.open(scan, "s")
        controller.subscribe("s")
        n_decided = 0
        for repetition in range(600):
            client.send_image("s", make_image(repetition))
            n_decided += len(decisions_of(controller, 1))
        assert n_decided == 600
        n_heard = 0
        while deaf.poll(200):
            deaf.recv_multipart()
            n_heard += 1
    assert 0 < n_heard < 600  # its queue was full, and what came then was dropped


@contextlib.contextmanager
def raw_socket(kind: int, endpoint: str):
    """A peer whose queue is full at once."""
    socket = zmq.Context.instance().socket(kind)
    socket.linger, socket.rcvhwm, socket.rcvbuf = 0, 1, 4096
    socket.connect(endpoint)
    try:
        yield socket
    finally:
        socket.close(0)
