"""The examples in docs/ run as they stand."""

from __future__ import annotations

import functools
import importlib.util
import threading
from configparser import ConfigParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from scansteer.core.errors import InputError
from scansteer.realtime.admission import Peer, choose
from scansteer.realtime.client import Client
from scansteer.realtime.config import GatewayConfig, ServeConfig, load
from scansteer.realtime.controller import Controller

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@pytest.mark.parametrize(("name", "model"), [("serve.yaml", ServeConfig), ("gateway.yaml", GatewayConfig)])
def test_the_example_configurations_are_accepted(name, model):
    load(model, EXAMPLES / name)


def test_a_gateway_is_not_given_limits_that_mean_nothing_to_it(tmp_path):
    (tmp_path / "gateway.yaml").write_text("limits: {max_sessions: 3}")
    with pytest.raises(InputError, match=r"unknown field 'limits\.max_sessions'"):
        load(GatewayConfig, tmp_path / "gateway.yaml")


@pytest.mark.parametrize(("unit", "command"), [("scansteer.service", "serve"), ("scansteer-gateway.service", "gateway")])
def test_the_units_start_what_they_name_and_leave_it_time_to_stop(unit, command):
    settings = ConfigParser(strict=False, interpolation=None)
    settings.read(EXAMPLES / unit)
    assert settings["Service"]["ExecStart"].split()[1:3] == [command, "--config"]
    assert float(settings["Service"]["TimeoutStopSec"]) > 4 * GatewayConfig().service_timeout_s


def test_the_gadgetron_example_names_a_scan_that_is_known():
    external = ElementTree.parse(EXAMPLES / "gadgetron-external.xml").getroot().find(".//external/configuration")
    assert external is not None
    peer = Peer()
    peer.take_config_text(ElementTree.tostring(external, encoding="unicode"))
    choice = choose(peer, GatewayConfig())
    assert (choice.scan.name, choice.config.maps_every) == ("larg-phantom-9.4T", 10)


def test_the_example_controller_plays_a_scan(service, scan, make_image, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("example_controller", EXAMPLES / "controller.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "Controller", functools.partial(Controller, endpoint=service.endpoint, heartbeat_s=0.1))
    monkeypatch.setattr(example, "DEADLINE_S", 10.0)
    short = scan.model_copy(update={"schedule": scan.schedule[:4]})
    played = threading.Semaphore(0)
    really_play = example.play
    monkeypatch.setattr(example, "play", lambda block, repetition: (played.release(), really_play(block, repetition))[1])
    with Client(service.endpoint) as scanner:
        scanner.open(short, "s")
        controller = threading.Thread(target=example.run, args=("s", short, "acting"))
        controller.start()
        for repetition in range(4):
            assert played.acquire(timeout=10)
            scanner.send_image("s", make_image(repetition))
        controller.join(10)
        assert not controller.is_alive()
        assert scanner.close_session("s")["n_images"] == 4
    assert "repetition 3" in capsys.readouterr().out
