"""What travels and what is written down: the `Decision` and the messages of the wire, one frozen model each.

Shares, NRMSEs and relative widths are fractions; confidence-region areas are in f x 1/s; undefined is null, never NaN.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

SCHEMA_VERSION = 1


class Message(BaseModel):
    """Base of everything that travels: frozen; unknown fields, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ParameterReport(Message):
    """One parameter over one region's voxels."""

    median: float | None
    """Median over voxels of the joint MAP."""
    ci_lower: float | None
    ci_upper: float | None
    """Medians over voxels of the marginal equal-tailed 95 % interval."""
    ci_halfwidth_relative: float | None
    """Median over voxels of half the interval's length over the MAP."""
    fraction_prior_limited: float


class RegionReport(Message):
    """What is known of one region of interest."""

    name: str
    n_voxels: int
    parameters: dict[str, ParameterReport]
    cr_area_median: float | None
    cr_area_p90: float | None
    cr_shrinkage: float | None
    """Median area over the median area at the previous image."""
    anytime_area_median: float | None
    fraction_converged: float


class Pulse(Message):
    """A saturation block, as played or as suggested."""

    b1_ut: float
    offset_ppm: float
    t_sat_s: float
    t_rec_s: float


class SuggestedPulse(Pulse):
    """The saturation block most worth playing next."""

    expected_gain: float
    """Expected reduction of the log confidence-region area, mean over the sampled voxels [nat]."""


class LackOfFit(Message):
    """Predictive check of the new image before it was absorbed."""

    statistic: float | None
    passed: bool


class Audit(Message):
    """Encoder against reference, on a sample of voxels."""

    n_voxels: int
    m1_median: float
    m2_median: float
    fraction_over_4: float


class Latency(Message):
    """Where the time went [ms]."""

    receive: float
    update: float
    decide: float
    total: float


class Decision(Message):
    """What scansteer says after one image."""

    schema_version: Literal[1] = SCHEMA_VERSION
    session_id: str
    sequence_number: int
    """Of decisions in this session, from 0, no gaps."""
    repetition: int
    """0-based place in the played sequence of the image that led to this decision."""
    n_images: int
    """Images absorbed so far."""
    n_planned: int
    action: Literal["continue", "stop"]
    reason: str
    would_stop_at: int | None
    regions: tuple[RegionReport, ...]
    next_pulse: SuggestedPulse | None
    lack_of_fit: LackOfFit
    posterior_source: Literal["reference", "encoder"]
    audit: Audit | None
    valid_until_repetition: int
    """Void once this repetition has begun: continue the approved schedule."""
    latency_ms: Latency
    margin_ms: float | None
    """Time left to act before the next repetition's first pulse."""
    warnings: tuple[str, ...] = ()
    """What the session noticed and did about it, one sentence each."""
