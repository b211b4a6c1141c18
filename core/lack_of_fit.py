"""Does the model describe these images at all? Judged against noise that does not come from the fit (`core.noise`)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

N_FITTED = 3
"""Amplitude, fraction and rate are fitted in every voxel."""
LARGEST_RATIO = 1.5
"""Residual variance over expected variance that is still called a fit. Over a region's hundreds of voxels the ratio of a model that holds
stays within a few per cent of 1; the published description of the L-arginine phantom reaches 1.7 at 6 and 3.5 at 12 images."""


class Check(NamedTuple):
    statistic: float | None
    """Median over voxels of the residual variance over the expected one; none while nothing is left over to judge by."""
    passed: bool


def check(residual: Float[np.ndarray, " voxel"], amplitude: Float[np.ndarray, " voxel"], sigma: float, discrepancy: float, n_images: int) -> Check:
    """Is what the fit leaves no more than noise and the allowed discrepancy?

    Parameters
    ----------
    residual
        Residual sums of squares at the MAP [pixel^2].
    amplitude
        [pixel units per M0].
    sigma
        Noise that does not come from the fit [pixel units].
    discrepancy
        Standard deviation of the model's error per image, as allowed before the scan [fraction of M0].
    """
    left = n_images - N_FITTED
    if left < 1:
        return Check(None, True)
    expected = sigma**2 + (discrepancy * amplitude) ** 2
    statistic = float(np.median(residual / expected) / left)
    return Check(statistic, statistic <= LARGEST_RATIO)
