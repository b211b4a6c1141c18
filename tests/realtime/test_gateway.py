"""The gateway, spoken to as reconstructions speak: fire (python-ismrmrd-server's client) and gadgetron (connect mode)."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import ismrmrd
import numpy as np
import pytest
from ismrmrd.xsd import ToXML, experimentalConditionsType, ismrmrdHeader

from scansteer.core.errors import InputError
from scansteer.protocols.scan import to_yaml
from scansteer.realtime.admission import Admitted, Choice, ImageRules
from scansteer.realtime.client import Client
from scansteer.realtime.config import GatewayConfig
from scansteer.realtime.gateway import Gateway
from scansteer.realtime.images import image_message

CONFIG_FILE, CONFIG_TEXT, HEADER, CLOSE, TEXT, ERROR, ACQUISITION, IMAGE, WAVEFORM = 1, 2, 3, 4, 5, 8, 1008, 1022, 1026
SCAN = "larg-phantom-9.4T"
GADGETRON_CONFIG = f"<configuration><scan>{SCAN}</scan></configuration>"


def header_xml(field_t: float | None = 9.4, n_slices: int | None = None) -> str:
    field = f"<systemFieldStrength_T>{field_t}</systemFieldStrength_T>"
    system = f"<acquisitionSystemInformation>{field}</acquisitionSystemInformation>"
    slices = f"<slice><minimum>0</minimum><maximum>{(n_slices or 1) - 1}</maximum><center>0</center></slice>"
    limits = f"<encodingLimits>{slices}</encodingLimits>"
    return (
        '<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">'
        f"{system if field_t else ''}<encoding>{limits if n_slices else ''}</encoding></ismrmrdHeader>"
    )


class Reconstruction:
    """The other end of the line; what comes back is parsed by ismrmrd-python, not by our code."""

    def __init__(self, port: int, *, fire: bool) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        self.fire = fire
        self.images: list[bytes] = []
        self.texts: list[str] = []
        self.errors: list[str] = []
        self.closed = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def send(self, identifier: int, body: bytes = b"") -> None:
        self.socket.sendall(struct.pack("<H", identifier) + body)

    def send_text(self, identifier: int, text: str) -> None:
        content = text.encode() + (b"\0" if self.fire else b"")
        self.send(identifier, struct.pack("<I", len(content)) + content)

    def begin(self, config: str = SCAN, *, header: str | None = None, text: dict | None = None) -> None:
        if self.fire:
            self.send(CONFIG_FILE, config.encode().ljust(1024, b"\0"))
        else:
            self.send_text(CONFIG_TEXT, config)
        self.send_text(HEADER, header if header is not None else header_xml())
        if text is not None:
            self.send_text(TEXT, json.dumps(text))

    def end(self) -> None:
        self.send(CLOSE)
        assert self.closed.wait(20)
        self._reader.join(5)
        self.socket.close()

    def maps(self) -> dict[str, list[ismrmrd.Image]]:
        found: dict[str, list[ismrmrd.Image]] = {}
        for body in self.images:
            if b"ScansteerScan" in body:  # ismrmrd-python cannot read a correct int32 image
                image = ismrmrd.Image.from_bytes(body)
                found.setdefault(image.meta["DataRole"][1], []).append(image)
        return found

    def passed(self) -> list[bytes]:
        return [body for body in self.images if b"ScansteerScan" not in body]

    def _read(self) -> None:
        stream = self.socket.makefile("rb")

        def exactly(count: int) -> bytes:
            data = stream.read(count)
            if len(data) != count:
                raise EOFError
            return data

        try:
            while True:
                identifier = struct.unpack("<H", exactly(2))[0]
                if identifier == IMAGE:
                    head = exactly(206)
                    image = ismrmrd.ImageHeader.from_buffer_copy(head)
                    size = {1: 2, 2: 2, 3: 4, 4: 4, 5: 4, 6: 8, 7: 8, 8: 16}[image.data_type] * image.channels
                    n_meta = struct.unpack("<Q", head[198:])[0]
                    self.images.append(head + exactly(n_meta + size * int(np.prod(image.matrix_size, dtype=np.int64))))
                elif identifier in (TEXT, ERROR):
                    length = struct.unpack("<I" if identifier == TEXT else "<Q", exactly(4 if identifier == TEXT else 8))[0]
                    text = exactly(length)
                    assert text.endswith(b"\0") == (identifier == TEXT)
                    (self.texts if identifier == TEXT else self.errors).append(text.rstrip(b"\0").decode())
                else:
                    assert identifier == CLOSE
                    break
        except (EOFError, OSError):
            pass
        finally:
            self.closed.set()


@pytest.fixture
def run_gateway() -> Iterator[Callable[..., Gateway]]:
    running: list[tuple[Gateway, threading.Thread]] = []

    def start(endpoint: str, **options) -> Gateway:
        gateway = Gateway(GatewayConfig(port=0, endpoint=endpoint, service_timeout_s=0.5, **options))
        thread = threading.Thread(target=gateway.run, daemon=True)
        thread.start()
        running.append((gateway, thread))
        return gateway

    yield start
    for gateway, thread in running:
        gateway.stop()
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def gateway(service, run_gateway) -> Gateway:
    return run_gateway(service.endpoint)


@pytest.fixture(params=["fire", "gadgetron"])
def peer(request, gateway) -> Iterator[Reconstruction]:
    reconstruction = Reconstruction(gateway.port, fire=request.param == "fire")
    yield reconstruction
    reconstruction.socket.close()


@pytest.fixture
def fire(gateway) -> Iterator[Reconstruction]:
    reconstruction = Reconstruction(gateway.port, fire=True)
    yield reconstruction
    reconstruction.socket.close()


def config_of(peer: Reconstruction) -> str:
    return SCAN if peer.fire else GADGETRON_CONFIG


def only_session(service):
    with Client(service.endpoint) as client:
        sessions = client.status().sessions
    assert len(sessions) == 1
    return sessions[0]


def test_images_pass_bit_equal_and_maps_follow_before_close(peer, service, make_image):
    images = [make_image(repetition, series_index=3) for repetition in range(30)]
    peer.begin(config_of(peer))
    for image in images:
        peer.send(IMAGE, image)
    peer.end()
    assert peer.images[:30] == images
    maps = peer.maps()
    assert set(maps) == {"fs_map", "fs_lower", "fs_upper", "nrmse"}
    first = ismrmrd.Image.from_bytes(images[0])
    series = [image.image_series_index for found in maps.values() for image in found]
    assert len(set(series)) == 4
    assert 3 not in series
    for (image,) in maps.values():
        assert image.data.dtype == np.float32
        assert image.data.shape == first.data.shape
        np.testing.assert_array_equal(image.data, 30)
        assert list(image.field_of_view) == list(first.field_of_view)
        assert image.meta["Keep_image_geometry"] == "1"
        assert json.loads(image.meta["ScansteerDecision"])["n_images"] == 30
    assert peer.errors == []
    assert peer.fire or peer.texts == []
    assert only_session(service).state == "closed"


def test_images_are_passed_back_at_once(peer, make_image):
    peer.begin(config_of(peer))
    for repetition in range(3):
        peer.send(IMAGE, make_image(repetition))
        while len(peer.images) <= repetition:
            assert not peer.closed.wait(0.01)
    peer.end()


def test_several_connections_do_not_mix(gateway, make_image, service):
    peers = [Reconstruction(gateway.port, fire=bool(number % 2)) for number in range(4)]
    for peer in peers:
        peer.begin(config_of(peer))
    sent = [[make_image(repetition, seed=100 * number + repetition) for repetition in range(6)] for number in range(4)]
    for repetition in range(6):
        for peer, images in zip(peers, sent, strict=True):
            peer.send(IMAGE, images[repetition])
    for peer, images in zip(peers, sent, strict=True):
        peer.end()
        assert peer.passed() == images
        assert len(peer.maps()) == 4
    digests = set()
    with Client(service.endpoint) as client:
        for session in client.status().sessions:
            digests.add(client.close_session(session.session_id)["digest"])
    assert len(digests) == 4


def test_maps_come_every_so_many_images(service, run_gateway, make_image):
    gateway = run_gateway(service.endpoint, maps_every=2)
    peer = Reconstruction(gateway.port, fire=True)
    peer.begin()
    for repetition in range(4):
        peer.send(IMAGE, make_image(repetition))
    peer.end()
    assert [json.loads(image.meta["ScansteerDecision"])["n_images"] for image in peer.maps()["fs_map"]] == [2, 4, 4]


def test_options_and_scan_come_in_openrecons_text(fire, make_image):
    fire.begin("openrecon", text={"version": "1.0", "parameters": {"config": "other", "customconfig": SCAN, "maps_every": "3"}})
    for repetition in range(3):
        fire.send(IMAGE, make_image(repetition))
    fire.end()
    assert len(fire.maps()["fs_map"]) == 2


def test_gadgetrons_properties_are_understood(gateway, make_image):
    peer = Reconstruction(gateway.port, fire=False)
    peer.begin(
        f'<configuration><property name="scan" value="{SCAN}"/>'
        "<property><name>maps_every</name><value>1</value></property></configuration>"
    )
    peer.send(IMAGE, make_image(0))
    peer.end()
    assert len(peer.maps()["fs_map"]) == 2


def test_an_unknown_scan_is_named_and_the_images_pass(peer, make_image, service):
    image = make_image(0)
    peer.begin("<configuration><scan>nowhere</scan></configuration>" if not peer.fire else "nowhere")
    peer.send(IMAGE, image)
    peer.end()
    assert peer.images == [image]
    said = (peer.texts if peer.fire else peer.errors)[0]
    assert "nowhere" in said
    assert SCAN in said


def test_a_peer_cannot_name_a_file(fire, make_image, tmp_path, scan):
    path = tmp_path / "secret.yaml"
    path.write_text(to_yaml(scan))
    fire.begin(str(path))
    fire.send(IMAGE, make_image(0))
    fire.end()
    assert "not known here" in fire.texts[0]


def test_scan_files_of_the_gateways_folder_can_be_named(service, run_gateway, make_image, tmp_path, scan):
    (tmp_path / "ours.yaml").write_text(to_yaml(scan.model_copy(update={"name": "ours"})))
    peer = Reconstruction(run_gateway(service.endpoint, scans_dir=tmp_path).port, fire=True)
    peer.begin("ours")
    peer.send(IMAGE, make_image(0))
    peer.end()
    assert peer.maps()["fs_map"][0].meta["ScansteerScan"] == "ours"


def test_another_field_strength_is_refused_by_name(fire, make_image):
    fire.begin(header=header_xml(field_t=3.0))
    fire.send(IMAGE, make_image(0))
    fire.end()
    assert "come from 3 T" in fire.texts[0]
    assert len(fire.images) == 1


@pytest.mark.parametrize("header", ["", "no XML at all", "<ismrmrdHeader>", '<!DOCTYPE x [<!ENTITY a "b">]><ismrmrdHeader/>'])
def test_a_missing_or_invalid_header_costs_nothing(fire, make_image, header):
    fire.begin(header=header)
    fire.send(IMAGE, make_image(0))
    fire.end()
    assert len(fire.maps()) == 4


def test_a_complete_ismrmrd_header_is_understood(fire, make_image):
    fire.begin(header=ToXML(ismrmrdHeader(experimentalConditions=experimentalConditionsType(H1resonanceFrequency_Hz=400_000_000))))
    fire.send(IMAGE, make_image(0))
    fire.end()
    assert len(fire.maps()) == 4


def test_acquisitions_and_waveforms_are_skipped_correctly(fire, make_image):
    acquisition = ismrmrd.Acquisition.from_array(np.ones((3, 17), np.complex64), trajectory=np.ones((17, 2), np.float32))
    waveform = ismrmrd.Waveform.from_array(np.ones((2, 9), np.uint32))
    fire.begin()
    fire.send(ACQUISITION, acquisition.to_bytes())
    fire.send(IMAGE, make_image(0))
    fire.send(WAVEFORM, waveform.to_bytes())
    fire.send(IMAGE, make_image(1))
    fire.end()
    assert fire.passed() == [make_image(0), make_image(1)]


# The traps of the libraries around.


def test_a_correct_int32_image_does_not_lose_the_stream(fire):
    images = [image_message(np.full((1, 3, 5), 7 + repetition, np.int32), repetition=repetition) for repetition in range(2)]
    assert ismrmrd.ImageHeader.from_buffer_copy(images[0]).data_type == 4
    fire.begin()
    for image in images:
        fire.send(IMAGE, image)
    fire.end()
    assert fire.passed() == images
    assert len(fire.maps()) == 4


def test_an_image_that_arrives_in_small_pieces_is_read_whole(fire, make_image):
    image = make_image(0)
    fire.begin()
    for start in range(0, len(image) + 2, 7):
        fire.socket.sendall((struct.pack("<H", IMAGE) + image)[start : start + 7])
    fire.end()
    assert fire.passed() == [image]


@pytest.mark.parametrize(
    "message",
    [
        struct.pack("<HI", CONFIG_TEXT, 2**31),
        struct.pack("<HI", HEADER, 2**32 - 1),
        struct.pack("<HI", TEXT, 2**24),
        struct.pack("<HQ", ERROR, 2**60),
        struct.pack("<H", 77),
        struct.pack("<H", 0xFFFF),
    ],
)
def test_announced_lengths_beyond_bounds_end_the_connection_by_name(fire, gateway, message, make_image):
    fire.begin()
    fire.socket.sendall(message)
    assert fire.closed.wait(10)
    assert "ERROR" in fire.texts[-1]


def test_a_header_that_claims_gigabytes_is_refused_before_anything_is_read(fire, make_image):
    header = ismrmrd.ImageHeader.from_buffer_copy(make_image(0))
    header.matrix_size = (65535, 65535, 1)
    fire.begin()
    fire.send(IMAGE, bytes(header) + bytes(8))
    assert fire.closed.wait(10)
    assert "4294836225 values" in fire.texts[-1]


def test_meta_of_absurd_length_is_refused_before_it_is_read(fire, make_image):
    fire.begin()
    fire.send(IMAGE, make_image(0)[:198] + struct.pack("<Q", 2**50))
    assert fire.closed.wait(10)
    assert "bytes of Meta" in fire.texts[-1]


@pytest.mark.parametrize("text", [b"<ismrmrdMeta><meta>", b"\xff\xfe", b"<!DOCTYPE a []><ismrmrdMeta/>"])
def test_meta_that_is_not_xml_costs_its_image_and_not_the_stream(fire, make_image, text):
    image = make_image(0)
    bad = image[:198] + struct.pack("<Q", len(text)) + text + image[206:]
    fire.begin()
    fire.send(IMAGE, bad)
    fire.send(IMAGE, make_image(1))
    fire.end()
    assert fire.passed() == [bad, make_image(1)]
    assert any("Meta" in said for said in fire.texts)


def test_meta_numbers_that_come_as_text_are_converted_or_refused(fire, make_image):
    fire.begin()
    fire.send(IMAGE, make_image(0, meta={"RescaleSlope": "2.5", "RescaleIntercept": "1"}))
    fire.send(IMAGE, make_image(1, meta={"RescaleSlope": "two"}))
    fire.end()
    assert any("RescaleSlope" in said for said in fire.texts)
    assert json.loads(fire.maps()["fs_map"][0].meta["ScansteerDecision"])["n_images"] == 1


def test_header_counters_that_wrap_go_on(scan):
    long_scan = scan.model_copy(update={"schedule": scan.schedule * 3000})
    rules = ImageRules(Choice(long_scan, GatewayConfig(), 1))
    for repetition in range(0, 80_000, 5_000):
        verdict = rules.admit(image_message(np.ones((1, 2, 3), np.float32), repetition=repetition))
        assert isinstance(verdict, Admitted)
        assert verdict.repetition == repetition


def test_a_peer_that_reads_nothing_until_it_has_sent_everything_is_served(service, run_gateway):
    gateway = run_gateway(service.endpoint)
    line = socket.create_connection(("127.0.0.1", gateway.port), timeout=20)
    line.sendall(struct.pack("<H", CONFIG_FILE) + SCAN.encode().ljust(1024, b"\0"))
    pictures = [np.full((1, 300, 400), repetition + 1, np.float32) for repetition in range(30)]
    images = [image_message(picture, repetition=repetition) for repetition, picture in enumerate(pictures)]
    for image in images:
        line.sendall(struct.pack("<H", IMAGE) + image)
    line.sendall(struct.pack("<H", CLOSE))
    stream = line.makefile("rb")
    for image in images:
        assert stream.read(2 + len(image)) == struct.pack("<H", IMAGE) + image
    line.close()


# Vendors' cases, each by its rule.


def uses(fire: Reconstruction, service) -> int:
    return only_session(service).n_accepted


def test_dummies_only_pass(fire, service, make_image):
    fire.begin()
    fire.send(IMAGE, make_image(0, seed=70, meta={"IsDummy": "1"}))
    fire.send(IMAGE, make_image(0, seed=71, flags=1))
    fire.send(IMAGE, make_image(0))
    fire.end()
    assert len(fire.passed()) == 3
    assert uses(fire, service) == 1


def test_leading_repetitions_can_be_declared_dummies(fire, service, make_image):
    fire.begin(text={"parameters": {"dummies": 2}})
    for repetition in range(5):
        fire.send(IMAGE, make_image(repetition))
    fire.end()
    assert uses(fire, service) == 3
    assert json.loads(fire.maps()["fs_map"][0].meta["ScansteerDecision"])["repetition"] == 2


def test_one_echo_is_used(fire, service, make_image):
    fire.begin(text={"parameters": {"echo": "1"}})
    for repetition in range(2):
        for echo in range(3):
            fire.send(IMAGE, make_image(repetition, seed=10 * repetition + echo, contrast=echo))
    fire.end()
    assert len(fire.passed()) == 6
    assert uses(fire, service) == 2
    assert any("echo 0, and echo 1 is used" in said for said in fire.texts)


def test_another_series_only_passes(fire, service, make_image):
    fire.begin()
    for repetition in range(2):
        fire.send(IMAGE, make_image(repetition, series_index=1))
        fire.send(IMAGE, make_image(repetition, seed=80, series_index=2))
    fire.end()
    assert uses(fire, service) == 2
    assert any("belongs to series 2, and series 1 is used" in said for said in fire.texts)


def test_phase_images_and_unknown_roles_only_pass(fire, service, make_image):
    fire.begin()
    fire.send(IMAGE, make_image(0, meta={"DataRole": "PHASE"}))
    fire.send(IMAGE, make_image(0))
    fire.end()
    assert uses(fire, service) == 1


def test_images_beyond_the_schedule_only_pass(fire, service, make_image):
    fire.begin()
    fire.send(IMAGE, make_image(0))
    fire.send(IMAGE, make_image(30))
    fire.end()
    assert uses(fire, service) == 1
    assert any("the schedule has 30" in said for said in fire.texts)


def test_repetitions_counted_from_one(fire, service, make_image):
    fire.begin(text={"parameters": {"first_repetition": "1"}})
    for repetition in (1, 2, 3):
        fire.send(IMAGE, make_image(repetition))
    fire.end()
    assert fire.passed() == [make_image(repetition) for repetition in (1, 2, 3)]
    assert json.loads(fire.maps()["fs_map"][0].meta["ScansteerDecision"])["repetition"] == 2


def test_images_without_a_counter_are_counted_as_they_come(fire, service, make_image):
    fire.begin(text={"parameters": {"dynamic_index": "arrival"}})
    for number in range(4):
        fire.send(IMAGE, make_image(0, seed=number))
    fire.end()
    assert uses(fire, service) == 4


def test_without_that_rule_images_of_one_repetition_are_refused_by_name(fire, service, make_image):
    fire.begin()
    for number in range(2):
        fire.send(IMAGE, make_image(0, seed=number))
    fire.end()
    assert any("Another image of repetition 0" in said for said in fire.texts)


def test_the_set_can_count_the_repetitions(fire, service, make_image):
    fire.begin(text={"parameters": {"dynamic_index": "set"}})
    for number in range(3):
        fire.send(IMAGE, make_image(0, seed=number, set=number))
    fire.end()
    assert json.loads(fire.maps()["fs_map"][0].meta["ScansteerDecision"])["n_images"] == 3


def test_slices_become_one_volume_and_maps_come_slice_by_slice(fire, service, make_image):
    fire.begin(header=header_xml(n_slices=3))
    for repetition in range(2):
        for slice_ in (2, 0, 1):
            fire.send(IMAGE, make_image(repetition, seed=10 * repetition + slice_, slice=slice_))
    fire.end()
    assert len(fire.passed()) == 6
    maps = fire.maps()["fs_map"]
    assert [image.slice for image in maps] == [0, 1, 2]
    assert all(image.data.shape == (1, 1, 5, 4) for image in maps)


def test_a_volume_is_believed_over_a_header_that_counts_slices(fire, service, make_image):
    fire.begin(header=header_xml(n_slices=3))
    for repetition in range(2):
        fire.send(IMAGE, make_image(repetition, shape=(3, 5, 4)))
    fire.end()
    (image,) = fire.maps()["fs_map"]
    assert image.data.shape == (1, 3, 5, 4)
    np.testing.assert_array_equal(image.data, 2)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.uint32, np.int32, np.float32, np.float64, np.complex64, np.complex128])
def test_every_pixel_type_passes_and_is_used(fire, service, dtype):
    images = [image_message((np.arange(15).reshape(1, 3, 5) + 1 + r).astype(dtype), repetition=r) for r in range(2)]
    fire.begin()
    for image in images:
        fire.send(IMAGE, image)
    fire.end()
    assert fire.passed() == images
    np.testing.assert_array_equal(fire.maps()["fs_map"][0].data, 2)


def test_maps_and_masks_are_recognised_by_their_role(serve_config, run_service, run_gateway, fake_session, make_image):
    setups = []

    class Recording(fake_session):
        def __init__(self, setup):
            setups.append(setup)
            super().__init__(setup)

    service = run_service(serve_config, Recording)
    peer = Reconstruction(run_gateway(service.endpoint).port, fire=True)
    peer.begin(text={"parameters": {"n_auxiliary": "3"}})
    peer.send(IMAGE, make_image(0, meta={"DataRole": "T1"}))
    peer.send(IMAGE, make_image(0, meta={"GADGETRON_DataRole": "FREQMAP"}))
    peer.send(IMAGE, make_image(0, meta={"DataRole": "MASK"}))
    peer.send(IMAGE, make_image(0))
    peer.end()
    assert [set(setup.auxiliaries) for setup in setups] == [{"t1", "b0"}]
    assert setups[0].region is not None


def test_a_repetition_that_never_comes_is_declared_missing(fire, service, make_image):
    fire.begin()
    for repetition in (0, 2, 3, 4, 5, 6, 7):
        fire.send(IMAGE, make_image(repetition))
    fire.end()
    decision = json.loads(fire.maps()["fs_map"][0].meta["ScansteerDecision"])
    assert (decision["repetition"], decision["n_images"]) == (7, 7)
    assert any("[1] did not come" in said for said in fire.texts)


# The service away.


def test_without_a_service_images_pass_and_close_is_answered(run_gateway, make_image, tmp_path):
    peer = Reconstruction(run_gateway(f"ipc://{tmp_path}/nobody").port, fire=True)
    images = [make_image(repetition) for repetition in range(5)]
    peer.begin()
    for image in images:
        peer.send(IMAGE, image)
    peer.end()
    assert peer.images == images


def test_a_service_that_comes_late_gets_everything(run_gateway, run_service, serve_config, make_image, tmp_path):
    endpoint = f"ipc://{tmp_path}/late"
    peer = Reconstruction(run_gateway(endpoint).port, fire=True)
    peer.begin()
    for repetition in range(3):
        peer.send(IMAGE, make_image(repetition))
    while len(peer.images) < 3:
        assert not peer.closed.wait(0.01)
    run_service(serve_config.model_copy(update={"endpoint": endpoint}))
    for repetition in range(3, 6):
        peer.send(IMAGE, make_image(repetition))
    peer.end()
    np.testing.assert_array_equal(peer.maps()["fs_map"][0].data, 6)


def test_a_service_that_restarts_within_a_scan_misses_nothing(run_gateway, run_service, serve_config, make_image, tmp_path):
    config = serve_config.model_copy(update={"endpoint": f"ipc://{tmp_path}/restarting"})
    first = run_service(config)
    peer = Reconstruction(run_gateway(config.endpoint).port, fire=True)
    peer.begin()
    for repetition in range(3):
        peer.send(IMAGE, make_image(repetition))
    while len(peer.images) < 3:
        assert not peer.closed.wait(0.01)
    first.stop()
    for repetition in range(3, 5):
        peer.send(IMAGE, make_image(repetition))
    run_service(config)
    peer.send(IMAGE, make_image(5))
    peer.end()
    np.testing.assert_array_equal(peer.maps()["fs_map"][0].data, 6)


def test_a_peer_that_vanishes_leaves_a_closed_session(fire, service, make_image):
    fire.begin()
    fire.send(IMAGE, make_image(0))
    while not fire.images:
        assert not fire.closed.wait(0.01)
    fire.socket.shutdown(socket.SHUT_RDWR)
    with Client(service.endpoint) as client:
        while only_session(service).state != "closed":
            assert client.receive(0.02) is None


# Starting.


def test_an_address_open_to_others_needs_leave():
    with pytest.raises(InputError, match="no authentication"):
        Gateway(GatewayConfig(host="0.0.0.0", port=0))


def test_a_wrong_scan_of_its_own_is_named_at_the_start():
    with pytest.raises(InputError, match="Unknown scan"):
        Gateway(GatewayConfig(port=0, scan="nowhere"))
