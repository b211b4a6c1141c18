"""A measured scan as arrays: what a session's voxels saw, for training and evaluation."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from scansteer.core import noise
from scansteer.core.errors import InputError
from scansteer.core.noise import NoiseEstimate
from scansteer.protocols.scan import SaturationBlock, Scan
from scansteer.realtime import maps as map_files
from scansteer.realtime import roi as roi_files
from scansteer.realtime.images import Frame, check_usable
from scansteer.realtime.session import AUXILIARIES
from scansteer.realtime.sources import check_against, open_source


class Recording(NamedTuple):
    """Signals of one region, image by image."""

    name: str
    blocks: Sequence[SaturationBlock]
    """All that was played, images or not."""
    repetitions: Sequence[int]
    """Of each image, its place among the blocks."""
    signals: Float[np.ndarray, "image voxel"]
    """[pixel units]"""
    noise: Sequence[NoiseEstimate]
    """As it was known at each image."""
    maps: dict[str, Float[np.ndarray, " voxel"]]
    """Auxiliaries by the scan's names and in its units."""


def read(path: Path, scan: Scan, roi: Path | None = None, maps: Mapping[str, str] | None = None) -> tuple[Recording, list[str]]:
    """A stored scan, its region found or drawn as in a replay, and warnings.

    Parameters
    ----------
    maps
        Role (`t1`, ..) -> NIfTI file, for maps that are not in the scan's file.

    Raises
    ------
    InputError
        The file, the scan, the region or a map do not fit together.
    """
    with open_source(path) as source:
        warnings = [*check_against(source, scan), *source.warnings]
        first = source.first()
        if first is None:
            raise InputError(f"{path} holds no whole image.")
        geometry = first.frame.geometry
        frames: dict[str, Frame] = {image.frame.role: image.frame for image in source.auxiliaries()}
        region = frames.pop("mask", None)
        frames |= {role: map_files.from_file(role, file, geometry) for role, file in (maps or {}).items()}  # type: ignore[arg-type]
        if roi is not None:
            regions = roi_files.from_labels(roi, geometry)
        elif region is not None:
            regions = roi_files.from_frame(region, geometry)
        else:
            regions = [roi_files.automatic(first.frame.pixels, {role: frame.pixels for role, frame in frames.items()})]
        voxels = np.unique(np.concatenate([each.voxels for each in regions]))
        images = []
        for frame in (image.frame for image in source.images()):
            try:
                check_usable(frame)
            except InputError as error:
                warnings.append(str(error))
            else:
                images.append((frame.repetition, frame.pixels.reshape(-1)[voxels].astype(float)))
    if not images:
        raise InputError(f"{path} holds no usable image.")
    known = {name: frames[role].pixels.reshape(-1)[voxels] * factor for role, name, factor in _usable(scan, frames)}
    signals = np.stack([values for _, values in images])
    repetitions = [repetition for repetition, _ in images]
    return Recording(path.name, scan.schedule, repetitions, signals, _noise(scan, signals), known), warnings


def _usable(scan: Scan, roles: Collection[str]) -> list[tuple[str, str, float]]:
    """Role, the scan's name, and the factor to the scan's unit, of every map that the scan gives a range for."""
    factors = {"t1": 1e-3, "t2": 1e-3, "b0": 1 / scan.larmor_hz_per_ppm}
    result = []
    for role in roles:
        name = AUXILIARIES.get(role)
        span = scan.auxiliaries.get(name) if name is not None else None  # type: ignore[call-overload]
        if name is not None and span is not None and span.lower < span.upper:
            result.append((role, name, factors.get(role, 1.0)))
    return result


def _noise(scan: Scan, signals: Float[np.ndarray, "image voxel"]) -> list[NoiseEstimate]:
    """What was known of the noise at each image."""
    if scan.noise.sigma is not None:
        return [NoiseEstimate(scan.noise.sigma, 1e4)] * len(signals)
    gram, share = signals @ signals.T, scan.noise.effective_voxel_fraction
    return [noise.from_images(gram[:n, :n], signals.shape[1], share) for n in range(1, len(signals) + 1)]
