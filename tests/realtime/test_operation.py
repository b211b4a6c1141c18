"""Starting, stopping, health, metrics, logs, configuration."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from scansteer.core.errors import InputError, ScansteerError
from scansteer.realtime.client import Client
from scansteer.realtime.config import GatewayConfig, ServeConfig, load
from scansteer.realtime.logs import JsonLines
from scansteer.realtime.server import Server
from scansteer.realtime.sessions import list_sessions


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fetch(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_readiness_is_said_only_when_everything_is_compiled(serve_config, run_service, fake_session, scan):
    compile_now = threading.Event()

    class Slow(fake_session):
        def __init__(self, setup):
            assert compile_now.wait(10)
            super().__init__(setup)

    port = free_port()
    service = run_service(serve_config.model_copy(update={"http_port": port}), Slow)
    with Client(service.endpoint) as client:
        assert fetch(port, "/ready") == (200, "ready\n")
        client.open(scan, "s")
        assert fetch(port, "/health") == (200, "ok\n")
        assert fetch(port, "/ready") == (503, "compiling\n")
        compile_now.set()
        client.wait_ready("s", 10)
        assert fetch(port, "/ready") == (200, "ready\n")
    assert fetch(port, "/elsewhere")[0] == 404


def test_metrics_are_prometheus_text(serve_config, run_service, scan, make_image):
    port = free_port()
    service = run_service(serve_config.model_copy(update={"http_port": port}))
    with Client(service.endpoint) as client:
        client.open(scan, "s")
        client.send_image("s", make_image(0))
        client.send_image("s", make_image(0))
        client.maps("s")
    samples: dict[str, str] = {}
    while samples.get("scansteer_decisions_total") != "1":  # it is written down ten times a second
        _, text = fetch(port, "/metrics")
        samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert samples["scansteer_images_total"] == "1"
    assert samples["scansteer_duplicate_images_total"] == "1"
    assert samples['scansteer_decision_latency_milliseconds_bucket{le="+Inf"}'] == "1"
    assert text.endswith("\n")


def test_who_asks_for_metrics_does_not_look_into_sessions_that_change(serve_config, run_service, monkeypatch):
    port = free_port()
    service = run_service(serve_config.model_copy(update={"http_port": port}))
    asking, status = set(), service.server.broker.status
    monkeypatch.setattr(service.server.broker, "status", lambda *args: (asking.add(threading.get_ident()), status(*args))[1])
    for _ in range(3):
        assert fetch(port, "/metrics")[0] == 200
    while not asking:
        fetch(port, "/metrics")
    assert asking == {service._thread.ident}


def test_a_visitor_who_hangs_up_leaves_no_traceback(serve_config, run_service, capsys, caplog):
    caplog.set_level(logging.INFO, "scansteer.server")
    port = free_port()
    run_service(serve_config.model_copy(update={"http_port": port}))
    with socket.create_connection(("127.0.0.1", port), timeout=5) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close with a reset
        line.sendall(b"GET /" + b"x" * 1000)
    deadline = time.monotonic() + 10
    while not any("was not answered" in record.message for record in caplog.records):
        assert time.monotonic() < deadline
        fetch(port, "/health")
    assert "Traceback" not in capsys.readouterr().err


def test_an_occupied_http_port_is_named(serve_config, fake_session):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ScansteerError, match="Cannot listen on http"):
        Server(serve_config.model_copy(update={"http_port": taken.getsockname()[1]}), fake_session)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_service_in_good_order(tmp_path, scan, make_image, number):
    config = tmp_path / "serve.yaml"
    endpoint = f"ipc://{tmp_path}/service"
    settings = {"endpoint": endpoint, "publish_endpoint": f"ipc://{tmp_path}/publish", "data_dir": str(tmp_path / "sessions")}
    config.write_text(yaml.safe_dump(settings))
    script = Path(__file__).with_name("small_service.py")
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # who runs the tests may ignore it (nohup), and a child inherits that
    process = subprocess.Popen([sys.executable, str(script), str(config), "fake"], stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGHUP, before)
    with Client(endpoint, timeout_s=30) as client:
        client.open(scan, "s")
        client.send_image("s", make_image(0))
    os.kill(process.pid, number)
    _, log = process.communicate(timeout=20)
    assert process.returncode == 0
    assert [json.loads(line)["message"] for line in log.splitlines()][-1] == "stopping"
    assert [session.n_images for session in list_sessions(tmp_path / "sessions")] == [1]


def test_old_sessions_are_purged_at_the_start(serve_config, run_service, scan):
    first = run_service(serve_config)
    with Client(first.endpoint) as client:
        for name in ("old", "young"):
            client.open(scan, name)
            client.close_session(name)
    first.stop()
    os.utime(serve_config.data_dir / "old" / "journal", (0, 0))
    run_service(serve_config.model_copy(update={"retention_days": 1.0}))
    assert [session.session_id for session in list_sessions(serve_config.data_dir)] == ["young"]


def test_logs_are_json_lines():
    try:
        raise ValueError("text\nwith lines")
    except ValueError:
        record = logging.LogRecord("scansteer.x", logging.ERROR, "f", 1, "session %s", ("s",), sys.exc_info())
    line = JsonLines().format(record)
    assert "\n" not in line
    content = json.loads(line)
    assert (content["level"], content["message"]) == ("error", "session s")
    assert "ValueError" in content["exception"]


def test_without_a_file_the_defaults_find_each_other():
    assert load(GatewayConfig, None).endpoint == load(ServeConfig, None).endpoint


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("endpoit: tcp://127.0.0.1:1", "unknown field 'endpoit'; remove it or compare with realtime/config.py"),
        ("limits: {max_sessions: 0}", "limits.max_sessions"),
        ("fsync: [", "not YAML"),
        ("- a", r"serve\.yaml does not hold settings: .* got list"),
        ("retention_days: 2023-13-45", "not YAML: month must be in"),
        ("a: " + "[" * 3000 + "]" * 3000, "not YAML: maximum recursion"),
        ("http_port: " + "9" * 5000, "not YAML: Exceeds the limit"),
        ("http_port: 70000", "http_port"),
    ],
)
def test_a_wrong_configuration_is_named_with_its_field(tmp_path, content, match):
    path = tmp_path / "serve.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=match):
        load(ServeConfig, path)


def test_an_empty_or_missing_file(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    assert load(ServeConfig, tmp_path / "empty.yaml") == ServeConfig()
    with pytest.raises(InputError, match="Cannot read"):
        load(ServeConfig, tmp_path / "missing.yaml")


def test_heartbeats_go_on_while_a_session_computes(serve_config, run_service, fake_session, scan, make_image):
    computing, go_on = threading.Event(), threading.Event()

    class Busy(fake_session):
        def absorb(self, frame, **options):
            computing.set()
            assert go_on.wait(20)
            return super().absorb(frame, **options)

    service = run_service(serve_config, Busy)
    with Client(service.endpoint) as client:
        client.open(scan, "s")
        client.send_image("s", make_image(0))
        assert computing.wait(10)
        for _ in range(5):
            client.ping(timeout_s=5)
        client.send_image("s", make_image(1))
        go_on.set()
        deadline = time.monotonic() + 10
        while client.session_status("s").n_decisions < 2:
            assert time.monotonic() < deadline
