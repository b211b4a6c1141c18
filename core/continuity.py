"""Do the voxels go on as they were? Each image is compared with what the earlier images of the same voxels lead one to expect.

Nothing of the spin physics enters. Over the region's voxels the images so far span few directions (amplitude, fraction, rate); a new image of
the same tissue is, to within noise, one and the same linear combination of them in every voxel. A voxel that holds other tissue than
before does not follow it. The combination is fitted robustly, and voxels are measured by the spread of their peers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from scansteer.core import noise
from scansteer.core.noise import N_SIGNAL_COMPONENTS
from scansteer.core.prediction import SD_OF_MAD

FIRST = 5
"""Earlier images that it takes: three directions, and some to tell noise from them."""
FAR = 8.0
"""Standard deviations from which a voxel departs: of its peers, or of its own earlier images if those scattered more (vessels, partial volumes)."""
LARGEST_SHARE = 0.05
"""Share of departing voxels above which it is the image that departs: the subject moved, or it is no image of this scan."""
LARGEST_EXCESS = 2.2
"""Spread of the voxels over that expected of noise, above which it is the image that departs. On the two published scans it stays below
1.8; shifted by one voxel they give 2.5 and more."""
TISSUE_SPREAD = 0.005
"""Of the rms signal: what tissue may vary by outside the few directions, image by image. Taken for noise."""
N_REFITS = 4
TRIM = 4.0
"""Standard deviations beyond which a voxel has no say in the fit."""
FEWEST_VOXELS = 20
"""A region with fewer cannot outvote its own departing voxels: nothing is said then."""


class State(NamedTuple):
    history: Float[np.ndarray, "image voxel"]
    """Images so far; where a voxel departed, what was expected instead."""
    gram: Float[np.ndarray, "image image"]
    """Sums over voxels of image i times image j [pixel^2]."""
    departed: Bool[np.ndarray, " voxel"]
    """At the latest image."""
    moved: Bool[np.ndarray, " voxel"]
    """At two images in a row, once and for all."""
    scatter: Float[np.ndarray, " voxel"]
    """Sum over images of the squared deviations [of the peers' variance], those aside at which a voxel departed."""
    n_compared: int


class Departure(NamedTuple):
    expected: Float[np.ndarray, " voxel"]
    """[pixel units]"""
    deviation: Float[np.ndarray, " voxel"]
    """Standard deviations of the peers."""
    departs: Bool[np.ndarray, " voxel"]
    share: float
    """Of the departing ones among the voxels that have not moved before."""
    excess: float
    """Spread of these over the one expected of noise."""

    @property
    def of_all(self) -> bool:
        """It is the image that departs and not a few voxels."""
        return self.share > LARGEST_SHARE or self.excess > LARGEST_EXCESS


def init(n_voxels: int) -> State:
    return State(np.zeros((0, n_voxels)), np.zeros((0, 0)), np.zeros(n_voxels, bool), np.zeros(n_voxels, bool), np.zeros(n_voxels), 0)


def compare(state: State, signal: Float[np.ndarray, " voxel"]) -> Departure | None:
    """Who departs from the common course at this image; none while too little is known to say."""
    steady = ~state.moved
    if len(state.history) < FIRST or np.count_nonzero(steady) < FEWEST_VOXELS:
        return None
    basis = _basis(state.gram)
    course = _course((basis @ state.history)[:, steady], signal[steady])
    mixture = course @ basis
    expected = mixture @ state.history
    spread = _spread(signal - expected, signal, steady)
    expected_spread = _noise(state.gram, len(signal)) * np.sqrt(1 + mixture @ mixture)  # of this image, and of those that it is compared with
    deviation = (signal - expected) / spread
    usual = np.sqrt((state.scatter + 1) / (state.n_compared + 1))
    departs = np.abs(deviation) > FAR * np.maximum(usual, 1.0)
    return Departure(expected, deviation, departs, float(np.mean(departs[steady])), float(spread / expected_spread))


def update(state: State, signal: Float[np.ndarray, " voxel"], departure: Departure | None) -> State:
    """One more image that counts; one that departs as a whole and counts all the same shows what earlier ones did not: it is taken as it is."""
    if departure is None:
        return _with(state, signal)
    departs = departure.departs
    image = signal if departure.of_all else np.where(departs | state.moved, departure.expected, signal)
    return _with(state, image)._replace(
        departed=departs,
        moved=state.moved | (state.departed & departs),
        scatter=state.scatter + np.where(departs, 1.0, departure.deviation**2),
        n_compared=state.n_compared + 1,
    )


def _with(state: State, image: Float[np.ndarray, " voxel"]) -> State:
    """One more row of the history, and of the gram matrix."""
    history = np.vstack([state.history, image])
    gram = np.pad(state.gram, (0, 1))
    gram[-1] = gram[:, -1] = history @ image
    return state._replace(history=history, gram=gram)


def _basis(gram: Float[np.ndarray, "image image"]) -> Float[np.ndarray, "direction image"]:
    """The few directions that the images span: their principal components."""
    _, vectors = np.linalg.eigh(gram)
    return vectors[:, -N_SIGNAL_COMPONENTS:].T


def _course(directions: Float[np.ndarray, "direction voxel"], signal: Float[np.ndarray, " voxel"]) -> Float[np.ndarray, " direction"]:
    """The combination that most voxels follow."""
    everyone = np.ones(len(signal), bool)
    heard = everyone
    for _ in range(N_REFITS):
        course = np.linalg.lstsq(directions[:, heard].T, signal[heard], rcond=None)[0]
        error = signal - course @ directions
        heard = np.abs(error) <= TRIM * _spread(error, signal, everyone)
    return course


def _spread(error: Float[np.ndarray, " voxel"], signal: Float[np.ndarray, " voxel"], steady: Bool[np.ndarray, " voxel"]) -> float:
    """Robust standard deviation."""
    floor = TISSUE_SPREAD * np.sqrt(np.mean(signal[steady] ** 2))
    return max(SD_OF_MAD * float(np.median(np.abs(error[steady]))), float(floor))


def _noise(gram: Float[np.ndarray, "image image"], n_voxels: int) -> float:
    """Standard deviation of one pixel, and what tissue may vary by [pixel units]."""
    mean_square = np.trace(gram) / (len(gram) * n_voxels)
    return float(np.hypot(noise.from_images(gram, n_voxels).sigma, TISSUE_SPREAD * np.sqrt(mean_square)))
