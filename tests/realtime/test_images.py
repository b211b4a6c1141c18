"""MRD image messages: decoding, placement, roles, and every way of being malformed."""

import ismrmrd
import numpy as np
import pytest

from scansteer.core.errors import InputError
from scansteer.realtime.images import HEADER_BYTES, Frame, Geometry, check_usable, decode_frame, encode_frame, image_message, open_image

PIXELS = np.arange(3 * 5, dtype=np.uint16).reshape(3, 5)  # not square: 5 along x, 3 along y
GEOMETRY = Geometry((5, 3, 1), (50.0, 30.0, 4.0), (1.0, 2.0, 3.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


def header_with(message: bytes, **fields: object) -> bytes:
    header = ismrmrd.ImageHeader.from_buffer_copy(message[:HEADER_BYTES])
    for name, value in fields.items():
        setattr(header, name, value)
    return bytes(header) + message[HEADER_BYTES:]


def test_a_message_of_ismrmrd_is_decoded() -> None:
    image = ismrmrd.Image.from_array(PIXELS, transpose=False, repetition=7, slice=2, image_series_index=4)
    image.field_of_view = (50, 30, 4)
    image.meta = {"DataRole": "Image", "Comment": "a"}
    frame = decode_frame(image.to_bytes())
    np.testing.assert_array_equal(frame.pixels, PIXELS[None])
    assert (frame.repetition, frame.slice, frame.series_index, frame.data_type) == (7, 2, 4, 1)
    assert frame.geometry.matrix == (5, 3, 1)
    assert frame.geometry.field_of_view_mm == (50.0, 30.0, 4.0)
    assert frame.role == "image"
    assert frame.meta["Comment"] == "a"


def test_an_opened_image_leaves_its_values_where_they_are() -> None:
    message = image_message(PIXELS[None], repetition=0)
    sent = open_image(message)
    assert np.shares_memory(sent.values, np.frombuffer(message, np.uint8))
    np.testing.assert_array_equal(sent.values[0, 0], PIXELS)


@pytest.mark.parametrize("dtype", ["u2", "i2", "u4", "f4", "f8", "c8", "c16"])
def test_a_message_is_what_ismrmrd_reads(dtype: str) -> None:
    message = image_message(PIXELS.astype(dtype), GEOMETRY, repetition=3, meta={"DataRole": ["Quantitative", "fs"]})
    image = ismrmrd.Image.from_bytes(message)
    np.testing.assert_array_equal(image.data, PIXELS[None, None])
    assert image.repetition == 3
    assert image.meta["DataRole"] == ["Quantitative", "fs"]
    np.testing.assert_array_equal(decode_frame(message).pixels, PIXELS[None])


def test_type_4_is_a_32_bit_integer_and_ismrmrds_64_bits_are_understood() -> None:
    standard = image_message(PIXELS.astype(np.int32) - 4)
    assert len(standard) == HEADER_BYTES + 8 + 15 * 4
    np.testing.assert_array_equal(decode_frame(standard).pixels[0], PIXELS - 4.0)
    python = ismrmrd.Image.from_array(PIXELS.astype(np.int64) - 4, transpose=False).to_bytes()
    np.testing.assert_array_equal(decode_frame(python).pixels[0], PIXELS - 4.0)


def test_complex_becomes_magnitude_and_channels_are_combined_by_root_sum_of_squares() -> None:
    both = np.stack([np.full((2, 3, 5), 3.0), np.full((2, 3, 5), 4.0)])
    np.testing.assert_allclose(decode_frame(image_message(both)).pixels, np.full((2, 3, 5), 5.0))
    np.testing.assert_allclose(decode_frame(image_message((3 + 4j) * np.ones((3, 5), np.complex64))).pixels, 5.0)


def test_rescale_is_applied_and_negative_values_survive() -> None:
    frame = decode_frame(image_message(PIXELS, meta={"RescaleSlope": "0.5", "RescaleIntercept": "-2"}))
    np.testing.assert_array_equal(frame.pixels[0], PIXELS * 0.5 - 2)


@pytest.mark.parametrize(
    ("meta", "role"),
    [
        ({}, "image"),
        ({"DataRole": "Image"}, "image"),
        ({"DataRole": "T1"}, "t1"),
        ({"GADGETRON_DataRole": "T2MAP"}, "t2"),
        ({"DataRole": ["Quantitative", "FREQMAP"]}, "b0"),
        ({"DataRole": "b1map"}, "b1"),
        ({"DataRole": ["Quantitative", "FSS"]}, "fss"),
        ({"DataRole": ["Quantitative", "KSSW"]}, "kssw"),
        ({"DataRole": "Segmentation"}, "mask"),
        ({"DataRole": "T1SDMAP"}, "other"),
    ],
)
def test_the_role_comes_from_meta(meta: dict, role: str) -> None:
    assert decode_frame(image_message(PIXELS, meta=meta)).role == role


@pytest.mark.parametrize(
    ("role", "unit", "factor"),
    [("T1", "ms", 1), ("T2", "s", 1000), ("T2", "us", 0.001), ("FREQMAP", "Hz", 1), ("B1MAP", "%", 0.01)],
)
def test_maps_in_other_units_are_converted(role: str, unit: str, factor: float) -> None:
    frame = decode_frame(image_message(PIXELS, meta={"DataRole": role, "Unit": unit}))
    np.testing.assert_allclose(frame.pixels[0], PIXELS * factor)
    np.testing.assert_allclose(decode_frame(encode_frame(frame)).pixels, frame.pixels, rtol=1e-6)  # float32 on the way


def test_maps_in_unknown_units_are_refused() -> None:
    with pytest.raises(InputError, match="unit is 'furlong'; give it in ms"):
        decode_frame(image_message(PIXELS, meta={"DataRole": "T1", "Unit": "furlong"}))


def test_phase_images_are_not_data() -> None:
    assert decode_frame(header_with(image_message(PIXELS), image_type=2)).role == "other"


def test_dummies_are_recognised_by_flag_role_and_meta() -> None:
    assert decode_frame(image_message(PIXELS, flags=1)).is_dummy
    assert decode_frame(image_message(PIXELS, meta={"DataRole": "Dummy"})).is_dummy
    assert decode_frame(image_message(PIXELS, meta={"IsDummy": "true"})).is_dummy
    assert not decode_frame(image_message(PIXELS)).is_dummy


def test_encoding_a_frame_keeps_what_it_says() -> None:
    meta = {"DataRole": "T1", "RescaleSlope": "2"}
    frame = decode_frame(image_message(PIXELS, GEOMETRY, repetition=2, set=1, series_index=9, meta=meta))
    again = decode_frame(encode_frame(frame))
    np.testing.assert_array_equal(again.pixels, 2.0 * PIXELS[None])
    assert (again.role, again.repetition, again.set, again.series_index, again.geometry) == ("t1", 2, 1, 9, GEOMETRY)


def test_encoding_names_the_role_that_meta_does_not_name() -> None:
    for role in ("image", "t1", "b0", "kssw", "mask"):
        frame = Frame(np.ones((1, 3, 5)), GEOMETRY, role=role, is_dummy=True)
        again = decode_frame(encode_frame(frame))
        assert (again.role, again.is_dummy) == (role, True)


MALFORMED = {
    "short header": (lambda m: m[:100], "fewer than an MRD image header"),
    "pixels cut": (lambda m: m[:-1], "29 bytes of pixels, its header declares 30"),
    "pixels too many": (lambda m: m + b"\0", "31 bytes of pixels"),
    "one element only": (lambda m: m[: HEADER_BYTES + 8 + 2], "2 bytes of pixels"),
    "data type": (lambda m: header_with(m, data_type=9), "data_type 9"),
    "huge": (lambda m: header_with(m, matrix_size=(65535, 65535, 1)), "declares 4294836225 values"),
    "huge channels": (lambda m: header_with(m, channels=65535, matrix_size=(65535, 65535, 65535)), "more than the"),
    "empty": (lambda m: header_with(m, matrix_size=(0, 3, 1)), "no voxels"),
    "no channel": (lambda m: header_with(m, channels=0), "no voxels"),
    "meta beyond end": (lambda m: m[:HEADER_BYTES] + (999).to_bytes(8, "little") + m[HEADER_BYTES + 8 :], "ends after 30"),
    "meta huge": (lambda m: m[:HEADER_BYTES] + (2**63).to_bytes(8, "little") + m[HEADER_BYTES + 8 :], "bytes of Meta, more than"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_message_is_refused_by_name(name: str) -> None:
    spoil, expected = MALFORMED[name]
    with pytest.raises(InputError, match=expected):
        decode_frame(spoil(image_message(PIXELS)))


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        (b"<ismrmrdMeta><meta>", "not XML"),
        (b"<!DOCTYPE x [<!ENTITY a 'b'>]><ismrmrdMeta/>", "document type"),
        (b"\xff\xfe<", "not UTF-8"),
        (b"<other/>", "<other>"),
        (b"<ismrmrdMeta><meta><name>RescaleSlope</name><value>nan</value></meta></ismrmrdMeta>", "must be a number"),
        (b"<ismrmrdMeta><meta><name>RescaleSlope</name><value>0</value></meta></ismrmrdMeta>", "must be positive"),
    ],
)
def test_bad_meta_is_refused_by_name(meta: bytes, expected: str) -> None:
    message = image_message(PIXELS)
    spoilt = message[:HEADER_BYTES] + len(meta).to_bytes(8, "little") + meta + message[HEADER_BYTES + 8 :]
    with pytest.raises(InputError, match=expected):
        decode_frame(spoilt)


def test_meta_may_end_in_a_nul() -> None:
    text = b"<ismrmrdMeta><meta><name>DataRole</name><value>T1</value></meta></ismrmrdMeta>\0"
    message = image_message(PIXELS)
    padded = message[:HEADER_BYTES] + len(text).to_bytes(8, "little") + text + message[HEADER_BYTES + 8 :]
    assert decode_frame(padded).role == "t1"


def test_the_callers_bound_is_obeyed() -> None:
    with pytest.raises(InputError, match="more than the 14"):
        decode_frame(image_message(PIXELS), max_voxels=14)


def test_empty_and_not_finite_pictures_are_not_usable() -> None:
    spoilt = PIXELS.astype(np.float32)
    spoilt[0, 1] = np.nan
    with pytest.raises(InputError, match="repetition 4 has 1 NaN or infinite"):
        check_usable(decode_frame(image_message(spoilt, repetition=4)))
    with pytest.raises(InputError, match="repetition 5 is zero everywhere"):
        check_usable(decode_frame(image_message(0 * PIXELS, repetition=5)))
    check_usable(decode_frame(image_message(PIXELS)))


@pytest.mark.parametrize(
    ("largest", "usable"),
    [(1e300, False), (3e38, False), (9e11, True), (2e-6, True), (9e-7, False), (1e-11, False), (1e-45, False), (1e-300, False)],
)
def test_pixels_whose_products_leave_the_range_of_numbers_are_refused(largest, usable) -> None:
    frame = decode_frame(image_message(PIXELS / PIXELS.max() * largest, repetition=5))
    if usable:
        check_usable(frame)
    else:
        with pytest.raises(InputError, match=r"repetition 5 has pixels of up to .* rescale it"):
            check_usable(frame)


def test_signalling_nan_is_decoded_without_a_warning() -> None:
    body = bytearray(image_message(PIXELS.astype(np.float32)))
    body[-4:] = b"\x01\x00\x80\x7f"  # a float32 NaN whose quiet bit is not set: converting it raises the invalid flag
    with pytest.raises(InputError, match="1 NaN or infinite"):
        check_usable(decode_frame(bytes(body)))


def test_types_that_mrd_lacks_are_refused() -> None:
    with pytest.raises(InputError, match="int64"):
        image_message(PIXELS.astype(np.int64))
    with pytest.raises(InputError, match="geometry is for a matrix 5 x 3 x 1"):
        image_message(PIXELS.T, GEOMETRY)


def test_lps_becomes_ras() -> None:
    affine = GEOMETRY.affine()
    np.testing.assert_allclose(affine[:3, :3], np.diag([-10.0, -10.0, 4.0]))
    np.testing.assert_allclose(affine @ [2.0, 1.0, 0.0, 1.0], [-1.0, -2.0, 3.0, 1.0])  # the centre of 5 x 3 x 1 voxels


def test_oblique_directions_are_kept() -> None:
    c, s = np.cos(0.3), np.sin(0.3)
    oblique = Geometry((4, 4, 2), (8.0, 8.0, 6.0), (0.0, 0.0, 0.0), (c, s, 0.0), (-s, c, 0.0), (0.0, 0.0, 1.0))
    np.testing.assert_allclose(oblique.affine()[:3, 0], [-2 * c, -2 * s, 0.0])


@pytest.mark.parametrize("read_dir", [(0.0, 0.0, 0.0), (np.nan, 0.0, 0.0), (0.7, 0.7, 0.0), (5.0, 0.0, 0.0)])
def test_directions_that_cannot_be_believed_mean_identity(read_dir: tuple) -> None:
    unplaced = Geometry((4, 2, 1), (8.0, 8.0, 3.0), (0.0, 0.0, 0.0), read_dir, (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    assert not unplaced.is_oriented
    np.testing.assert_allclose(unplaced.affine()[:3, :3], np.diag([2.0, 4.0, 3.0]))


def test_another_geometry_is_named() -> None:
    assert GEOMETRY.difference(GEOMETRY) is None
    assert GEOMETRY.difference(Geometry((5, 4, 1))) == "its matrix is 5 x 4 x 1 instead of 5 x 3 x 1"
    moved = Geometry((5, 3, 1), (50.0, 30.0, 4.0), (1.0, 2.0, 8.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    assert GEOMETRY.difference(moved) == "its position_mm is (1, 2, 8) instead of (1, 2, 3)"
