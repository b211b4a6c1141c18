"""The examples in docs/ run as they stand."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import runpy
import sys
import threading
from configparser import ConfigParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from scansteer.core.errors import InputError
from scansteer.realtime.admission import Peer, choose
from scansteer.realtime.client import Client
from scansteer.realtime.config import GatewayConfig, ServeConfig, load
from scansteer.realtime.controller import Controller
from scansteer.realtime.images import Geometry
from scansteer.realtime.outputs import write_maps
from scansteer.realtime.sources import check_against, open_source

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLES = DOCS / "examples"


def python_after(page: str, heading: str) -> str:
    """The first Python block under a heading."""
    section = (DOCS / page).read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)[0]


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


def written(monkeypatch, *arguments: object) -> Path:
    """The file that the example writes when called so."""
    monkeypatch.setattr(sys, "argv", ["write_images.py", *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / "write_images.py"), run_name="__main__")
    return Path(sys.argv[3])


def test_the_images_of_the_page_become_a_file_that_fits_its_scan(scan, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("signals.json").write_text(json.dumps({"mz_water": np.linspace(1.0, 0.5, 30).tolist()}))
    exec(python_after("replay-a-scan.md", "Write a file of your own"), {})
    images = np.load("IMAGES.npy")
    path = written(monkeypatch, "IMAGES.npy", "larg-phantom-9.4T", "SCAN.h5")
    with open_source(path) as source:
        assert (check_against(source, scan), source.warnings) == ([], [])
        assert (source.header.field_t, source.header.flip_deg) == (9.4, 60.0)
        stored = [image.frame for image in source.images()]
    assert [(frame.repetition, frame.role) for frame in stored] == [(number, "image") for number in range(30)]
    np.testing.assert_allclose([frame.pixels[0] for frame in stored], images, rtol=1e-6)
    assert images[0, 16, 48] > 1.5 * images[-1, 16, 48] > 1000 > images[0, 0, 0]
    assert stored[0].geometry.voxel_mm == (0.5, 0.5, 5.0)
    assert stored[0].geometry.is_oriented


def test_the_example_writes_volumes_and_replaces_a_file(scan, monkeypatch, tmp_path):
    volumes = np.random.default_rng(0).random((2, 3, 4, 5)) + 0.5
    np.save(tmp_path / "images.npy", volumes)
    for _ in range(2):
        path = written(monkeypatch, tmp_path / "images.npy", "larg-phantom-9.4T", tmp_path / "scan.h5")
    with open_source(path) as source:
        assert source.n_images == 2
        first = next(source.images()).frame
    assert first.geometry.matrix == (5, 4, 3)
    np.testing.assert_allclose(first.pixels, volumes[0], rtol=1e-6)


def test_the_pages_program_sends_images_and_hears_a_decision_on_each(service, monkeypatch, capsys):
    monkeypatch.setattr("scansteer.realtime.client.Client", functools.partial(Client, service.endpoint))
    images = np.random.default_rng(0).random((3, 5, 4)) + 0.5
    exec(python_after("write-a-controller.md", "Images from a program of your own"), {"images": images})
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in said[:-1]] == [["1", "continue"], ["2", "continue"], ["3", "continue"]]
    assert "'n_images': 3" in said[-1]


def test_a_maps_header_extension_says_what_the_page_says(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_maps(Path("results/maps"), {"fs_map": np.ones((1, 3, 4))}, Geometry((4, 3, 1)), {"scan": "mine", "versions": {"scansteer": "0"}}, 7)
    names: dict = {}
    exec(python_after("read-the-outputs.md", "Maps"), names)
    assert names["fraction"].shape == (4, 3, 1)
    told = {"map": "fs_map", "scan": "mine", "n_images": 7, "versions": {"scansteer": "0"}}
    assert told.items() <= names["about"].items()
