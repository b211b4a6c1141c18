"""When enough is known: a pure rule on the voxels' intervals, with a streak of confirmations, a veto, and the operator's word where it is asked.

State and update, as everywhere: `init`, then `update` once per image. The rule and its targets are fixed before the scan.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

PRIOR_LIMIT = 0.025
"""A voxel with more of its mass than this in an edge row of the box is prior-limited and never converged."""
BETA_PRIOR_LIMIT = 0.002
"""The same where the prior is Beta(2, 2), which vanishes at the edges and so keeps a posterior away from them: with a likelihood that grows by
exp(8 x) over the box's side, of a truth that lies outside it, 0.24 to 0.5 % are found there on lattices of 40 to 56 points; with a uniform prior
it is 7.7 %."""
UNIDENTIFIED = 0.8
"""Share of the prior's standard deviation: a parameter of which a voxel's images leave more is not identifiable, and the voxel never converged,
however narrow the box."""


class Rule(NamedTuple):
    """Targets, fixed before the scan."""

    halfwidth_relative: tuple[float, float]
    """Largest acceptable half-width of the 95 % interval over the estimate, for f and k."""
    fraction_converged: float
    n_min: int
    confirmations: int
    plateau: float | None = None
    """Gain of the rest of the schedule [nat of log confidence-region area] below which going on is futile; none: never futile."""
    asks_operator: bool = False
    """A stop is proposed, and called only once the operator has confirmed it."""
    prior_sd: tuple[float, float] = (math.inf, math.inf)
    """Of f and k before the first image."""
    prior_limit: tuple[float, float] = (PRIOR_LIMIT, PRIOR_LIMIT)
    """Largest acceptable mass in an edge row of the box."""


class Region(NamedTuple):
    """How far one region has come."""

    name: str
    fraction_converged: float
    n_effective: float
    """Independent voxels: neighbours share noise, so a region of 100 voxels is not 100 witnesses."""


class State(NamedTuple):
    streak: int
    """Consecutive images at which every region met the target."""
    would_stop_at: int | None
    """n at which a stop was first called or proposed."""
    is_confirmed: bool = False
    """By the operator; forgotten when the streak ends."""


Cause = Literal["veto", "target", "few-images", "confirming", "operator", "converged", "plateau"]
"""Why a verdict is what it is. Continue: something speaks against a stop; the target is not met; it is, but with too few images, not yet
confirmed by further images, or not yet by the operator. Stop: the target is met; or the rest of the schedule would bring nothing."""


class Verdict(NamedTuple):
    stop: bool
    reason: str
    cause: Cause


def init() -> State:
    return State(0, None)


def relative_halfwidth(
    estimate: Float[np.ndarray, "voxel 2"], lower: Float[np.ndarray, "voxel 2"], upper: Float[np.ndarray, "voxel 2"]
) -> Float[np.ndarray, "voxel 2"]:
    """Half the interval over the estimate; infinite where the estimate is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(estimate > 0, (upper - lower) / 2 / estimate, np.inf)


def is_prior_limited(rule: Rule, edge_mass: Float[np.ndarray, "voxel 2"]) -> Bool[np.ndarray, "voxel 2"]:
    """Posteriors that lean on an edge of the box."""
    return edge_mass > np.array(rule.prior_limit)


def is_unidentified(rule: Rule, covariance: Float[np.ndarray, "voxel 2 2"]) -> Bool[np.ndarray, "voxel 2"]:
    """Posteriors that are little narrower than the prior."""
    return np.sqrt(np.diagonal(np.asarray(covariance), axis1=1, axis2=2)) > UNIDENTIFIED * np.array(rule.prior_sd)


def converged(
    rule: Rule, halfwidth: Float[np.ndarray, "voxel 2"], edge_mass: Float[np.ndarray, "voxel 2"], covariance: Float[np.ndarray, "voxel 2 2"]
) -> Bool[np.ndarray, " voxel"]:
    """Voxels that meet both targets by what their images say, and not by what the prior says."""
    by_prior = is_prior_limited(rule, edge_mass) | is_unidentified(rule, covariance)
    return np.all((halfwidth <= rule.halfwidth_relative) & ~by_prior, axis=1)


def needed(rule: Rule, region: Region) -> float:
    """Share of voxels that must have converged, for at least `fraction_converged` of the tissue to have done so with 90 % certainty."""
    p = rule.fraction_converged
    return min(1.0, p + 1.28 * float(np.sqrt(p * (1 - p) / max(region.n_effective, 1.0))))


def behind(rule: Rule, regions: list[Region]) -> list[Region]:
    """Regions that have not met the target yet."""
    return [region for region in regions if region.fraction_converged < needed(rule, region)]


def is_futile(rule: Rule, remaining_gain: float) -> bool:
    """The rest of the schedule brings too little to go on for [nat of log confidence-region area]."""
    return rule.plateau is not None and remaining_gain < rule.plateau


def update(rule: Rule, state: State, n_images: int, regions: list[Region], veto: str | None, remaining_gain: float) -> tuple[State, Verdict]:
    """One more image: has every region met its target often enough, and does nothing speak against it?

    Parameters
    ----------
    veto
        Why a stop is out of the question at this image (lack of fit, disagreement, ..); none: nothing speaks against it.
    remaining_gain
        What the rest of the schedule is expected to take off the log confidence-region area [nat].
    """
    late = behind(rule, regions)
    futile = is_futile(rule, remaining_gain)
    if veto is not None:
        return State(0, state.would_stop_at), Verdict(False, veto, "veto")
    if late and not futile:
        worst = min(late, key=lambda region: region.fraction_converged - needed(rule, region))
        reason = f"{worst.fraction_converged:.0%} of the voxels of region {worst.name!r} have converged, {needed(rule, worst):.0%} are needed."
        return State(0, state.would_stop_at), Verdict(False, reason, "target")
    state = state._replace(streak=state.streak + 1)
    said = f"The rest of the schedule is expected to bring {remaining_gain:.2f} nat, a plateau" if late else "All regions have converged"
    if n_images < rule.n_min:
        return state, Verdict(False, f"{said}; no stop before {rule.n_min} images.", "few-images")
    if state.streak < rule.confirmations:
        return state, Verdict(False, f"{said}; confirmation {state.streak} of {rule.confirmations}.", "confirming")
    state = state._replace(would_stop_at=n_images if state.would_stop_at is None else state.would_stop_at)
    said = f"{said}, at {state.streak} consecutive images"
    if rule.asks_operator and not state.is_confirmed:
        return state, Verdict(False, f"{said}; a stop waits for the operator's confirmation.", "operator")
    return state, Verdict(True, f"{said}.", "plateau" if late else "converged")


def confirm(state: State) -> State:
    """The operator agrees to the stop that the latest verdict proposed; holds as long as the streak."""
    return state._replace(is_confirmed=True)
