"""Maps: NIfTI in and out without flips, units, and other geometries refused."""

import gzip
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from scansteer.core.errors import InputError
from scansteer.realtime.images import Geometry
from scansteer.realtime.maps import from_file, is_ours, read_volume, write_volume

PLACED = Geometry((5, 3, 2), (50.0, 30.0, 8.0), (1.0, 2.0, 3.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
UNPLACED = Geometry((5, 3, 2), (50.0, 30.0, 8.0))
VALUES = np.arange(30.0).reshape(2, 3, 5)


@pytest.mark.parametrize("geometry", [PLACED, UNPLACED])
def test_a_written_map_is_read_back_and_lies_in_matrix_order(tmp_path: Path, geometry: Geometry) -> None:
    path = tmp_path / "fs_map.nii.gz"
    values = np.where(VALUES == 7, np.nan, VALUES)
    write_volume(path, values, geometry, "fs_map", {"scan": "x"})
    image = nibabel.load(path)
    assert image.shape == (5, 3, 2)
    assert image.dataobj[4, 1, 0] == VALUES[0, 1, 4]  # x, y, z: a stored row is y
    np.testing.assert_allclose(image.affine, geometry.affine(), atol=1e-5)
    np.testing.assert_array_equal(read_volume(path, geometry), values)


def test_a_written_map_tells_where_it_comes_from(tmp_path: Path) -> None:
    path = tmp_path / "nrmse.nii.gz"
    write_volume(path, VALUES, UNPLACED, "nrmse", {"scan": "larg", "versions": {"scansteer": "0"}})
    told = json.loads(nibabel.load(path).header.extensions[0].get_content().rstrip(b"\0"))
    assert told == {"map": "nrmse", "scan": "larg", "versions": {"scansteer": "0"}, "orientation": "unknown: identity is assumed"}


def test_a_flat_file_serves_a_single_slice(tmp_path: Path) -> None:
    geometry = Geometry((5, 3, 1))
    nibabel.save(nibabel.Nifti1Image(VALUES[0].T, np.eye(4)), tmp_path / "t1.nii")
    frame = from_file("t1", tmp_path / "t1.nii", geometry)
    assert (frame.role, frame.geometry) == ("t1", geometry)
    np.testing.assert_array_equal(frame.pixels, VALUES[:1])


def test_another_matrix_or_place_is_refused(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(VALUES.T, PLACED.affine()), tmp_path / "t1.nii")
    read_volume(tmp_path / "t1.nii", PLACED)
    with pytest.raises(InputError, match=r"has 5 x 3 x 2 voxels \(x, y, z\), the images 3 x 5 x 2"):
        read_volume(tmp_path / "t1.nii", Geometry((3, 5, 2)))
    nibabel.save(nibabel.Nifti1Image(VALUES.T, np.diag([1.0, -1.0, 1.0, 1.0]) @ PLACED.affine()), tmp_path / "flipped.nii")
    with pytest.raises(InputError, match="lies elsewhere"):
        read_volume(tmp_path / "flipped.nii", PLACED)
    read_volume(tmp_path / "flipped.nii", UNPLACED)  # images that do not say where they lie can contradict nobody


def test_files_that_are_not_nifti_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.nii.gz").write_bytes(b"no")
    for path in ("bad.nii.gz", "missing.nii.gz"):
        with pytest.raises(InputError, match=f"Cannot read .*{path} as NIfTI"):
            read_volume(tmp_path / path, UNPLACED)
    write_volume(tmp_path / "whole.nii.gz", VALUES, UNPLACED, "t1", {})
    (tmp_path / "cut.nii.gz").write_bytes((tmp_path / "whole.nii.gz").read_bytes()[:-20])
    with pytest.raises(InputError, match="Cannot read"):
        read_volume(tmp_path / "cut.nii.gz", UNPLACED)
    with pytest.raises(InputError, match=r"Unknown auxiliary map 't3'; known are t1 \[ms\]"):
        from_file("t3", tmp_path / "whole.nii.gz", UNPLACED)


def test_only_what_was_written_under_a_name_is_ours(tmp_path: Path) -> None:
    write_volume(tmp_path / "fs_map.nii.gz", np.ones((1, 3, 2)), Geometry((2, 3, 1)), "fs_map", {})
    written = gzip.decompress((tmp_path / "fs_map.nii.gz").read_bytes())
    (tmp_path / "copy.nii.gz").write_bytes(gzip.compress(written))
    (tmp_path / "odd.nii.gz").write_bytes(gzip.compress(written[:70] + b"\xff\x7f" + written[72:]))  # a data type that there is not
    (tmp_path / "torn.nii.gz").write_bytes(written[:100])
    assert {path.name for path in tmp_path.iterdir() if is_ours(path)} == {"fs_map.nii.gz"}
    with pytest.raises(InputError, match="odd"):
        read_volume(tmp_path / "odd.nii.gz", Geometry((2, 3, 1)))
