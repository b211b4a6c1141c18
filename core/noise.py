"""The noise of one pixel, from the images themselves and independent of any fit of the spin physics.

Over the region's voxels the images are a matrix (voxel, image). What differs between voxels in a physical way - amplitude
and the two parameters - spans three directions; what is left of the singular values is noise. Because nothing of the model enters,
lack of fit can be judged against it: an error that all voxels share moves the first component only.
On the two published scans it gives 24-25 and 39-40 pixel units from four images on; repeated pulses give 25 and 39.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

N_SIGNAL_COMPONENTS = 3
"""Amplitude, fraction and rate."""


class NoiseEstimate(NamedTuple):
    sigma: float
    """Standard deviation of one pixel [pixel units]."""
    dof: float
    """Degrees of freedom behind it."""


def from_images(gram: Float[np.ndarray, "image image"], n_voxels: int, effective_voxel_fraction: float = 1.0) -> NoiseEstimate:
    """Noise from the images so far.

    sigma^2 = (sum of the singular values^2 beyond the r-th) / ((V - r) (n - r)), r = min(n - 1, 3).

    Parameters
    ----------
    gram
        Sums over voxels of image i times image j [pixel^2], shape (n, n).
    n_voxels
        V, number of voxels summed.
    effective_voxel_fraction
        Independent voxels per voxel: reconstruction filters correlate neighbours and so reduce the degrees of freedom.

    Notes
    -----
    With one image, or with as few voxels as components, nothing can be learnt; the answer is then 3 % of the rms signal
    with one degree of freedom, which says next to nothing.
    """
    n = len(gram)
    r = min(n - 1, N_SIGNAL_COMPONENTS)
    if n < 2 or n_voxels <= r:
        return NoiseEstimate(0.03 * float(np.sqrt(max(np.trace(gram), 1e-30) / (n * n_voxels))), 1.0)
    left = np.clip(np.linalg.eigvalsh(gram)[: n - r], 0.0, None).sum()
    floor = 1e-12 * np.trace(gram)  # images without any noise still need a finite likelihood
    sigma = float(np.sqrt(max(left, floor) / ((n_voxels - r) * (n - r))))
    return NoiseEstimate(sigma, max(1.0, effective_voxel_fraction * (n_voxels - r) * (n - r)))
