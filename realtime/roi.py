"""Regions of interest: found in the first usable image, or drawn by a person. Frozen from then on."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from scansteer.core.errors import InputError
from scansteer.realtime.images import Frame, Geometry, by
from scansteer.realtime.maps import read_volume

MAX_T1_MS = 5000.0
MAX_T2_MS = 600.0
_NOISE_FACTOR = 3.5  # Rayleigh noise exceeds this many medians in 2e-4 of its pixels
_SMALLEST_PART = 0.02  # of the largest connected part
_ONE_LEVEL = 1e-9  # values that spread less than this part of the largest cannot be told apart in 256 bins
_MAX_REGIONS = 64
_MAX_LABEL = 255


@dataclass(frozen=True)
class Region:
    """Voxels that are reported together."""

    name: str
    voxels: np.ndarray
    """Flat indices into the (z, y, x) array in C order, ascending, int64."""


def automatic(pixels: np.ndarray, auxiliaries: Mapping[str, np.ndarray] | None = None) -> Region:
    """The foreground of the first usable image.

    A voxel belongs to it when its value exceeds half of Otsu's threshold (half, so that tissue darkened by the first pulse stays)
    and the noise of the darkest corner, when its T1 and T2, if mapped, are those of tissue, and when its connected part has at
    least 2 % of the voxels of the largest one (ghosts and specks do not).

    Parameters
    ----------
    pixels
        Shape (z, y, x).
    auxiliaries
        Maps of that shape by role; `t1` and `t2` [ms] are looked at: zero, negative, not finite, above 5 000 or 600 ms
        is background.

    Raises
    ------
    InputError
        Nothing is left.
    """
    foreground = (np.abs(pixels) > _threshold(np.abs(pixels))) & _tissue(pixels.shape, auxiliaries or {})
    foreground = _without_specks(foreground)
    if not foreground.any():
        raise InputError("The first image has no foreground (with T1 and T2 of tissue, if mapped); draw it: --roi LABELS.nii.gz.")
    return Region("foreground", np.flatnonzero(foreground))


def from_labels(path: str | Path, geometry: Geometry) -> list[Region]:
    """Regions drawn in a NIfTI label image: 0 is background, every other whole number one region; see `labels_from_file`."""
    frame, names = labels_from_file(path, geometry)
    return from_frame(frame, geometry, names)


def labels_from_file(path: str | Path, geometry: Geometry) -> tuple[Frame, tuple[str, ...]]:
    """A NIfTI label image as if it had come as an image, and the names of the labels 1, 2, ..

    Names come from a table beside it (LABELS.tsv, columns `index` and `name`, as BIDS has it), else "label 1" and so on.

    Raises
    ------
    InputError
        Not readable, of another matrix or place, or not labels.
    """
    path = Path(path)
    labels = read_volume(path, geometry)
    numbers = _check_labels(labels, str(path))
    names = _label_names(path)
    listed = tuple(names.get(number, f"label {number}") for number in range(1, max(numbers) + 1))
    return Frame(labels, geometry, role="mask"), listed


def from_frame(frame: Frame, geometry: Geometry, names: Sequence[str] = ()) -> list[Region]:
    """Regions of a label image that came as an image.

    Parameters
    ----------
    geometry
        That of the image series.
    names
        Of the labels 1, 2, ..; a label without one is called "label N".

    Raises
    ------
    InputError
        Another geometry, or not labels.
    """
    difference = geometry.difference(frame.geometry)
    if difference:
        raise InputError(f"The label image does not lie on the images: {difference}; resample it to them.")
    numbers = _check_labels(frame.pixels, "The label image")
    return [
        Region(names[number - 1] if number <= len(names) else f"label {number}", np.flatnonzero(frame.pixels == number))
        for number in numbers
    ]


def where_mapped(regions: Sequence[Region], maps: Mapping[str, np.ndarray]) -> tuple[list[Region], list[str]]:
    """The regions without the voxels for which a map holds no number, and a sentence on each region that lost some.

    Raises
    ------
    InputError
        A region has none left.
    """
    said: list[str] = []
    kept = list(regions)
    for name, values in maps.items():
        for place, region in enumerate(kept):
            has_number = np.isfinite(values.reshape(-1)[region.voxels])
            if not has_number.any():
                raise InputError(f"No voxel of region {region.name!r} has a number in the {name} map; give another map, or another region.")
            if not has_number.all():
                said.append(f"{np.count_nonzero(~has_number)} voxels of region {region.name!r} have no number in the {name} map; they are left out.")
                kept[place] = Region(region.name, region.voxels[has_number])
    return kept, said


def _check_labels(labels: np.ndarray, source: str) -> list[int]:
    """The labels that occur, background apart."""
    if not np.all(np.isfinite(labels)) or not np.array_equal(labels, np.round(labels)) or labels.min() < 0:
        raise InputError(f"{source} must hold whole numbers from 0 (background) up; it holds other values.")
    numbers = [int(number) for number in np.unique(labels) if number > 0]
    if not numbers:
        raise InputError(f"{source} marks no voxel; label at least one with 1.")
    if len(numbers) > _MAX_REGIONS or numbers[-1] > _MAX_LABEL:
        raise InputError(
            f"{source} has {len(numbers)} labels up to {numbers[-1]}; at most {_MAX_REGIONS}, up to {_MAX_LABEL}, are accepted."
        )
    return numbers


def _threshold(pixels: np.ndarray) -> float:
    """Half of Otsu's threshold, or what noise reaches if that is more; a corner that reaches beyond Otsu's is no background."""
    otsu, noise = _otsu(pixels), _NOISE_FACTOR * _darkest_corner(pixels)
    return max(0.5 * otsu, noise) if noise < otsu else 0.5 * otsu


def _otsu(values: np.ndarray) -> float:
    """The level that best separates two classes (Otsu, IEEE Trans SMC 9 (1979), doi:10.1109/TSMC.1979.4310076); infinite where there is only one."""
    if np.ptp(values) <= _ONE_LEVEL * np.max(values):
        return np.inf
    counts, edges = np.histogram(values, 256)
    centres = 0.5 * (edges[1:] + edges[:-1])
    below, sum_below = np.cumsum(counts), np.cumsum(counts * centres)
    above, mean = below[-1] - below, sum_below[-1] / below[-1]
    spread = np.divide((mean * below - sum_below) ** 2, below * above, out=np.zeros(below.shape), where=(below > 0) & (above > 0))
    return float(np.mean(edges[1:][spread >= spread.max() * (1 - 1e-9)]))  # the middle of a gap: its empty bins all tie


def _darkest_corner(pixels: np.ndarray) -> float:
    """Median of the darkest in-plane corner block (one eighth of each side), over all slices."""
    rows, columns = (max(size // 8, 1) for size in pixels.shape[1:])
    ends = [(slice(size), slice(-size, None)) for size in (rows, columns)]
    corners = [pixels[:, y, x] for y in ends[0] for x in ends[1]]
    return min(float(np.median(corner)) for corner in corners)


def _tissue(shape: Sequence[int], auxiliaries: Mapping[str, np.ndarray]) -> np.ndarray:
    tissue = np.ones(shape, bool)
    for name, largest in (("t1", MAX_T1_MS), ("t2", MAX_T2_MS)):
        values = auxiliaries.get(name)
        if values is None:
            continue
        if values.shape != tuple(shape):
            raise InputError(f"The map {name} has the shape {by(values.shape)} (z, y, x), the image {by(tuple(shape))}.")
        with np.errstate(invalid="ignore"):
            tissue &= np.isfinite(values) & (values > 0) & (values <= largest)
    return tissue


def _without_specks(foreground: np.ndarray) -> np.ndarray:
    parts = np.asarray(ndimage.label(foreground)[0])  # type: ignore[index]
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return np.isin(parts, np.flatnonzero(sizes >= max(_SMALLEST_PART * sizes.max(initial=0), 1)))


def _label_names(path: Path) -> dict[int, str]:
    """Names of labels from the table beside the image; empty when there is none."""
    table = path.with_name(path.name.removesuffix(".gz").removesuffix(".nii") + ".tsv")
    if not table.is_file():
        return {}
    try:
        with table.open(encoding="utf-8", newline="") as file:
            return {int(row["index"]): row["name"] for row in csv.DictReader(file, delimiter="\t")}
    except (OSError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{table} must be a table of label names with the columns 'index' and 'name': {error}.") from error
