"""Images pass unchanged and at once, maps follow; the traps of the libraries around a stream."""

from __future__ import annotations

import json
import socket
import struct

import ismrmrd
import numpy as np
import pytest

from scansteer.realtime.images import image_message

CONFIG_FILE, CONFIG_TEXT, HEADER, CLOSE, TEXT, ERROR, ACQUISITION, IMAGE, WAVEFORM = 1, 2, 3, 4, 5, 8, 1008, 1022, 1026
SCAN = "larg-phantom-9.4T"


def test_images_pass_bit_equal_and_maps_follow_before_close(peer, make_image, only_session):
    images = [make_image(repetition, series_index=3) for repetition in range(30)]
    peer.begin(peer.config)
    for image in images:
        peer.send_image(image)
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
    assert only_session().state == "closed"


def test_images_are_passed_back_at_once(peer, make_image):
    peer.begin(peer.config)
    for repetition in range(3):
        peer.send_image(make_image(repetition))
        while len(peer.images) <= repetition:
            assert not peer.closed.wait(0.01)
    peer.end()


def test_maps_come_every_so_many_images(service, run_gateway, make_image, connect_peer):
    gateway = run_gateway(service.endpoint, maps_every=2)
    peer = connect_peer(gateway, fire=True)
    peer.begin()
    for repetition in range(3):
        peer.send_image(make_image(repetition))
    peer.end()
    maps = peer.maps()["fs_map"]
    assert [json.loads(image.meta["ScansteerDecision"])["n_images"] for image in maps] == [2, 3]
    assert [image.image_index for image in maps] == [1, 2]


def test_maps_of_the_last_image_come_once(service, run_gateway, make_image, connect_peer):
    gateway = run_gateway(service.endpoint, maps_every=2)
    peer = connect_peer(gateway, fire=True)
    peer.begin()
    for repetition in range(4):
        peer.send_image(make_image(repetition))
    peer.end()
    assert [json.loads(image.meta["ScansteerDecision"])["n_images"] for image in peer.maps()["fs_map"]] == [2, 4]


def test_acquisitions_and_waveforms_are_skipped_correctly(fire, make_image):
    acquisition = ismrmrd.Acquisition.from_array(np.ones((3, 17), np.complex64), trajectory=np.ones((17, 2), np.float32))
    waveform = ismrmrd.Waveform.from_array(np.ones((2, 9), np.uint32))
    fire.begin()
    fire.send(ACQUISITION, acquisition.to_bytes())
    fire.send_image(make_image(0))
    fire.send(WAVEFORM, waveform.to_bytes())
    fire.send_image(make_image(1))
    fire.end()
    assert fire.passed() == [make_image(0), make_image(1)]


def test_a_correct_int32_image_does_not_lose_the_stream(fire):
    images = [image_message(np.full((1, 3, 5), 7 + repetition, np.int32), repetition=repetition) for repetition in range(2)]
    assert ismrmrd.ImageHeader.from_buffer_copy(images[0]).data_type == 4
    fire.begin()
    for image in images:
        fire.send_image(image)
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
def test_announced_lengths_beyond_bounds_end_the_connection_by_name(fire, message):
    fire.begin()
    fire.socket.sendall(message)
    assert fire.closed.wait(10)
    assert "ERROR" in fire.texts[-1]


def test_a_header_that_claims_gigabytes_is_refused_before_anything_is_read(fire, make_image):
    header = ismrmrd.ImageHeader.from_buffer_copy(make_image(0))
    header.matrix_size = (65535, 65535, 1)
    fire.begin()
    fire.send_image(bytes(header) + bytes(8))
    assert fire.closed.wait(10)
    assert "4294836225 values" in fire.texts[-1]


def test_meta_of_absurd_length_is_refused_before_it_is_read(fire, make_image):
    fire.begin()
    fire.send_image(make_image(0)[:198] + struct.pack("<Q", 2**50))
    assert fire.closed.wait(10)
    assert "bytes of Meta" in fire.texts[-1]


@pytest.mark.parametrize("text", [b"<ismrmrdMeta><meta>", b"\xff\xfe", b"<!DOCTYPE a []><ismrmrdMeta/>"])
def test_meta_that_is_not_xml_costs_its_image_and_not_the_stream(fire, make_image, text):
    image = make_image(0)
    bad = image[:198] + struct.pack("<Q", len(text)) + text + image[206:]
    fire.begin()
    fire.send_image(bad)
    fire.send_image(make_image(1))
    fire.end()
    assert fire.passed() == [bad, make_image(1)]
    assert any("Meta" in said for said in fire.texts)


def test_meta_numbers_that_come_as_text_are_converted_or_refused(fire, make_image):
    fire.begin()
    fire.send_image(make_image(0, meta={"RescaleSlope": "2.5", "RescaleIntercept": "1"}))
    fire.send_image(make_image(1, meta={"RescaleSlope": "two"}))
    fire.end()
    assert any("RescaleSlope" in said for said in fire.texts)
    assert json.loads(fire.maps()["fs_map"][0].meta["ScansteerDecision"])["n_images"] == 1


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


def test_slices_become_one_volume_and_maps_come_slice_by_slice(fire, make_image, header_of):
    fire.begin(header=header_of(n_slices=3))
    for repetition in range(2):
        for slice_ in (2, 0, 1):
            fire.send_image(make_image(repetition, seed=10 * repetition + slice_, slice=slice_))
    fire.end()
    assert len(fire.passed()) == 6
    maps = fire.maps()["fs_map"]
    assert [image.slice for image in maps] == [0, 1, 2]
    assert all(image.data.shape == (1, 1, 5, 4) for image in maps)


def test_a_volume_is_believed_over_a_header_that_counts_slices(fire, make_image, header_of):
    fire.begin(header=header_of(n_slices=3))
    for repetition in range(2):
        fire.send_image(make_image(repetition, shape=(3, 5, 4)))
    fire.end()
    (image,) = fire.maps()["fs_map"]
    assert image.data.shape == (1, 3, 5, 4)
    np.testing.assert_array_equal(image.data, 2)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.uint32, np.int32, np.float32, np.float64, np.complex64, np.complex128])
def test_every_pixel_type_passes_and_is_used(fire, dtype):
    images = [image_message((np.arange(15).reshape(1, 3, 5) + 1 + r).astype(dtype), repetition=r) for r in range(2)]
    fire.begin()
    for image in images:
        fire.send_image(image)
    fire.end()
    assert fire.passed() == images
    np.testing.assert_array_equal(fire.maps()["fs_map"][0].data, 2)


def test_maps_have_the_geometry_of_images_that_were_used(fire, make_image):
    """An image of another matrix that cannot be used comes first: a map with its header would tear the stream."""
    fire.begin()
    fire.send_image(image_message(np.full((1, 8, 6), np.nan, np.float32), repetition=0))
    for repetition in (1, 2):
        fire.send_image(make_image(repetition))
    fire.end()
    maps = fire.maps()
    assert len(maps) == 4
    assert all(image.data.shape == (1, 1, 5, 4) for (image,) in maps.values())


def test_an_image_without_pixels_costs_its_repetition_and_not_the_stream(fire, make_image):
    image = make_image(0)
    header = ismrmrd.ImageHeader.from_buffer_copy(image)
    header.matrix_size = (0, 5, 1)
    n_meta = struct.unpack("<Q", image[198:206])[0]
    fire.begin()
    fire.send_image(bytes(header) + image[198 : 206 + n_meta])
    for repetition in (1, 2):
        fire.send_image(make_image(repetition))
    fire.end()
    assert len(fire.maps()) == 4


def test_a_sentence_that_quotes_the_peer_has_an_end(fire, make_image):
    image = make_image(0)
    text = b"<" + b"x" * 500_000 + b"/>"
    fire.begin()
    fire.send_image(image[:198] + struct.pack("<Q", len(text)) + text + image[206:])
    fire.end()
    assert "not <ismrmrdMeta>" in fire.texts[0]
    assert len(fire.texts[0]) < 1001


def test_a_mistake_of_ours_ends_the_connection_and_is_said(fire, make_image, monkeypatch, caplog):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("scansteer.realtime.admission.ImageRules.admit", broken)
    fire.begin()
    fire.send_image(make_image(0))
    assert fire.closed.wait(10)
    assert fire.passed() == [make_image(0)]
    assert "Internal error" in fire.texts[-1]
