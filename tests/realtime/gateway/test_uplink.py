"""Nothing that passed is lost on its way to the service, wherever the service is."""

from __future__ import annotations

import json
import socket

import numpy as np

from scansteer.realtime.client import Client


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


def test_a_peer_that_vanishes_leaves_a_closed_session(fire, service, make_image, only_session):
    fire.begin()
    fire.send_image(make_image(0))
    while not fire.images:
        assert not fire.closed.wait(0.01)
    fire.socket.shutdown(socket.SHUT_RDWR)
    with Client(service.endpoint) as client:
        while only_session().state != "closed":
            assert client.receive(0.02) is None
