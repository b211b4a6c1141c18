"""What the messages of a reconstruction mean: which scan is chosen, and vendors' cases, each by its rule."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
from ismrmrd.xsd import ToXML, experimentalConditionsType, ismrmrdHeader

from scansteer.protocols.scan import to_yaml
from scansteer.realtime.admission import Admitted, Choice, ImageRules
from scansteer.realtime.config import GatewayConfig
from scansteer.realtime.images import image_message

SCAN = "larg-phantom-9.4T"


def test_options_and_scan_come_in_openrecons_text(fire, make_image):
    fire.begin("openrecon", text={"version": "1.0", "parameters": {"config": "other", "customconfig": SCAN, "maps_every": "3"}})
    for repetition in range(4):
        fire.send_image(make_image(repetition))
    fire.end()
    assert len(fire.maps()["fs_map"]) == 2


def test_gadgetrons_properties_are_understood(gateway, make_image, connect_peer):
    peer = connect_peer(gateway, fire=False)
    peer.begin(
        f'<configuration><property name="scan" value="{SCAN}"/>'
        "<property><name>maps_every</name><value>1</value></property></configuration>"
    )
    for repetition in range(2):
        peer.send_image(make_image(repetition))
    peer.end()
    assert len(peer.maps()["fs_map"]) == 2


def test_an_unknown_scan_is_named_and_the_images_pass(peer, make_image):
    images = [make_image(repetition) for repetition in range(2)]
    peer.begin("<configuration><scan>nowhere</scan></configuration>" if not peer.fire else "nowhere")
    for number, image in enumerate(images, start=1):
        peer.send_image(image)
        while len(peer.images) < number:
            assert not peer.closed.wait(0.01)
    assert peer.errors == []  # Gadgetron sends no more images after one
    peer.end()
    assert peer.images == images
    said = (peer.texts if peer.fire else peer.errors)[0]
    assert "nowhere" in said
    assert SCAN in said


def test_a_configuration_name_that_means_nothing_is_said_where_the_gateways_scan_is_used(service, run_gateway, make_image, connect_peer):
    peer = connect_peer(run_gateway(service.endpoint, scan=SCAN), fire=True)
    peer.begin("invertcontrast")
    peer.send_image(make_image(0))
    peer.end()
    assert any("'invertcontrast'" in text and SCAN in text for text in peer.texts)
    assert peer.maps()


def test_an_mrd_header_that_is_no_xml_is_said(fire, make_image):
    fire.begin(header="Dummy XML header")
    fire.send_image(make_image(0))
    fire.end()
    assert any("header is not XML" in text for text in fire.texts)
    assert fire.maps()


def test_a_peer_cannot_name_a_file(fire, make_image, tmp_path, scan):
    path = tmp_path / "secret.yaml"
    path.write_text(to_yaml(scan))
    fire.begin(str(path))
    fire.send_image(make_image(0))
    fire.end()
    assert "not known here" in fire.texts[0]


def test_scan_files_of_the_gateways_folder_can_be_named(service, run_gateway, make_image, tmp_path, scan, connect_peer):
    (tmp_path / "ours.yaml").write_text(to_yaml(scan.model_copy(update={"name": "ours"})))
    peer = connect_peer(run_gateway(service.endpoint, scans_dir=tmp_path), fire=True)
    peer.begin("ours")
    peer.send_image(make_image(0))
    peer.end()
    assert peer.maps()["fs_map"][0].meta["ScansteerScan"] == "ours"


def test_another_field_strength_is_refused_by_name(fire, make_image, header_of):
    fire.begin(header=header_of(field_t=3.0))
    fire.send_image(make_image(0))
    fire.end()
    assert "come from 3 T" in fire.texts[0]
    assert len(fire.images) == 1


def test_a_field_of_zero_is_one_that_is_not_known(fire, make_image, header_of):
    fire.begin(header=header_of(field_t="0.0"))
    fire.send_image(make_image(0))
    fire.end()
    assert len(fire.maps()) == 4


def wait_until_begun(gateway) -> None:
    """The gateway opens a session when its peer pauses after the header."""
    pause = threading.Event()
    while not gateway._uplinks:
        assert not pause.wait(0.01)


def test_a_scan_named_after_a_pause_is_heard(fire, make_image):
    fire.begin("a configuration of the site's own")
    assert not fire.closed.wait(0.5)  # longer than the gateway waits for more
    fire.send_text(5, json.dumps({"parameters": {"customconfig": SCAN}}))
    fire.send_image(make_image(0))
    fire.end()
    assert len(fire.maps()) == 4


def test_an_unknown_scan_named_after_a_pause_is_not_replaced_by_the_gateways_own(service, run_gateway, make_image, connect_peer):
    gateway = run_gateway(service.endpoint, scan=SCAN)
    peer = connect_peer(gateway, fire=True)
    peer.begin("a configuration of the site's own")
    wait_until_begun(gateway)
    peer.send_text(5, json.dumps({"parameters": {"scan": "nowhere"}}))
    peer.send_image(make_image(0))
    peer.end()
    assert peer.passed() == [make_image(0)]
    assert peer.maps() == {}
    assert "nowhere" in peer.texts[0]


@pytest.mark.parametrize("header", ["", "no XML at all", "<ismrmrdHeader>", '<!DOCTYPE x [<!ENTITY a "b">]><ismrmrdHeader/>'])
def test_a_missing_or_invalid_header_costs_nothing(fire, make_image, header):
    fire.begin(header=header)
    fire.send_image(make_image(0))
    fire.end()
    assert len(fire.maps()) == 4


def test_a_complete_ismrmrd_header_is_understood(fire, make_image):
    fire.begin(header=ToXML(ismrmrdHeader(experimentalConditions=experimentalConditionsType(H1resonanceFrequency_Hz=400_000_000))))
    fire.send_image(make_image(0))
    fire.end()
    assert len(fire.maps()) == 4


def test_header_counters_that_wrap_go_on(scan):
    long_scan = scan.model_copy(update={"schedule": scan.schedule * 3000})
    rules = ImageRules(Choice(long_scan, GatewayConfig(), 1))
    for repetition in range(0, 80_000, 5_000):
        verdict = rules.admit(image_message(np.ones((1, 2, 3), np.float32), repetition=repetition))
        assert isinstance(verdict, Admitted)
        assert verdict.repetition == repetition


def test_counters_of_images_that_only_pass_count_for_nothing(scan):
    rules = ImageRules(Choice(scan, GatewayConfig(), 1))
    verdicts = [rules.admit(image_message(np.ones((1, 2, 3), np.float32), repetition=value)) for value in (0, 40_000, 20_000, 1)]
    assert [isinstance(verdict, Admitted) for verdict in verdicts] == [True, False, False, True]


def test_images_that_only_pass_choose_neither_series_nor_set(scan):
    rules = ImageRules(Choice(scan, GatewayConfig(first_repetition=1), 1))
    pixels = np.ones((2, 2), np.float32)
    before = rules.admit(image_message(pixels, repetition=0, series_index=1, set=1))
    used = rules.admit(image_message(pixels, repetition=1, series_index=2, set=2))
    after = rules.admit(image_message(pixels, repetition=2, series_index=1, set=2))
    assert [type(verdict).__name__ for verdict in (before, used, after)] == ["PassedOnly", "Admitted", "PassedOnly"]
    assert "series 2 is used" in after.reason  # type: ignore[union-attr]


def test_dummies_only_pass(fire, make_image, only_session):
    fire.begin()
    fire.send_image(make_image(0, seed=70, meta={"IsDummy": "1"}))
    fire.send_image(make_image(0, seed=71, flags=1))
    fire.send_image(make_image(0))
    fire.end()
    assert len(fire.passed()) == 3
    assert only_session().n_accepted == 1


def test_leading_repetitions_can_be_declared_dummies(fire, make_image, only_session):
    fire.begin(text={"parameters": {"dummies": 2}})
    for repetition in range(5):
        fire.send_image(make_image(repetition))
    fire.end()
    assert only_session().n_accepted == 3
    assert json.loads(fire.maps()["fs_map"][0].meta["ScansteerDecision"])["repetition"] == 2


def test_one_echo_is_used(fire, make_image, only_session):
    fire.begin(text={"parameters": {"echo": "1"}})
    for repetition in range(2):
        for echo in range(3):
            fire.send_image(make_image(repetition, seed=10 * repetition + echo, contrast=echo))
    fire.end()
    assert len(fire.passed()) == 6
    assert only_session().n_accepted == 2
    assert any("echo 0, and echo 1 is used" in said for said in fire.texts)


def test_another_series_only_passes(fire, make_image, only_session):
    fire.begin()
    for repetition in range(2):
        fire.send_image(make_image(repetition, series_index=1))
        fire.send_image(make_image(repetition, seed=80, series_index=2))
    fire.end()
    assert only_session().n_accepted == 2
    assert any("belongs to series 2, and series 1 is used" in said for said in fire.texts)


def test_phase_images_and_unknown_roles_only_pass(fire, make_image, only_session):
    fire.begin()
    fire.send_image(make_image(0, meta={"DataRole": "PHASE"}))
    fire.send_image(make_image(0))
    fire.end()
    assert only_session().n_accepted == 1


def test_images_beyond_the_schedule_only_pass(fire, make_image, only_session):
    fire.begin()
    fire.send_image(make_image(0))
    fire.send_image(make_image(30))
    fire.end()
    assert only_session().n_accepted == 1
    assert any("the schedule has 30" in said for said in fire.texts)


def test_repetitions_counted_from_one(fire, make_image):
    fire.begin(text={"parameters": {"first_repetition": "1"}})
    for repetition in (1, 2, 3):
        fire.send_image(make_image(repetition))
    fire.end()
    assert fire.passed() == [make_image(repetition) for repetition in (1, 2, 3)]
    assert json.loads(fire.maps()["fs_map"][0].meta["ScansteerDecision"])["repetition"] == 2


def test_images_without_a_counter_are_counted_as_they_come(fire, make_image, only_session):
    fire.begin(text={"parameters": {"dynamic_index": "arrival"}})
    for number in range(4):
        fire.send_image(make_image(0, seed=number))
    fire.end()
    assert only_session().n_accepted == 4


def test_without_that_rule_images_of_one_repetition_are_refused_by_name(fire, make_image):
    fire.begin()
    for number in range(2):
        fire.send_image(make_image(0, seed=number))
    fire.end()
    assert any("Another image of repetition 0" in said for said in fire.texts)


def test_the_set_can_count_the_repetitions(fire, make_image):
    fire.begin(text={"parameters": {"dynamic_index": "set"}})
    for number in range(3):
        fire.send_image(make_image(0, seed=number, set=number))
    fire.end()
    assert json.loads(fire.maps()["fs_map"][0].meta["ScansteerDecision"])["n_images"] == 3


def test_maps_and_masks_are_recognised_by_their_role(serve_config, run_service, run_gateway, fake_session, make_image, connect_peer):
    setups = []

    class Recording(fake_session):
        def __init__(self, setup):
            setups.append(setup)
            super().__init__(setup)

    service = run_service(serve_config, Recording)
    peer = connect_peer(run_gateway(service.endpoint), fire=True)
    peer.begin(text={"parameters": {"n_auxiliary": "3"}})
    peer.send_image(make_image(0, meta={"DataRole": "T1"}))
    peer.send_image(make_image(0, meta={"GADGETRON_DataRole": "FREQMAP"}))
    peer.send_image(make_image(0, meta={"DataRole": "MASK"}))
    peer.send_image(make_image(0))
    peer.end()
    assert [set(setup.auxiliaries) for setup in setups] == [{"t1", "b0"}]
    assert setups[0].region is not None


def test_maps_sent_before_a_session_is_replaced_go_over_to_the_next(
    serve_config, run_service, run_gateway, fake_session, make_image, connect_peer, header_of
):
    setups = []

    class Recording(fake_session):
        def __init__(self, setup):
            setups.append(setup)
            super().__init__(setup)

    service = run_service(serve_config, Recording)
    peer = connect_peer(run_gateway(service.endpoint), fire=True)
    peer.begin(header=header_of(n_slices=3))
    peer.send_image(make_image(0, shape=(3, 5, 4), meta={"DataRole": "T1"}))
    peer.send_image(make_image(0, shape=(3, 5, 4)))
    peer.end()
    assert set(setups[-1].auxiliaries) == {"t1"}
    assert len(peer.maps()) == 4
