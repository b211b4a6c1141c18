"""How fine a lattice a scan's posteriors need: by how narrow they can be at the end of its schedule.

Before the first image, from the signals simulated at the lattice's nodes: the Gaussian posterior that a good scan ends with (Fisher information,
amplitude and nuisances marginalised). A scan of which much was not measured, or whose model is not trusted further, ends with broad posteriors,
and there a coarser lattice says the same in two thirds of the time.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float

from scansteer.core import lattice

COARSE, FINE = (40, 40), (48, 48)
"""Points along f and along k. Beside 112 x 112 points, as described and noise of 0.5 % of M0, means move by 0.01 sd, standard deviations by 0.01
and the region's area by 0.02 of themselves, rms (`benchmarks/promises.py resolution`). With 36 x 36 the wide phantom's sums are as good, but of 300
closed loops with a drift 5 % stop around a wrong value instead of 2 %: draws on the lattice foresee images less sharply."""
BROAD = 0.008
"""Standard deviation, along the narrower direction and over the box's side in the lattice's even coordinate, from which `COARSE` will do."""
GOOD_NOISE = 0.002
"""Of a good scan [fraction of M0]."""
SHARE = 0.25
"""Of the truths in the box, those whose posteriors are narrowest and may be narrower than `BROAD`."""


def n_points(images: Iterable[Float[np.ndarray, "column point"]], discrepancy: float) -> tuple[int, int]:
    """Points of the lattice.

    Parameters
    ----------
    images
        Of every image of the schedule, the likelihood's columns at the simulated nodes: signal, and what each coefficient adds.
    discrepancy
        The model's own error [fraction of M0].
    """
    return COARSE if np.quantile(narrower_sd(images, GOOD_NOISE**2 + discrepancy**2), SHARE) >= BROAD else FINE


def narrower_sd(images: Iterable[Float[np.ndarray, "column point"]], variance: float) -> Float[np.ndarray, " point"]:
    """Posterior standard deviation along the narrower direction at every node, in shares of the side; `variance` [M0^2] is one image's."""
    rows = np.stack([_with_slopes(columns) for columns in images])
    information = np.einsum("iax,ibx->xab", rows, rows) / variance
    nuisances = np.arange(3, information.shape[1])
    information[:, nuisances, nuisances] += 1.0
    others = information[:, 2:, 2:]
    about_both = information[:, :2, :2] - information[:, :2, 2:] @ np.linalg.solve(others, information[:, 2:, :2])
    return 1 / np.sqrt(np.maximum(np.linalg.eigvalsh(about_both)[:, 1], 1.0))


def _with_slopes(columns: Float[np.ndarray, "column point"]) -> Float[np.ndarray, "column_ point"]:
    """Before the columns, the signal's slopes along f and along k."""
    signal = columns[0].reshape(lattice.N_NODES, lattice.N_NODES)
    slopes = lattice.slopes()
    return np.stack([(slopes @ signal).reshape(-1), (signal @ slopes.T).reshape(-1), *columns])
