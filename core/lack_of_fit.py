"""Does the model describe these images at all? Judged against noise that does not come from the fit (`core.noise`)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

N_FITTED = 3
"""Amplitude, fraction and rate are fitted in every voxel."""
LARGEST_RATIO = 2.0
"""Residual variance over noise variance that is still called a fit."""


class Check(NamedTuple):
    statistic: float | None
    """Median over voxels of the residual variance over the noise variance; none while nothing is left over to judge by."""
    passed: bool


def check(residual: Float[np.ndarray, " voxel"], sigma: float, n_images: int) -> Check:
    """Residual sums of squares at the MAP [pixel^2] against the noise sigma [pixel]."""
    left = n_images - N_FITTED
    if left < 1:
        return Check(None, True)
    statistic = float(np.median(residual) / (left * sigma**2))
    return Check(statistic, statistic <= LARGEST_RATIO)
