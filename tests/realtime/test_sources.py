"""Stored scans: HDF5 and stream, in order, with their maps; cut-off files; files that do not fit the scan."""

import io
import struct
from pathlib import Path

import h5py
import ismrmrd
import numpy as np
import pytest

from scansteer.core.errors import InputError, ScansteerError
from scansteer.protocols.builtin import BUILTIN
from scansteer.realtime.images import decode_frame
from scansteer.realtime.sources import check_against, open_source

SCAN = BUILTIN["larg-phantom-9.4T"]
XML = b"""<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><acquisitionSystemInformation>
<systemFieldStrength_T>9.4</systemFieldStrength_T></acquisitionSystemInformation><sequenceParameters><TR>4000</TR>
<flipAngle_deg>60</flipAngle_deg></sequenceParameters></ismrmrdHeader>"""


def pixels(number: int, shape: tuple[int, ...] = (3, 5)) -> np.ndarray:
    return (np.arange(np.prod(shape)).reshape(shape) + 100 * number).astype(np.uint16)


def image(number: int, repetition: int | None = None, role: str = "Image", **kwargs) -> ismrmrd.Image:
    repetition = number if repetition is None else repetition
    made = ismrmrd.Image.from_array(pixels(number, **kwargs), transpose=False, repetition=repetition)
    made.meta = {"DataRole": role}
    return made


def write_hdf5(path: Path, groups: dict[str, list[ismrmrd.Image]], xml: bytes | None = XML) -> Path:
    with ismrmrd.Dataset(str(path), "dataset", mode="w") as dataset:
        if xml is not None:
            dataset.write_xml_header(xml)
        for group, images in groups.items():
            for one in images:
                dataset.append_image(group, one)
    return path


def stream_of(images: list[ismrmrd.Image], xml: bytes = XML) -> bytes:
    parts = [struct.pack("<H1024s", 1, b"config"), struct.pack("<HI", 3, len(xml)) + xml, struct.pack("<HI", 5, 3) + b"{}\0"]
    parts += [struct.pack("<H", 1022) + one.to_bytes() for one in images]
    return b"".join(parts) + struct.pack("<H", 4)


def repetitions(path: Path) -> list[int]:
    with open_source(path) as source:
        return [stored.frame.repetition for stored in source.images()]


def test_hdf5_images_come_in_the_order_of_repetitions(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "scan.h5", {"image_0": [image(n) for n in (2, 0, 1)]})
    with open_source(path) as source:
        assert source.n_images == 3
        assert (source.header.field_t, source.header.flip_deg, source.header.tr_ms) == (9.4, 60.0, 4000.0)
        for number, stored in enumerate(source.images()):
            np.testing.assert_array_equal(stored.frame.pixels, pixels(number)[None])
            np.testing.assert_array_equal(ismrmrd.Image.from_bytes(stored.message).data, pixels(number)[None, None])


def test_a_stream_gives_the_same_messages_as_hdf5(tmp_path: Path) -> None:
    images = [image(n) for n in (0, 2, 1)]
    (tmp_path / "scan.mrd").write_bytes(stream_of(images))
    with open_source(tmp_path / "scan.mrd") as stream, open_source(write_hdf5(tmp_path / "scan.h5", {"im": images})) as hdf5:
        assert [stored.message for stored in stream.images()] == [stored.message for stored in hdf5.images()]
        assert stream.header == hdf5.header


def test_acquisitions_and_waveforms_in_a_stream_are_skipped(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    acquisition = ismrmrd.Acquisition.from_array(np.ones((4, 16), np.complex64))
    acquisition.serialize_into(buffer.write)
    waveform = struct.pack("<H", 1026) + bytes(ismrmrd.WaveformHeader(channels=2, number_of_samples=3)) + bytes(24)
    error = struct.pack("<HQ", 8, 2) + b"no"
    before = struct.pack("<H", 1008) + buffer.getvalue() + waveform + error
    (tmp_path / "scan.mrd").write_bytes(before + stream_of([image(0), image(1)]))
    assert repetitions(tmp_path / "scan.mrd") == [0, 1]


def test_complex_hdf5_images_are_read(tmp_path: Path) -> None:
    made = ismrmrd.Image.from_array((pixels(1) * (3 + 4j)).astype(np.complex64), transpose=False)
    with open_source(write_hdf5(tmp_path / "scan.h5", {"images": [made]})) as source:
        first = source.first()
    assert first is not None
    np.testing.assert_allclose(first.frame.pixels[0], 5.0 * pixels(1))


def test_maps_come_from_meta_or_from_the_name_of_their_group(tmp_path: Path) -> None:
    groups = {"image_0": [image(0), image(1)], "extra": [image(7, 0, "T1")], "T2": [image(8, 0)], "FREQMAP": [image(9, 0)]}
    with open_source(write_hdf5(tmp_path / "scan.h5", groups)) as source:
        stored = {one.frame.role: one for one in source.auxiliaries()}
        assert set(stored) == {"t1", "t2", "b0"}
        np.testing.assert_array_equal(stored["t2"].frame.pixels[0], pixels(8))
        assert {role: decode_frame(one.message).role for role, one in stored.items()} == {role: role for role in stored}
        assert source.n_images == 2


def test_maps_in_a_stream_are_told_from_images_of_the_same_series(tmp_path: Path) -> None:
    (tmp_path / "scan.mrd").write_bytes(stream_of([image(5, 0, "T1"), image(0), image(1)]))
    with open_source(tmp_path / "scan.mrd") as source:
        assert [one.frame.role for one in source.auxiliaries()] == ["t1"]
        assert source.n_images == 2


def test_a_second_series_that_repeats_the_first_is_left_out_and_one_that_continues_it_is_not(tmp_path: Path) -> None:
    groups = {"image_2": [image(2)], "image_10": [image(0), image(1)], "image_11": [image(1)]}
    with open_source(write_hdf5(tmp_path / "scan.h5", groups)) as source:
        assert [stored.frame.repetition for stored in source.images()] == [0, 1, 2]
        assert any("'image_11' repeats repetitions" in warning for warning in source.warnings)


def test_dummies_are_not_counted(tmp_path: Path) -> None:
    with open_source(write_hdf5(tmp_path / "scan.h5", {"image_0": [image(0, role="Dummy"), image(1), image(2)]})) as source:
        assert source.n_images == 2
        assert [stored.frame.repetition for stored in source.images()] == [0, 1]
        assert [decode_frame(stored.message).repetition for stored in source.images()] == [0, 1]
        assert source.first().frame.repetition == 0
        assert any("1 images are declared dummies" in warning for warning in source.warnings)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.97])
def test_a_cut_hdf5_file_gives_what_came_before_and_then_says_where_it_ends(tmp_path: Path, share: float) -> None:
    path = write_hdf5(tmp_path / "scan.h5", {"image_0": [image(n, shape=(40, 50)) for n in range(12)]})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with open_source(path) as source:
        count = 0
        with pytest.raises(ScansteerError, match=r"scan.h5 is cut off after \d+ of \d+ bytes: \d+ images came before"):
            for stored in source.images():
                np.testing.assert_array_equal(stored.frame.pixels[0], pixels(count, (40, 50)))
                count += 1
        assert 12 * share - 4 <= count < 12


def test_a_cut_file_without_chunks_gives_the_images_before_the_cut(tmp_path: Path) -> None:
    made = [image(n, shape=(40, 50)) for n in range(4)]
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        group = file.create_group("dataset/image_0")
        group["header"] = np.stack([np.frombuffer(one.getHead(), ismrmrd.hdf5.image_header_dtype)[0] for one in made])
        group["data"] = np.stack([one.data for one in made])
        data = group["data"]
        assert isinstance(data, h5py.Dataset) and data.chunks is None
        end = data.id.get_offset() + 3 * 40 * 50 * 2  # bytes up to the end of image 2
    whole = (tmp_path / "scan.h5").read_bytes()
    for length, expected in ((end, [0, 1, 2]), (end - 1, [0, 1])):
        (tmp_path / "scan.h5").write_bytes(whole[:length])
        seen = []
        with open_source(tmp_path / "scan.h5") as source, pytest.raises(ScansteerError, match="is cut off"):
            seen.extend(stored.frame.repetition for stored in source.images())
        assert seen == expected


def test_maps_that_a_cut_took_are_named(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "scan.h5", {"image_0": [image(0, shape=(40, 50))], "T1": [image(1, shape=(40, 50))]})
    path.write_bytes(path.read_bytes()[:-5000])
    with open_source(path) as source:
        assert list(source.auxiliaries()) == []
        assert any("'T1' is lost with the end of the file" in warning for warning in source.warnings)
        assert source.n_images == 1


def test_an_hdf5_file_cut_off_before_its_images_is_refused(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "scan.h5", {"image_0": [image(0)]})
    whole = path.read_bytes()
    for length in (20, 100, 1000, 3000):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"scan\.h5"):
            open_source(path)


def test_a_cut_stream_gives_what_came_before_and_then_says_where_it_ends(tmp_path: Path) -> None:
    whole = stream_of([image(n) for n in range(3)])
    path = tmp_path / "scan.mrd"
    path.write_bytes(whole[:-40])
    seen = []
    expected = r"cut off within the message at byte \d+ of \d+: 2 images"
    with open_source(path) as source, pytest.raises(ScansteerError, match=expected):
        seen.extend(stored.frame.repetition for stored in source.images())
    with open_source(path) as source:
        assert check_against(source, SCAN.model_copy(update={"matrix": None})) == []  # fewer images than planned are expected now
        assert source.is_cut


def test_an_unknown_message_ends_a_stream_by_name(tmp_path: Path) -> None:
    stream = stream_of([image(0), image(1)])[:-2] + struct.pack("<H", 77) + b"junk"
    (tmp_path / "scan.mrd").write_bytes(stream)
    with open_source(tmp_path / "scan.mrd") as source, pytest.raises(ScansteerError, match=r"unknown message \(77\).*2 images"):
        list(source.images())


def test_a_header_that_claims_too_much_ends_a_stream_by_name(tmp_path: Path) -> None:
    huge = ismrmrd.ImageHeader(data_type=5, channels=1, matrix_size=(65535, 65535, 1))
    (tmp_path / "scan.mrd").write_bytes(stream_of([image(0)])[:-2] + struct.pack("<H", 1022) + bytes(huge) + bytes(8))
    with open_source(tmp_path / "scan.mrd") as source, pytest.raises(ScansteerError, match="4294836225 values"):
        list(source.images())


@pytest.mark.parametrize("content", [b"", b"hello, world", b"yardl\x01\x00", b"\x89HDF\r\n\x1a\n and then nonsense"])
def test_what_is_not_mrd_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "scan.h5"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"scan\.h5 is (not an? |an MRD version 2)"):
        open_source(path)


def test_hdf5_of_another_kind_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file["a"], file["b"] = [1], [2]
    with pytest.raises(InputError, match=r"no group 'dataset' \(found: a, b\)"):
        open_source(tmp_path / "scan.h5")
    with pytest.raises(InputError, match=r"holds no images"):
        open_source(write_hdf5(tmp_path / "empty.h5", {}))
    with pytest.raises(InputError, match=r"Cannot read .*missing.h5"):
        open_source(tmp_path / "missing.h5")


def matching(tmp_path: Path, n_images: int = 30, shape: tuple[int, ...] = (64, 64), xml: bytes | None = XML) -> Path:
    return write_hdf5(tmp_path / "scan.h5", {"image_0": [image(n, shape=shape) for n in range(n_images)]}, xml)


def test_a_file_that_fits_its_scan_passes_without_a_word(tmp_path: Path) -> None:
    with open_source(matching(tmp_path)) as source:
        assert check_against(source, SCAN) == []
        assert source.warnings == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"xml": XML.replace(b"9.4", b"7")}, r"at 7 T, but scan 'larg-phantom-9.4T' is for 9.4 T"),
        ({"shape": (64, 32)}, r"matrix of 32 x 64 x 1, but .* is for 64 x 64 x 1"),
        ({"n_images": 29}, r"images of 29 repetitions, but the schedule of .* has 30"),
    ],
)
def test_a_file_of_another_scan_is_refused(tmp_path: Path, change: dict, expected: str) -> None:
    with open_source(matching(tmp_path, **change)) as source, pytest.raises(InputError, match=expected):
        check_against(source, SCAN)


def test_a_scan_that_was_ended_early_is_taken_where_no_more_images_are_wanted(tmp_path: Path) -> None:
    with open_source(matching(tmp_path, n_images=12)) as source:
        assert check_against(source, SCAN, 12) == []
        with pytest.raises(InputError, match="--images 12"):
            check_against(source, SCAN)
        with pytest.raises(InputError, match="12 repetitions"):
            check_against(source, SCAN, 13)


@pytest.mark.parametrize(("lost", "named"), [((4,), "repetition 4"), ((0, 5, 6, 7, 9), "repetitions 0, 5 to 7, 9")])
def test_missing_repetitions_are_told_from_a_scan_that_was_ended_early(tmp_path: Path, lost: tuple[int, ...], named: str) -> None:
    shape, n = (64, 64), 30 - len(lost)
    images = [image(number, shape=shape) for number in range(30) if number not in lost]
    with open_source(write_hdf5(tmp_path / "scan.h5", {"image_0": images})) as source:
        assert source.missing() == [*lost]
        with pytest.raises(InputError, match=f"it lacks {named} in between: --images {n} replays") as refused:
            check_against(source, SCAN)
        assert "ended early" not in str(refused.value)
        assert check_against(source, SCAN, n) == [f"{source.path} has no image of {named}: what the schedule plays there is simulated."]
        if lost[0] > 0:
            assert check_against(source, SCAN, lost[0]) == []


def test_a_file_with_too_many_images_is_another_scans(tmp_path: Path) -> None:
    with open_source(matching(tmp_path, n_images=31)) as source, pytest.raises(InputError, match=r"has 30; choose .* schedule\.$"):
        check_against(source, SCAN)


def test_other_flip_angle_and_repetition_time_are_warned_about(tmp_path: Path) -> None:
    xml = XML.replace(b"<TR>4000", b"<TR>3500").replace(b"_deg>60", b"_deg>90")
    with open_source(matching(tmp_path, xml=xml)) as source:
        flip, repetition_time = check_against(source, SCAN)
    assert flip == "The file says a flip angle of 90 degrees; the scan's 60 are used."
    assert repetition_time == "The file says a repetition time of 3.5 s; the scan's 4 s are used."


@pytest.mark.parametrize("xml", [None, b"<broken", b"<!DOCTYPE a><a/>", b"<ismrmrdHeader/>"])
def test_headers_that_say_nothing_are_warned_about(tmp_path: Path, xml: bytes | None) -> None:
    with open_source(matching(tmp_path, xml=xml)) as source:
        assert check_against(source, SCAN) == ["The file does not say its field strength; 9.4 T is assumed."]
        assert len(source.warnings) == (xml != b"<ismrmrdHeader/>")


@pytest.mark.parametrize(("name", "maps"), [("larg_phantom_9T4", []), ("mouse_mt_7T", ["t1", "t2"])])
def test_real_scans_are_read(real_scans: Path, name: str, maps: list[str]) -> None:
    with open_source(real_scans / f"{name}.h5") as source:
        assert [one.frame.role for one in source.auxiliaries()] == maps
        assert [stored.frame.repetition for stored in source.images()] == list(range(30))
