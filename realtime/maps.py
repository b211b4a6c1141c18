"""Maps as NIfTI files and as images: auxiliary maps in, parameter maps out.

A NIfTI array is (x, y, z) in MRD matrix order and never flipped; a stored image row is y. Where the patient's left is stands in
the affine only. Inside, arrays are (z, y, x).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.nifti1 import Nifti1Extension
from nibabel.spatialimages import HeaderDataError, HeaderTypeError

from scansteer.core.errors import InputError
from scansteer.realtime.images import UNITS, Frame, Geometry, Role, by

_SCANNER, _ALIGNED = 1, 2  # NIfTI codes of what an affine refers to
_UNREADABLE = (ImageFileError, HeaderDataError, HeaderTypeError, OSError, EOFError, ValueError, zlib.error)
"""What nibabel raises on a file that is not what its name says."""


def from_file(name: str, path: str | Path, geometry: Geometry) -> Frame:
    """An auxiliary map from a NIfTI file (`--map NAME=FILE.nii.gz`), as if it had come as an image; unit as in `UNITS`.

    Raises
    ------
    InputError
        Unknown name, not readable, or another geometry.
    """
    if name not in UNITS:
        known = ", ".join(f"{name} [{unit}]" for name, unit in UNITS.items())
        raise InputError(f"Unknown auxiliary map {name!r}; known are {known}.")
    role: Role = name  # type: ignore[assignment]
    return Frame(read_volume(path, geometry), geometry, role=role)


def read_volume(path: str | Path, geometry: Geometry) -> np.ndarray:
    """A NIfTI file on the voxels of an image, float64, shape (z, y, x).

    A file that states its place (an affine of its own) must lie where the images lie, if these state theirs.

    Raises
    ------
    InputError
        Not readable, another matrix, or another place.
    """
    try:
        image = nibabel.load(path)
        values = np.asarray(image.dataobj, dtype=np.float64)  # type: ignore[attr-defined]
    except _UNREADABLE as error:
        raise InputError(f"Cannot read {path} as NIfTI: {error}.") from error
    x, y, z = geometry.matrix
    shape = values.shape + (1,) * (3 - values.ndim)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if shape != (x, y, z):
        raise InputError(f"{path} has {by(values.shape)} voxels (x, y, z), the images {by(geometry.matrix)}; resample it.")
    if geometry.is_oriented and _is_placed(image) and not _lies_alike(image.affine, geometry):  # type: ignore[attr-defined]
        raise InputError(f"{path} lies elsewhere than the images (another affine); resample it to them.")
    return values.reshape(x, y, z).transpose(2, 1, 0)


def write_volume(path: str | Path, values: np.ndarray, geometry: Geometry, name: str, provenance: Mapping[str, object]) -> None:
    """Write a map as float32 NIfTI.

    Parameters
    ----------
    path
        Ends in .nii.gz.
    values
        Shape (z, y, x), NaN where nothing is known.
    geometry
        That of the image series.
    name
        What the map is, kept in the header's `intent_name` and `descrip`.
    provenance
        Written as JSON into a comment extension of the header, with what the orientation rests on.
    """
    image = nibabel.Nifti1Image(np.ascontiguousarray(values.transpose(2, 1, 0), dtype=np.float32), geometry.affine())
    image.header.set_xyzt_units("mm", "sec")
    code = _SCANNER if geometry.is_oriented else _ALIGNED
    image.set_qform(geometry.affine(), code)
    image.set_sform(geometry.affine(), code)
    image.header["descrip"] = _described(name)
    image.header["intent_name"] = name.encode()[:15]
    orientation = "from the images" if geometry.is_oriented else "unknown: identity is assumed"
    text = json.dumps({"map": name, **provenance, "orientation": orientation}, allow_nan=False)
    image.header.extensions.append(Nifti1Extension("comment", text.encode()))
    nibabel.save(image, path)


def is_ours(path: Path) -> bool:
    """Whether `write_volume` has written a file, under this name: what was made of our maps since keeps their header."""
    try:
        return nibabel.load(path).header["descrip"].item() == _described(path.name.removesuffix(".nii.gz"))  # type: ignore[attr-defined]
    except (KeyError, *_UNREADABLE):
        return False


def _described(name: str) -> bytes:
    """What a header says of a map: at most 79 bytes."""
    return f"{name[:60]}; scansteer".encode()


def _is_placed(image: object) -> bool:
    header = image.header  # type: ignore[attr-defined]
    return not isinstance(image, nibabel.Nifti1Image) or bool(header["sform_code"] or header["qform_code"])


def _lies_alike(affine: np.ndarray, geometry: Geometry) -> bool:
    """Whether two affines put every corner of the volume within half a voxel of each other."""
    corners = np.array(np.meshgrid(*[(0, size - 1) for size in geometry.matrix], [1])).reshape(4, -1)
    distance = np.linalg.norm(((affine - geometry.affine()) @ corners)[:3], axis=0)
    return bool(distance.max() <= 0.5 * min(geometry.voxel_mm))
