"""Fixed schedules to compare with: as published, random, and optimised beforehand.

An optimised schedule is Bayesian D-optimal: it minimises the log area of the confidence region, expected over draws of (f, k) and averaged
over the course of the scan, with the same candidates, costs, limits, quota and nuisances as the adaptive choice. Per draw the images so
far are a Fisher information of (f, k), log amplitude and the nuisances' coefficients (whose priors have variance 1); the area is that of
(f, k) with the others marginalised. Greedy from image to image, then improved by exchanges; the best of several random starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from scansteer.core import lattice, predictive
from scansteer.core.nuisance import Measured
from scansteer.protocols import limits
from scansteer.protocols.prospect import Prospect
from scansteer.protocols.scan import SaturationBlock, Scan

N_RESTARTS = 10
MOST_IMAGES = 64
N_EXCHANGES = 60
"""Exchanges tried per start."""
HORIZONS = 16.0, 8.0, 5.0
"""Costs (`Prospect.cost`) over which the area may be optimised: images of the approved schedule's usual length. What is best over a long course is
not what comes down soonest."""


def unsaturated(scan: Scan) -> SaturationBlock:
    """The unsaturated image that every schedule may play: in the time of the schedule's first block."""
    return scan.schedule[0].model_copy(update={"b1_ut": 0.0})


def published(scan: Scan) -> list[SaturationBlock]:
    """An unsaturated image, then the scan's own schedule."""
    return [unsaturated(scan), *scan.schedule]


def random(prospect: Prospect, n_images: int, rng: np.random.Generator) -> list[SaturationBlock]:
    """An unsaturated image, then candidates at random, within limits and quota."""
    schedule = [unsaturated(prospect.scan)]
    course = prospect.play(prospect.begin(), schedule[0])
    while len(schedule) < n_images:
        allowed = np.flatnonzero(prospect.allowed(course))
        schedule.append(prospect.candidates.block(int(rng.choice(allowed))) if len(allowed) else unsaturated(prospect.scan))
        course = prospect.play(course, schedule[-1])
    return schedule


@dataclass(frozen=True)
class Draws:
    """Tissues that a schedule is optimised for."""

    rows: tuple[np.ndarray, np.ndarray, np.ndarray]
    """From the coarse points to the value at each draw, and to its derivatives by f and k, each times the width of the box."""
    weights: Float[np.ndarray, "draw column node_"]
    """From the star's nodes, and one that reads 1, to mean signal and nuisance columns."""
    prior_precision: tuple[float, float]
    """Of f and k, each in units of its side of the box."""
    noise: float
    """Standard deviation of one image, discrepancy included [fraction of M0]."""


def draws_at(prospect: Prospect, shares: Float[np.ndarray, "draw 2"], maps: Sequence[Mapping[str, Measured]], noise: float) -> Draws:
    """Draws at places in the box of (f, k), each 0 .. 1 over its side.

    Parameters
    ----------
    maps
        What is measured of each draw's nuisances; the others are at the centre of their ranges, and unknown.
    noise
        Standard deviation of one image [fraction of M0].
    """
    value, slope = zip(*(_along(share) for share in np.clip(shares, 0.005, 0.995).T), strict=True)
    outer = lambda f, k: (f[:, :, None] * k[:, None, :]).reshape(len(f), -1)  # noqa: E731
    rows = outer(value[0], value[1]), outer(slope[0], value[1]), outer(value[0], slope[1])
    f, k = (((side.upper - side.lower) / side.prior_sd) ** 2 for side in prospect.scan.parameters.values())
    total = np.hypot(noise, prospect.scan.noise.discrepancy)
    return Draws(rows, np.stack([prospect.plain_columns(each) for each in maps]), (f, k), float(total))


def optimise(
    prospect: Prospect,
    draws: Draws,
    n_images: int,
    rng: np.random.Generator,
    n_restarts: int = N_RESTARTS,
    horizon: float = HORIZONS[0],
    progress: Callable[[], None] | None = None,
) -> list[list[SaturationBlock]]:
    """The schedules of several starts, the best one first; one start is greedy throughout, the others have random first images.

    Parameters
    ----------
    horizon
        Cost over which the area is averaged.
    progress
        Called after every start.
    """
    found: list[tuple[float, list[SaturationBlock]]] = []
    for restart in range(n_restarts):
        first = [] if restart == 0 else random(prospect, 1 + int(rng.integers(1, 4)), rng)[int(rng.integers(0, 2)) :]
        schedule = _greedy(prospect, draws, first, cost=horizon)
        found.append(_exchanged(prospect, draws, schedule, horizon, rng))
        if progress is not None:
            progress()
    ordered = [schedule for _, schedule in sorted(found, key=lambda each: each[0])]
    return [_greedy(prospect, draws, schedule, n_images=n_images) for schedule in ordered]


def expected_log_areas(prospect: Prospect, draws: Draws, schedule: Sequence[SaturationBlock]) -> Float[np.ndarray, " image"]:
    """Expected log area after each image of a schedule, up to a constant [nat]."""
    course, information, areas = prospect.begin(), _prior(draws), []
    for block in schedule:
        x = _columns(prospect.read(course, block), draws)[:, 0]
        information = information + x[:, :, None] * x[:, None, :]
        areas.append(_log_area(information))
        course = prospect.play(course, block)
    return np.array(areas)


def _greedy(
    prospect: Prospect, draws: Draws, first: Sequence[SaturationBlock], *, n_images: int = MOST_IMAGES, cost: float = np.inf
) -> list[SaturationBlock]:
    """Given first images, then at each image the candidate that takes most off the expected log area for its cost; to either end."""
    course, information, costs = prospect.begin(), _prior(draws), prospect.cost(prospect.candidates)
    schedule: list[SaturationBlock] = []
    while len(schedule) < n_images and _cost(prospect, schedule) < cost:
        if len(schedule) < len(first):
            block = first[len(schedule)]
        else:
            worth = _gains(_columns(prospect.read_candidates(course), draws), information) / costs
            allowed = prospect.allowed(course)
            block = prospect.candidates.block(int(np.argmax(np.where(allowed, worth, -np.inf)))) if allowed.any() else unsaturated(prospect.scan)
        x = _columns(prospect.read(course, block), draws)[:, 0]
        information = information + x[:, :, None] * x[:, None, :]
        course = prospect.play(course, block)
        schedule.append(block)
    return schedule


def _exchanged(
    prospect: Prospect, draws: Draws, schedule: list[SaturationBlock], horizon: float, rng: np.random.Generator
) -> tuple[float, list[SaturationBlock]]:
    """Replace one image, or let two change places, wherever that helps and limits and quota allow it."""
    value = _objective(prospect, draws, schedule, horizon)
    for _ in range(N_EXCHANGES):
        tried, place = list(schedule), int(rng.integers(len(schedule)))
        if rng.random() < 0.3:
            other = int(rng.integers(len(schedule)))
            tried[place], tried[other] = tried[other], tried[place]
        else:
            tried[place] = prospect.candidates.block(int(rng.integers(len(prospect.candidates))))
        if not _keeps_limits(prospect, tried):
            continue
        new = _objective(prospect, draws, tried, horizon)
        if new < value:
            value, schedule = new, tried
    return value, schedule


def _objective(prospect: Prospect, draws: Draws, schedule: Sequence[SaturationBlock], horizon: float) -> float:
    """Expected log area, averaged over the horizon: an image's takes effect when its cost is paid."""
    before = np.concatenate([[_log_area(_prior(draws))], expected_log_areas(prospect, draws, schedule)])
    paid = np.concatenate([[0.0], np.cumsum(prospect.cost(limits.blocks(schedule)))])
    lasts = np.diff(np.minimum(np.append(paid, np.inf), horizon))
    return float(before @ lasts / horizon)


def _cost(prospect: Prospect, schedule: Sequence[SaturationBlock]) -> float:
    return float(np.sum(prospect.cost(limits.blocks(schedule))))


def _keeps_limits(prospect: Prospect, schedule: Sequence[SaturationBlock]) -> bool:
    begun = prospect.begin()
    played = limits.back_to_back((*begun.blocks, *schedule))
    dummies = len(begun.played)
    return all(prospect.may_follow(begun._replace(played=tuple(played[: dummies + n])), block) for n, block in enumerate(schedule))


def _along(shares: Float[np.ndarray, " draw"]) -> tuple[np.ndarray, np.ndarray]:
    """Interpolation from the coarse points along one side of the box, and its derivative by the share."""
    step = 1e-3
    low, high = (lattice.at_shares(shares + way * step, predictive.N_POINTS) for way in (-1, 1))
    return lattice.at_shares(shares, predictive.N_POINTS), (high - low) / (2 * step)


def _columns(signals: Float[np.ndarray, "node image point"], draws: Draws) -> Float[np.ndarray, "draw image column"]:
    """f, k, log amplitude, nuisances: what an image says of each, in units of its noise."""
    value, by_f, by_k = (np.einsum("dx,nix->din", rows, signals) for rows in draws.rows)
    weights, constant = draws.weights[..., :-1], draws.weights[:, None, :, -1]
    slopes = np.stack([np.einsum("din,dn->di", by, weights[:, 0]) for by in (by_f, by_k)], axis=-1)
    return np.concatenate([slopes, value @ np.swapaxes(weights, 1, 2) + constant], axis=-1) / draws.noise


def _prior(draws: Draws) -> Float[np.ndarray, "draw column column"]:
    n_nuisances = draws.weights.shape[1] - 1
    precision = np.array([*draws.prior_precision, 1e-4, *[1.0] * n_nuisances])
    return np.repeat(np.diag(precision)[None], len(draws.rows[0]), axis=0)


def _log_area(information: Float[np.ndarray, "draw column column"]) -> float:
    """-1/2 log det of the information about (f, k) once the others are marginalised, mean over draws."""
    return float(-0.5 * np.mean(np.linalg.slogdet(information)[1] - np.linalg.slogdet(information[:, 2:, 2:])[1]))


def _gains(columns: Float[np.ndarray, "draw candidate column"], information: Float[np.ndarray, "draw column column"]) -> np.ndarray:
    """What each candidate takes off `_log_area`."""
    whole = np.einsum("dpi,dij,dpj->dp", columns, np.linalg.inv(information), columns, optimize=True)
    others = columns[..., 2:]
    rest = np.einsum("dpi,dij,dpj->dp", others, np.linalg.inv(information[:, 2:, 2:]), others, optimize=True)
    return 0.5 * np.mean(np.log1p(whole) - np.log1p(rest), axis=0)
