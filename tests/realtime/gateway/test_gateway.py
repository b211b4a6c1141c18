"""A gateway starts only where it may, and serves several reconstructions at once."""

from __future__ import annotations

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
