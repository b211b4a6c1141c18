"""Nothing that passed is lost on its way to the service, wherever the service is."""

from __future__ import annotations

import json
import socket
import threading

import numpy as np
import pytest

from scansteer.realtime import journal
from scansteer.realtime.client import Client
from scansteer.realtime.config import Limits


def test_a_repetition_that_never_comes_is_declared_missing(fire, make_image):
    fire.begin()
    for repetition in (0, 2, 3, 4, 5, 6, 7):
        fire.send_image(make_image(repetition))
    fire.end()
    decision = json.loads(fire.maps()["fs_map"][0].meta["ScansteerDecision"])
    assert (decision["repetition"], decision["n_images"]) == (7, 7)
    assert any("[1] did not come" in said for said in fire.texts)


def test_without_a_service_images_pass_and_close_is_answered(run_gateway, make_image, tmp_path, connect_peer):
    peer = connect_peer(run_gateway(f"ipc://{tmp_path}/nobody"), fire=True)
    images = [make_image(repetition) for repetition in range(5)]
    peer.begin()
    for image in images:
        peer.send_image(image)
    peer.end()
    assert peer.images == images


def test_a_service_that_comes_late_gets_everything(run_gateway, run_service, serve_config, make_image, tmp_path, connect_peer):
    endpoint = f"ipc://{tmp_path}/late"
    peer = connect_peer(run_gateway(endpoint), fire=True)
    peer.begin()
    for repetition in range(3):
        peer.send_image(make_image(repetition))
    while len(peer.images) < 3:
        assert not peer.closed.wait(0.01)
    run_service(serve_config.model_copy(update={"endpoint": endpoint}))
    for repetition in range(3, 6):
        peer.send_image(make_image(repetition))
    peer.end()
    np.testing.assert_array_equal(peer.maps()["fs_map"][0].data, 6)


def test_a_service_that_restarts_within_a_scan_misses_nothing(run_gateway, run_service, serve_config, make_image, tmp_path, connect_peer):
    config = serve_config.model_copy(update={"endpoint": f"ipc://{tmp_path}/restarting"})
    first = run_service(config)
    peer = connect_peer(run_gateway(config.endpoint), fire=True)
    peer.begin()
    for repetition in range(3):
        peer.send_image(make_image(repetition))
    while len(peer.images) < 3:
        assert not peer.closed.wait(0.01)
    first.stop()
    for repetition in range(3, 5):
        peer.send_image(make_image(repetition))
    run_service(config)
    peer.send_image(make_image(5))
    peer.end()
    np.testing.assert_array_equal(peer.maps()["fs_map"][0].data, 6)


def test_a_peer_that_vanishes_leaves_a_closed_session(fire, service, make_image):
    fire.begin()
    fire.send_image(make_image(0))
    while not fire.images:
        assert not fire.closed.wait(0.01)
    fire.socket.shutdown(socket.SHUT_RDWR)
    with Client(service.endpoint) as client:
        while [session.state for session in client.status().sessions] != ["closed"]:
            assert client.receive(0.02) is None


def test_images_that_the_disk_refuses_are_delivered_when_there_is_room(fire, service, make_image, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    fire.begin()
    fire.send_image(make_image(0))
    refusals = service.server.broker.metrics.refusals
    with Client(service.endpoint) as client, monkeypatch.context() as disk:
        while not [session for session in client.status().sessions if session.n_accepted == 1]:
            assert not fire.closed.is_set()
        disk.setattr("os.pwritev", full)
        for repetition in (1, 2):
            fire.send_image(make_image(repetition))
        while not refusals["disk"]:
            assert client.receive(0.01) is None
    fire.end()
    np.testing.assert_array_equal(fire.maps()["fs_map"][0].data, 3)


def test_an_image_that_the_service_has_lost_holds_nothing_up(
    run_gateway, run_service, serve_config, make_image, tmp_path, connect_peer
):
    config = serve_config.model_copy(update={"endpoint": f"ipc://{tmp_path}/damaged"})
    first = run_service(config)
    peer = connect_peer(run_gateway(config.endpoint), fire=True)
    peer.begin()
    for repetition in range(3):
        peer.send_image(make_image(repetition))
    with Client(config.endpoint) as client:
        while not [session for session in client.status().sessions if session.n_accepted == 3]:
            assert not peer.closed.is_set()
    first.stop()
    (path,) = config.data_dir.glob("*/journal")
    content = bytearray(path.read_bytes())
    content[journal.scan(path)[0][2].body_offset + 300] ^= 4  # within the image of repetition 1
    path.write_bytes(content)
    run_service(config)
    for repetition in range(3, 6):
        peer.send_image(make_image(repetition))
    peer.end()
    decision = json.loads(peer.maps()["fs_map"][0].meta["ScansteerDecision"])
    assert (decision["repetition"], decision["n_images"]) == (5, 5)


def test_nothing_is_kept_for_a_session_that_the_service_refused(run_service, run_gateway, serve_config, connect_peer, make_image, scan):
    service = run_service(serve_config.model_copy(update={"limits": Limits(max_sessions=1)}))
    gateway = run_gateway(service.endpoint)
    with Client(service.endpoint) as client:
        client.open(scan, "other")
        peer = connect_peer(gateway, fire=True)
        peer.begin()
        peer.send_image(make_image(0))
        while not any("1 sessions are open" in said for said in peer.texts):
            assert not peer.closed.wait(0.01)
        (uplink,) = gateway._uplinks
        assert uplink.done.wait(20)
        kept = uplink.n_kept_bytes
        peer.send_image(make_image(1))
        peer.end()
    assert peer.images == [make_image(0), make_image(1)]
    assert uplink.n_kept_bytes == kept


@pytest.fixture
def slow_maps(fake_session):
    """Maps are being made; let them be finished; the session that makes them."""
    making, go_on = threading.Event(), threading.Event()

    class Slow(fake_session):
        def maps(self):
            making.set()
            go_on.wait(60)
            return super().maps()

    return making, go_on, Slow


def test_a_service_that_dies_while_it_makes_maps_does_not_hold_close_up(
    run_service, run_gateway, serve_config, slow_maps, connect_peer, make_image
):
    making, go_on, slow = slow_maps
    service = run_service(serve_config, slow)
    peer = connect_peer(run_gateway(service.endpoint), fire=True)
    peer.begin()
    peer.send_image(make_image(0))
    peer.send(4)
    try:
        assert making.wait(20)
        service.server.stop()
        assert peer.closed.wait(20)
    finally:
        go_on.set()
    assert peer.images == [make_image(0)]


def test_maps_that_take_longer_than_a_silent_service_is_waited_for_still_come(
    run_service, run_gateway, serve_config, slow_maps, connect_peer, make_image
):
    making, go_on, slow = slow_maps
    service = run_service(serve_config, slow)
    peer = connect_peer(run_gateway(service.endpoint), fire=True)
    peer.begin()
    peer.send_image(make_image(0))
    peer.send(4)
    assert making.wait(20)
    assert not peer.closed.wait(1.5)  # longer than a silent service is waited for here
    go_on.set()
    assert peer.closed.wait(20)
    assert set(peer.maps()) == {"fs_map", "fs_lower", "fs_upper", "nrmse"}
