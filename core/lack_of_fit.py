"""Does the model describe these images at all? Judged against noise that does not come from the fit (`core.noise`), in three ways.

Before an image is absorbed: is it what was predicted (`core.prediction`)? If the model holds, an image's surprise is 1 on average, and
the sum over images at most as scattered as a chi-squared with one degree of freedom per image, which is the case where all voxels err
together. After: is what the fit leaves no more than noise and the allowed discrepancy? Averaged over voxels noise leaves little doubt; an
error that all voxels share (discrepancy, unmeasured nuisances) is a single draw however many voxels there are, and is judged as one. And once
the targets are met: do the images put what was not measured within the ranges that the scan states? Parameters that were sought with B0 held to too
narrow a range are as narrow, and wrong. Far beyond is a refusal; while something is somewhat beyond, a stop waits. (It is asked as well where the
model was found not to fit: it may be why.)

A refusal holds: a posterior that has absorbed images it cannot explain stays where they have put it, and images that agree with it later only
hide that. (Of simulated scans with a wrong first state that stopped around a wrong value three in four had been refused before.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

N_FITTED = 3
"""Amplitude, fraction and rate are fitted in every voxel."""
FARTHEST_BEYOND = 2.33
"""Standard deviations by which the images may put a nuisance beyond its range: 1 % of a normal lies above. On the wide phantom 3.8 % of 1 000 closed
loops as described are refused; with 2.0 it was 7.2 % (`benchmarks/promises.py loops`)."""
NEAR_BEYOND = 1.64
"""The same that leaves a stop in doubt: 5 % of a normal lies above. Of 300 closed loops on the wide phantom with B0 off by 0.3 ppm 9 % stop around a
wrong value; without doubts it was 15 % of 400, and with 1.28 it is 7 %, but then fewer than 80 % of loops as described stop early."""
LARGEST_RATIO = 1.5
"""Variance that a region's noise may leave over what is expected of it. Over hundreds of voxels the ratio of a model that holds stays within a
few per cent of 1."""
QUANTILE = 3.09
"""Standard deviations of a normal that leave 0.1 % above: how improbable a sum of squares may be."""


class Record(NamedTuple):
    """How well the images so far were predicted, each before it was absorbed, and what was said of them."""

    surprise: float
    """Sum over images of `prediction.surprise`."""
    n_predicted: int
    refused_at: int | None = None
    """Number of images at which the model was first found not to fit."""
    outside: str | None = None
    """What was first found to lie beyond its range."""
    region: str | None = None
    """As in `Check`, the first."""


class Check(NamedTuple):
    statistic: float | None
    """Median over voxels of the residual variance over the expected one; none while nothing is left over to judge by."""
    passed: bool
    """At this image and at all before it."""
    prediction: float | None = None
    """Mean surprise of the images so far: 1 if the model holds; none before the first prediction."""
    outside: str | None = None
    """What was not measured, and lies beyond the range that the scan states."""
    region: str | None = None
    """One that does not fit by itself, though all voxels together do."""


def init() -> Record:
    return Record(0.0, 0)


def update(record: Record, surprise: float) -> Record:
    """One more image, looked at before it is absorbed."""
    return record._replace(surprise=record.surprise + surprise, n_predicted=record.n_predicted + 1)


def judged(record: Record, found: Check, n_images: int) -> Record:
    """Remember a refusal."""
    if found.passed:
        return record
    first = {"outside": record.outside or found.outside, "region": record.region or found.region}
    return record._replace(refused_at=record.refused_at or n_images, **first)


def check(
    residual: Float[np.ndarray, " voxel"],
    amplitude: Float[np.ndarray, " voxel"],
    sigma: float,
    discrepancy: float,
    n_images: int,
    record: Record = Record(0.0, 0),
    *,
    n_shared: int = 0,
    independent: float = 1.0,
) -> Check:
    """Were the images what was predicted, and is what the fit leaves no more than noise and the allowed discrepancy?

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
    record
        Of the predictions, and of a refusal.
    n_shared
        Nuisances that were not measured, and that voxels may share.
    independent
        Independent voxels per voxel.
    """
    foretold = record.surprise / record.n_predicted if record.n_predicted else None
    so_far = record.refused_at is None and record.surprise <= quantile(record.n_predicted)
    left = n_images - N_FITTED
    if left < 1:
        return Check(None, so_far, foretold)
    expected = sigma**2 + (discrepancy * amplitude) ** 2
    statistic = float(np.median(residual / expected) / left)
    bound = _bound(left, min(n_shared, left), float(np.median(1 - sigma**2 / expected)), independent * len(residual))
    return Check(statistic, so_far and statistic <= bound, foretold)


def within_ranges(found: Check, beyond: Mapping[str, float]) -> Check:
    """Fails as well where a nuisance lies beyond its range, by so many standard deviations; see `design.Answer`."""
    outside = _farthest(beyond, FARTHEST_BEYOND)
    return found._replace(passed=False, outside=outside) if outside else found


def doubtful(beyond: Mapping[str, float]) -> str | None:
    """What may lie beyond its range, though not for certain: until more images clear it, or condemn it, a stop had better wait."""
    return _farthest(beyond, NEAR_BEYOND)


def unexplained(
    residual: Float[np.ndarray, " voxel"], amplitude: Float[np.ndarray, " voxel"], sigma: float, discrepancy: float, n_images: int
) -> Bool[np.ndarray, " voxel"]:
    """Voxels, each on its own, whose residual is more than noise and discrepancy leave in all but one of a thousand; parameters as in `check`.

    No voxel is, while nothing is left over to judge by.
    """
    left = n_images - N_FITTED
    return (residual > (sigma**2 + (discrepancy * amplitude) ** 2) * quantile(left)) & (left >= 1)


def quantile(dof: float) -> float:
    """99.9 % of chi-squared, to 3 % from one degree of freedom on (Wilson and Hilferty 1931, doi:10.1073/pnas.17.12.684)."""
    return float(dof * (1 - 2 / (9 * dof) + QUANTILE * np.sqrt(2 / (9 * dof))) ** 3) if dof > 0 else 0.0


def _farthest(beyond: Mapping[str, float], bound: float) -> str | None:
    outside = {name: value for name, value in beyond.items() if value > bound}  # what is not a number tells nothing
    return max(outside, key=outside.__getitem__) if outside else None


def _bound(left: int, shared: int, discrepancy_share: float, n_voxels: float) -> float:
    """Largest ratio that is called a fit.

    Of `left` directions `shared` are one draw for all voxels; in the others so is the discrepancy's share of the variance.
    """
    own = left - shared
    total = quantile(shared)
    if own:
        noise = max(LARGEST_RATIO * own, quantile(own * max(n_voxels, 1.0)) / max(n_voxels, 1.0))
        total += (1 - discrepancy_share) * noise + discrepancy_share * quantile(own)
    return total / left
