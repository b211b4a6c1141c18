"""Nobody uninvited: addresses, keys, allow-list."""

from __future__ import annotations

import pytest
import zmq

from scansteer.core.errors import InputError
from scansteer.realtime.auth import check_endpoint, is_local, make_keys, read_allowed, read_secret
from scansteer.realtime.client import Client
from scansteer.realtime.codec import encode
from scansteer.realtime.config import Keys
from scansteer.realtime.connection import RefusedError, ServiceSilentError
from scansteer.realtime.messages import Ping
from scansteer.realtime.watcher import Watcher


@pytest.fixture
def keys(tmp_path):
    """(service's, invited client's, stranger's)"""
    house, elsewhere = tmp_path / "keys", tmp_path / "elsewhere"
    make_keys(house)
    make_keys(elsewhere, ("stranger",))
    return (
        Keys(secret=house / "service.key_secret", allowed=house / "allowed"),
        Keys(secret=house / "client.key_secret", service=house / "service.key"),
        Keys(secret=elsewhere / "stranger.key_secret", service=house / "service.key"),
    )


@pytest.fixture
def guarded(serve_config, run_service, keys):
    return run_service(serve_config.model_copy(update={"keys": keys[0]}))


@pytest.mark.parametrize(
    ("endpoint", "local"),
    [
        ("tcp://127.0.0.1:9010", True),
        ("tcp://127.3.2.1:*", True),
        ("tcp://[::1]:9010", True),
        ("tcp://localhost:9010", True),
        ("ipc:///run/scansteer", True),
        ("inproc://x", True),
        ("tcp://0.0.0.0:9010", False),
        ("tcp://*:9010", False),
        ("tcp://[::]:9010", False),
        ("tcp://10.0.0.5:9010", False),
        ("tcp://127.0.0.1.example.org:9010", False),
        ("tcp://scanner:9010", False),
        ("tcp://eth0:9010", False),
    ],
)
def test_only_this_machines_own_addresses_are_local(endpoint, local):
    assert is_local(endpoint) is local
    if local:
        check_endpoint(endpoint, None)
    else:
        with pytest.raises(InputError, match="can be reached by others"):
            check_endpoint(endpoint, None)


@pytest.mark.parametrize("endpoint", ["", "127.0.0.1:9010", "http://127.0.0.1", "tcp://127.0.0.1", "udp://1.2.3.4:5"])
def test_an_address_of_another_form_is_named(endpoint):
    with pytest.raises(InputError, match="not of the form"):
        check_endpoint(endpoint, None)


@pytest.mark.parametrize("port", ["65536", "99999", "9" * 5000])
def test_a_port_that_is_none_is_named(port):
    with pytest.raises(InputError, match="port beyond 65535"):
        check_endpoint(f"tcp://127.0.0.1:{port}", None)


def test_keys_without_an_allow_list_do_not_open_an_address(keys):
    with pytest.raises(InputError, match=r"keys\.allowed"):
        check_endpoint("tcp://0.0.0.0:9010", Keys(secret=keys[0].secret))
    check_endpoint("tcp://0.0.0.0:9010", keys[0])


def test_an_invited_client_is_served(guarded, keys, scan, make_image, serve_config):
    with Client(guarded.endpoint, keys=keys[1]) as client:
        client.open(scan, "s")
        assert client.send_image("s", make_image(0)).repetition == 0
    assert '"user": "client"' in (serve_config.data_dir / "s" / "audit.jsonl").read_text()


def test_a_client_with_an_unknown_key_is_not_heard(guarded, keys):
    with Client(guarded.endpoint, keys=keys[2], timeout_s=0.5) as client, pytest.raises(ServiceSilentError):
        client.ping()
    assert guarded.server.broker.metrics.messages == 0


def test_a_client_without_keys_is_not_heard(guarded):
    with Client(guarded.endpoint, timeout_s=0.5) as client, pytest.raises(ServiceSilentError):
        client.ping()
    with zmq.Context.instance().socket(zmq.DEALER) as plain:
        plain.linger = 0
        plain.connect(guarded.endpoint)
        plain.send_multipart(encode(Ping(request_id=1)))
        assert not plain.poll(300)
    assert guarded.server.broker.metrics.messages == 0


def test_a_key_may_be_for_watching_only(serve_config, run_service, keys, scan, make_image):
    service_keys = keys[0].model_copy(update={"roles": {"client": "watch"}})
    service = run_service(serve_config.model_copy(update={"keys": service_keys}))
    with Client(service.endpoint, keys=keys[1]) as client:
        assert client.status().ready
        with pytest.raises(RefusedError, match="may only watch; a 'open' message"):
            client.open(scan, "s")
    assert not (serve_config.data_dir / "s").exists()


def test_a_key_may_be_for_images_only(serve_config, run_service, keys, scan, make_image):
    service_keys = keys[0].model_copy(update={"roles": {"client": "images"}})
    service = run_service(serve_config.model_copy(update={"keys": service_keys}))
    with Client(service.endpoint, keys=keys[1]) as client:
        client.open(scan, "s")
        assert client.send_image("s", make_image(0)).repetition == 0
        for steer in (lambda: client.subscribe("s"), lambda: client.control("s", "abort"), lambda: client.played("s", 0, scan.schedule[0])):
            with pytest.raises(RefusedError, match="may only send images and watch"):
                steer()
        assert client.close_session("s")["n_images"] == 1


def test_a_role_of_a_key_that_does_not_exist_does_not_start(serve_config, run_service, keys):
    service_keys = keys[0].model_copy(update={"roles": {"cilent": "watch"}})
    with pytest.raises(InputError, match=r"keys\.roles names cilent"):
        run_service(serve_config.model_copy(update={"keys": service_keys}))


def test_a_watcher_needs_a_key_too(guarded, keys, scan, make_image):
    with (
        Watcher(guarded.publish_endpoint, keys=keys[1]) as invited,
        Watcher(guarded.publish_endpoint, keys=keys[2]) as stranger,
        Watcher(guarded.publish_endpoint) as plain,
        Client(guarded.endpoint, keys=keys[1]) as client,
    ):
        client.open(scan, "s")
        decision, repetition = None, 0
        while decision is None:
            client.send_image("s", make_image(repetition))
            decision, repetition = invited.next_decision(0.1), repetition + 1
        assert stranger.next_decision(0.2) is None
        assert plain.next_decision(0) is None


def test_key_files_are_private_and_never_overwritten(tmp_path):
    written = make_keys(tmp_path / "keys", ("scanner", "console"))
    secrets = [path for path in written if path.suffix == ".key_secret"]
    assert {path.stem for path in secrets} == {"service", "scanner", "console"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in secrets)
    assert set(read_allowed(tmp_path / "keys" / "allowed").values()) == {"scanner", "console"}
    with pytest.raises(InputError, match="never overwritten"):
        make_keys(tmp_path / "keys")


def test_a_key_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"Cannot make folder .*: Not a directory"):
        make_keys(tmp_path / "file" / "keys")


def test_a_secret_that_others_can_read_is_refused(keys):
    keys[0].secret.chmod(0o640)
    with pytest.raises(InputError, match=r"mode 0640.*chmod 600"):
        read_secret(keys[0].secret)


def test_an_allow_list_that_anybody_can_write_is_refused(tmp_path):
    make_keys(tmp_path, ("scanner",))
    allowed = tmp_path / "allowed"
    assert list(read_allowed(allowed).values()) == ["scanner"]
    for path in (allowed, allowed / "scanner.key"):
        mode = path.stat().st_mode
        path.chmod(mode | 0o002)
        with pytest.raises(InputError, match=r"so let themselves in; run chmod o-w on it"):
            read_allowed(allowed)
        path.chmod(mode)


def test_an_empty_allow_list_does_not_start(keys, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="No client may connect"):
        read_allowed(tmp_path / "empty")


@pytest.mark.parametrize("content", ["", "nonsense", 'curve\n    public-key = "short"\n'])
def test_a_file_that_is_no_key_is_named(tmp_path, content):
    path = tmp_path / "x.key_secret"
    path.write_text(content)
    with pytest.raises(InputError, match=r"x\.key_secret"):
        read_secret(path)


@pytest.mark.parametrize("name", ["service", "../x", "", "a b"])
def test_client_names_are_file_names(tmp_path, name):
    with pytest.raises(InputError, match="cannot be called"):
        make_keys(tmp_path / "keys", (name,))
