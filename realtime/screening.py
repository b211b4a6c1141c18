"""Which images, and which voxels, should not count: looked at when an image arrives and before it is absorbed, by this image and earlier ones.

Typed: an image that its header declares a dummy, or to be no image. Detected: a duplicate, an image that was rescaled or is of another kind
(`core.rescaling`), an image of a subject that moved, voxels that hold other tissue than before (`core.continuity`). An image that does not
count leaves no trace in the posterior but its pulse; where too many do not count, it is the model that is in doubt. A voxel that moved is
followed on, and left out of what is said of its region while the model does not explain it.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from scansteer.core import continuity, lack_of_fit, noise, prediction, rescaling
from scansteer.core.noise import NoiseEstimate
from scansteer.core.prediction import Prediction
from scansteer.realtime.images import Frame

NOISELESS = 1e-3
"""Noise over signal below which images were simulated without noise: no scanner's are that quiet."""
FEW_VALUES, MANY_VALUES, FEW_MATERIALS = 0.02, 100, 10
"""An image of so few different values was simulated without noise: as a share of its pixels that are not zero, up to so many (the whole numbers of a
large image repeat), or in number of at most half of them."""
FEWEST_STRANGE, LARGEST_STRANGE_SHARE = 2, 0.2
"""Images that were not what was expected, in number and as a share of those looked at, from which on it is the model that is not trusted."""


class Foresight(NamedTuple):
    """What some voxels of the region should read at the next image."""

    voxels: np.ndarray
    prediction: Prediction

    def of(self, signal: Float[np.ndarray, " voxel"]) -> Float[np.ndarray, " voxel"]:
        return signal[self.voxels]


class Screen:
    """The images of one session so far, and what is wrong with them."""

    def __init__(self) -> None:
        self._seen: dict[bytes, int] = {}
        self._continuity = continuity.init(0)
        self._factor: float | None = None
        self._departure: continuity.Departure | None = None
        self._n_looked_at = 0
        self._n_strange = 0
        self.moved = np.zeros(0, bool)
        """Voxels of the region that moved."""

    def begin(self, n_voxels: int) -> None:
        """Fix the region."""
        self._continuity = continuity.init(n_voxels)
        self.moved = np.zeros(n_voxels, bool)

    def declared(self, frame: Frame) -> str | None:
        """Why an image does not count by its own header."""
        named = f"The image of repetition {frame.repetition}"
        if frame.is_dummy:
            return f"{named} is left out: its header declares it a dummy."
        if frame.role != "image":
            return f"{named} is left out: its header declares it {frame.role!r}, not an image."
        return None

    def look(
        self, frame: Frame, signal: Float[np.ndarray, " voxel"], foresight: Foresight | None, is_trusted: bool
    ) -> str | None:
        """Why an image does not count; none: it does.

        Parameters
        ----------
        signal
            Its values in the region.
        foresight
            None: the posterior cannot say yet.
        is_trusted
            The model fits the images so far: only then does it tell a rescaled image from its own failure. Another kind of image, many times
            darker or brighter, is told by any model.
        """
        self._departure = None
        if (earlier := self._duplicate_of(frame)) is not None:
            return f"The image of repetition {frame.repetition} is left out: it is a duplicate, pixel by pixel, of that of repetition {earlier}."
        strange = self._strangeness(signal, foresight, is_trusted)
        self._n_looked_at += 1
        if strange is None:
            return None
        self._n_strange += 1
        return f"The image of repetition {frame.repetition} is left out: {strange}."

    @property
    def doubt(self) -> str | None:
        """Why so many images that were not what was expected forbid a stop."""
        if self._n_strange < FEWEST_STRANGE or self._n_strange <= LARGEST_STRANGE_SHARE * self._n_looked_at:
            return None
        return (
            f"{self._n_strange} of {self._n_looked_at} images were not what the model and the other images led to expect: the model is in doubt; "
            "continue the approved schedule."
        )

    def _strangeness(self, signal: Float[np.ndarray, " voxel"], foresight: Foresight | None, is_trusted: bool) -> str | None:
        """How an image differs from all that was expected."""
        factor = None if foresight is None else rescaling.factor(foresight.prediction, foresight.of(signal), self._factor)
        if factor is not None and not is_trusted and max(factor, 1 / factor) <= rescaling.LARGEST:
            factor = None
        self._factor = factor
        if factor is not None:
            return f"it reads {factor:.3g} times what was expected (rescaled, receiver gain, or another kind of image)"
        self._departure = continuity.compare(self._continuity, signal)
        is_foreseen = foresight is None or not is_trusted or surprise(foresight, signal) < lack_of_fit.quantile(1)
        if self._departure is not None and self._departure.of_all and not is_foreseen:
            return (
                f"its voxels spread {self._departure.excess:.1f} times as far as noise, {self._departure.share:.0%} of them "
                "depart from all earlier images (the subject moved, or the image is damaged)"
            )
        return None

    def keep(self, frame: Frame, signal: Float[np.ndarray, " voxel"]) -> None:
        """An image that was looked at counts."""
        self._seen[_identity(frame)] = frame.repetition
        self._continuity = continuity.update(self._continuity, signal, self._departure)

    def judge(self, is_unexplained: Bool[np.ndarray, " voxel"]) -> str | None:
        """Voxels that departed have moved if, with this image, the model does not explain them either; a sentence if they are more than before."""
        before = np.count_nonzero(self.moved)
        self.moved = self._continuity.moved & is_unexplained
        found = np.count_nonzero(self.moved)
        return f"{found} voxels ({np.mean(self.moved):.1%} of the region) moved and are left out." if found > before else None

    @property
    def history(self) -> Float[np.ndarray, "image voxel"]:
        """The images that count; where a voxel departed, what was expected instead."""
        return self._continuity.history

    def noise(self, effective_voxel_fraction: float = 1.0) -> NoiseEstimate:
        """Of one pixel, from the images that count."""
        return noise.from_images(self._continuity.gram, self.history.shape[1], effective_voxel_fraction)

    def _duplicate_of(self, frame: Frame) -> int | None:
        """Repetition of an earlier image with the same pixels: noise never comes twice. Images simulated without noise may."""
        earlier = self._seen.get(_identity(frame))
        return None if earlier is None or self._is_noiseless(frame) else earlier

    def _is_noiseless(self, frame: Frame) -> bool:
        values = frame.pixels[frame.pixels != 0]
        if len(np.unique(values)) <= max(min(FEW_VALUES * len(values), MANY_VALUES), min(FEW_MATERIALS, len(values) / 2)):
            return True
        if len(self.history) < continuity.FIRST:
            return False
        return self.noise().sigma < NOISELESS * float(np.sqrt(np.trace(self._continuity.gram) / self.history.size))


def surprise(foresight: Foresight, signal: Float[np.ndarray, " voxel"]) -> float:
    """How far an image is from what was foreseen; see `core.prediction.surprise`."""
    return prediction.surprise(foresight.prediction, foresight.of(signal))


def _identity(frame: Frame) -> bytes:
    """The same for images that agree in all pixels."""
    return hashlib.blake2b(np.ascontiguousarray(frame.pixels), digest_size=16).digest()
