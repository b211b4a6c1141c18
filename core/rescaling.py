"""Was an image rescaled (receiver gain, reconstruction)? Then one factor stands between prediction and image in every voxel."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from scansteer.core.prediction import SD_OF_MAD, Prediction

SMALLEST = 1.1
"""Factor, or its inverse, that is told apart: receivers switch in steps of 1 dB (1.12) or more, and models err by less."""
LARGEST = 3.0
"""Factor, or its inverse, beyond which it does not matter whether it is the same in all voxels: it is another kind of image."""
IMPROBABLE = 5.0
"""Standard deviations of what voxels may err by together: however many they are, it is one error."""
LARGEST_SPREAD = 2.0
"""Of the voxels about one factor, in standard deviations: beyond, it is not one factor but a model that fails."""


def factor(prediction: Prediction, signal: Float[np.ndarray, " voxel"], before: float | None = None) -> float | None:
    """The factor by which an image was rescaled; none if it need not have been.

    The median over voxels of signal / predicted, if it lies `IMPROBABLE` shared standard deviations and `SMALLEST` from 1, and voxels scatter
    about it no more than `LARGEST_SPREAD` of their own standard deviations.

    Parameters
    ----------
    before
        Factor of the image before, if that was rescaled: this one then is if it is off at all and `before` is twice as near as 1.
    """
    ratio = signal / np.maximum(prediction.mean, 1e-3 * prediction.sd)
    middle = max(float(np.median(ratio)), 1e-9)
    size = max(middle, 1 / middle)
    if before is not None and size > SMALLEST and 2 * abs(np.log(middle / before)) < np.log(size):
        return middle
    scale = np.maximum(prediction.mean, 1e-3 * prediction.sd)
    relative, together = np.median(prediction.sd / scale), np.median(prediction.shared_sd / scale)
    spread = SD_OF_MAD * np.median(np.abs(ratio - middle)) / middle
    is_one = size > LARGEST or (size > SMALLEST and spread <= LARGEST_SPREAD * relative)
    return middle if is_one and np.log(size) > IMPROBABLE * together else None
