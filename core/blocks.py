"""Blocks of a fixed number of voxels that are alike, so that they can share what the likelihood reads once per block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


def of_like_voxels(values: Sequence[Float[np.ndarray, " voxel"]], size: int) -> Int[np.ndarray, "block size"]:
    """Indices of the voxels of each block; the last one is padded with copies of its last voxel.

    The set is halved again and again across the quantity that varies most within it, in relative terms.

    Parameters
    ----------
    values
        Positive quantities in which the voxels of a block should be alike: T1, T2, brightness, ..
    size
        Voxels per block.
    """
    logs = np.stack([np.log(np.maximum(each, 1e-6)) for each in values])
    order = _halved(np.arange(logs.shape[1]), logs, size)
    n_blocks = -(-len(order) // size)
    return np.concatenate([order, np.repeat(order[-1:], n_blocks * size - len(order))]).reshape(n_blocks, size)


def _halved(voxels: np.ndarray, logs: np.ndarray, size: int) -> np.ndarray:
    if len(voxels) <= size:
        return voxels
    here = logs[:, voxels]
    widest = int(np.argmax(np.percentile(here, 95, axis=1) - np.percentile(here, 5, axis=1)))
    ordered = voxels[np.argsort(here[widest], kind="stable")]
    half = size * (-(-len(voxels) // size) // 2)
    return np.concatenate([_halved(ordered[:half], logs, size), _halved(ordered[half:], logs, size)])
