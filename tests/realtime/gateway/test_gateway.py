"""A gateway starts only where it may, and serves several reconstructions at once."""

from __future__ import annotations

import os
import resource
import threading
import time

import pytest

from scansteer.core.errors import InputError
from scansteer.realtime.client import Client
from scansteer.realtime.config import GatewayConfig
from scansteer.realtime.gateway import Gateway


def test_several_connections_do_not_mix(gateway, make_image, service, connect_peer):
    peers = [connect_peer(gateway, fire=bool(number % 2)) for number in range(4)]
    for peer in peers:
        peer.begin(peer.config)
    sent = [[make_image(repetition, seed=100 * number + repetition) for repetition in range(6)] for number in range(4)]
    for repetition in range(6):
        for peer, images in zip(peers, sent, strict=True):
            peer.send_image(images[repetition])
    for peer, images in zip(peers, sent, strict=True):
        peer.end()
        assert peer.passed() == images
        assert len(peer.maps()) == 4
    digests = set()
    with Client(service.endpoint) as client:
        for session in client.status().sessions:
            digests.add(client.close_session(session.session_id)["digest"])
    assert len(digests) == 4


def test_an_address_open_to_others_needs_leave():
    with pytest.raises(InputError, match="no authentication"):
        Gateway(GatewayConfig(host="0.0.0.0", port=0))


def test_a_wrong_scan_of_its_own_is_named_at_the_start():
    with pytest.raises(InputError, match="Unknown scan"):
        Gateway(GatewayConfig(port=0, scan="nowhere"))


def test_a_connection_that_cannot_be_served_ends_no_other(gateway, connect_peer, make_image, monkeypatch):
    start = threading.Thread.start

    def refuse(thread):
        if thread.name == "scansteer-connection":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as context:
        context.setattr(threading.Thread, "start", refuse)
        refused = connect_peer(gateway, fire=True)
        assert refused.closed.wait(20)
    served = connect_peer(gateway, fire=True)
    served.begin()
    served.send_image(make_image(0))
    served.end()
    assert served.passed() == [make_image(0)]


def test_connections_that_say_nothing_do_not_hold_a_place_for_long(run_gateway, service, connect_peer, make_image):
    gateway = run_gateway(service.endpoint, max_connections=2, first_message_timeout_s=0.3)
    silent = [connect_peer(gateway, fire=True) for _ in range(2)]
    assert all(peer.closed.wait(20) for peer in silent)
    deadline = time.monotonic() + 20
    while gateway._connections and time.monotonic() < deadline:
        time.sleep(0.01)
    served = connect_peer(gateway, fire=True)
    served.begin()
    assert not served.closed.wait(0.6)  # it may be silent now
    served.send_image(make_image(0))
    served.end()
    assert served.passed() == [make_image(0)]


def test_a_connection_may_have_a_descriptor_beyond_those_that_select_takes(run_gateway, service, connect_peer, make_image):
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 2000:
        pytest.skip("not so many files may be open here")
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1024)]
    try:
        peer = connect_peer(run_gateway(service.endpoint), fire=True)
        peer.begin()
        peer.send_image(make_image(0))
        peer.end()
    finally:
        for descriptor in held:
            os.close(descriptor)
    assert len(peer.maps()) == 4


def test_a_gateway_that_is_stopped_delivers_what_it_has(run_service, serve_config, run_gateway, connect_peer, make_image, tmp_path):
    endpoint = f"ipc://{tmp_path}/late"
    gateway = run_gateway(endpoint)
    peer = connect_peer(gateway, fire=True)
    images = [make_image(repetition) for repetition in range(20)]
    peer.begin()
    for image in images:
        peer.send_image(image)
    while len(peer.images) < len(images):
        assert not peer.closed.wait(0.01)
    gateway.stop()
    service = run_service(serve_config.model_copy(update={"endpoint": endpoint}))
    assert peer.closed.wait(20)
    (uplink,) = gateway._uplinks
    assert uplink.done.wait(20)
    with Client(service.endpoint) as client:
        (session,) = client.status().sessions
    assert session.n_accepted == len(images)
