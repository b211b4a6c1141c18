"""Regions of interest: the automatic foreground, and labels drawn by a person."""

from pathlib import Path

import numpy as np
import pytest

from scansteer.core.errors import InputError
from scansteer.realtime.images import Frame, Geometry
from scansteer.realtime.maps import write_volume
from scansteer.realtime.roi import Region, automatic, from_frame, from_labels, where_mapped
from scansteer.realtime.sources import open_source

Y, X = np.mgrid[:32, :40]
BRIGHT = (Y - 10) ** 2 + (X - 12) ** 2 < 36
DARK = (Y - 22) ** 2 + (X - 28) ** 2 < 36  # saturated to under half of the bright one


def picture(seed: int = 0) -> np.ndarray:
    noise = np.abs(np.random.default_rng(seed).normal(size=(2, 1, 32, 40)) * 20).sum(axis=0)
    return noise + 1000.0 * BRIGHT + 450.0 * DARK


def mask_of(voxels: np.ndarray) -> np.ndarray:
    mask = np.zeros(32 * 40, bool)
    mask[voxels] = True
    return mask.reshape(1, 32, 40)


def test_bright_and_darkened_objects_are_foreground_and_noise_is_not() -> None:
    np.testing.assert_array_equal(mask_of(automatic(picture()).voxels)[0], BRIGHT | DARK)


def test_specks_are_left_out() -> None:
    speck = picture()
    speck[0, 2, 2] = 2000.0
    assert not mask_of(automatic(speck).voxels)[0, 2, 2]


def test_noise_is_not_foreground_when_the_object_is_hardly_brighter() -> None:
    found = mask_of(automatic(0.25 * (1000.0 * BRIGHT)[None] + picture() * ~(BRIGHT | DARK)).voxels)
    assert not found[0][~BRIGHT].any()


def test_voxels_whose_maps_are_background_are_left_out() -> None:
    t1, t2 = np.full((1, 32, 40), 1500.0), np.full((1, 32, 40), 80.0)
    t1[0, 10, 12], t1[0, 10, 13], t2[0, 10, 14], t2[0, 10, 15] = 0.0, 5001.0, np.nan, 601.0
    missing = mask_of(automatic(picture()).voxels) & ~mask_of(automatic(picture(), {"t1": t1, "t2": t2}).voxels)
    assert np.flatnonzero(missing).tolist() == [10 * 40 + x for x in (12, 13, 14, 15)]
    with pytest.raises(InputError, match="t1 has the shape 1 x 32 x 39"):
        automatic(picture(), {"t1": t1[..., 1:]})


def test_a_picture_without_foreground_is_refused() -> None:
    with pytest.raises(InputError, match=r"no foreground.*--roi"):
        automatic(picture(), {"t1": np.zeros((1, 32, 40))})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [1e-6, 100.0, 1e12])
def test_a_constant_picture_has_no_foreground(value: float) -> None:
    constant = np.full((1, 32, 40), value)
    constant[0, 0, 0] *= 1 + 1e-15
    with pytest.raises(InputError, match=r"no foreground.*--roi"):
        automatic(constant)


def test_an_object_that_fills_the_picture_is_kept_whole() -> None:
    full = np.random.default_rng(1).normal(1000.0, 20.0, (1, 16, 16))
    assert len(automatic(full).voxels) == 256


@pytest.mark.parametrize("name", ["larg_phantom_9T4", "mouse_mt_7T"])
def test_the_truth_masks_of_real_scans_are_covered(real_scans: Path, name: str) -> None:
    with np.load(real_scans / f"{name}.truth.npz") as truth:
        mask = truth["mask"]
    with open_source(real_scans / f"{name}.h5") as source:
        first = source.first()
        assert first is not None
        maps = {stored.frame.role: stored.frame.pixels for stored in source.auxiliaries()}
    found = np.zeros(mask.size, bool)
    found[automatic(first.frame.pixels, maps).voxels] = True
    assert found[mask.ravel()].mean() >= 0.99
    assert found.mean() < 0.5
    assert not found.reshape(mask.shape)[[0, -1]].any()  # ghosts reach the edge of the picture, neither object does


def test_labels_become_regions_with_names(tmp_path: Path) -> None:
    labels = np.zeros((1, 3, 5))
    labels[0, 1, 4], labels[0, 2] = 2, 1
    geometry = Geometry((5, 3, 1))
    write_volume(tmp_path / "vials.nii.gz", labels, geometry, "labels", {})
    regions = from_labels(tmp_path / "vials.nii.gz", geometry)
    assert [(region.name, region.voxels.tolist()) for region in regions] == [("label 1", [10, 11, 12, 13, 14]), ("label 2", [9])]
    (tmp_path / "vials.tsv").write_text("index\tname\n1\tleft\n")
    assert [region.name for region in from_labels(tmp_path / "vials.nii.gz", geometry)] == ["left", "label 2"]
    (tmp_path / "vials.tsv").write_text("label\n1\n")
    with pytest.raises(InputError, match="columns 'index' and 'name'"):
        from_labels(tmp_path / "vials.nii.gz", geometry)


def test_labels_of_another_shape_are_refused(tmp_path: Path) -> None:
    write_volume(tmp_path / "labels.nii.gz", np.ones((1, 3, 5)), Geometry((5, 3, 1)), "labels", {})
    with pytest.raises(InputError, match=r"labels.nii.gz has 5 x 3 x 1 voxels"):
        from_labels(tmp_path / "labels.nii.gz", Geometry((3, 5, 1)))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5], "whole numbers"),
        ([0.0, -1.0], "whole numbers"),
        ([0.0, np.nan], "whole numbers"),
        ([0.0, 0.0], "marks no voxel"),
        (range(70), "at most 64"),
        ([0.0, 256.0], "up to 255"),
    ],
)
def test_what_is_not_labels_is_refused(values: list, expected: str) -> None:
    geometry = Geometry((len(values), 1, 1))
    with pytest.raises(InputError, match=expected):
        from_frame(Frame(np.array([[list(values)]], dtype=float), geometry), geometry)


def test_labels_that_came_as_an_image_must_lie_on_the_images() -> None:
    frame = Frame(np.array([[[0.0, 2.0, 1.0, 3.0]]]), Geometry((4, 1, 1)), role="mask")
    assert [region.name for region in from_frame(frame, Geometry((4, 1, 1)), ("left", "right"))] == ["left", "right", "label 3"]
    with pytest.raises(InputError, match="matrix is 4 x 1 x 1 instead of 2 x 2 x 1"):
        from_frame(frame, Geometry((2, 2, 1)))


def test_voxels_without_a_number_in_a_map_leave_their_region() -> None:
    """As every map fitted voxel by voxel has them; one of them in the posterior is enough to make its figures none."""
    t1 = np.full((1, 3, 4), 2900.0)
    t1.reshape(-1)[[1, 2, 9]] = np.nan, np.inf, np.nan
    regions = [Region("a", np.array([0, 1, 2, 3])), Region("b", np.array([5, 6]))]
    kept, said = where_mapped(regions, {"t1": t1, "b0": np.zeros((1, 3, 4))})
    assert [region.voxels.tolist() for region in kept] == [[0, 3], [5, 6]]
    assert said == ["2 voxels of region 'a' have no number in the t1 map; they are left out."]
    with pytest.raises(InputError, match="No voxel of region 'c' has a number in the t1 map"):
        where_mapped([Region("c", np.array([1, 9]))], {"t1": t1})
