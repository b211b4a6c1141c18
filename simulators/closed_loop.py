"""One scene, scanned image by image until its schedule ends or its voxels may stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from scansteer.core import lack_of_fit, prediction, stopping
from scansteer.core.grid_posterior import Info
from scansteer.core.lack_of_fit import Record
from scansteer.core.noise import NoiseEstimate
from scansteer.core.prediction import Prediction
from scansteer.protocols.prospect import Advice, Course, Prospect
from scansteer.protocols.scan import SaturationBlock, Scan
from scansteer.realtime import session
from scansteer.simulators.follower import Followed, Follower
from scansteer.simulators.world import Scanner, Scene

NOISE_DOF = 200
"""Degrees of freedom behind the measured noise."""


@dataclass(frozen=True)
class Trace:
    """What happened, image by image."""

    blocks: list[SaturationBlock]
    area: Float[np.ndarray, "image voxel"]
    estimate: Float[np.ndarray, "image voxel 2"]
    inside: Bool[np.ndarray, "image voxel 2"]
    """The truth lies in the 95 % interval of f, and of k."""
    credibility: Float[np.ndarray, "image voxel"]
    log_ratio: Float[np.ndarray, "image voxel"]
    """These two as in `follower.Place`."""
    advice: list[Advice | None]
    vetoed: list[bool]
    stopped_at: int | None
    """n at which a stop was called."""
    truth: Float[np.ndarray, "voxel 2"]
    began_s: float = 0.0
    """When the first block began; before zero where its recovery was not played, the first state being that after it."""

    @property
    def ends_s(self) -> Float[np.ndarray, " image"]:
        """Scan time at which each image has been read (readouts take none)."""
        return self.began_s + np.cumsum([block.duration_s for block in self.blocks])

    @property
    def relative_error(self) -> Float[np.ndarray, "image voxel 2"]:
        return np.abs(self.estimate - self.truth) / self.truth


class Fixed:
    """Never anything but the approved schedule."""

    def foresee(self, _course: Course, _block: SaturationBlock) -> Prediction | None:
        """Nothing is predicted."""
        return None

    def advise(self, _number: int, _course: Course, _followed: Followed, _info: Info, _is_enough: bool) -> Advice | None:
        """No advice."""
        return None


class Adaptive:
    """What the prospect advises."""

    def __init__(self, follower: Follower, prospect: Prospect, scene: Scene) -> None:
        self._follower, self._prospect, self._noise = follower, prospect, _measured_noise(scene)
        self._foresee: Callable[[Course, SaturationBlock], Prediction] | None = None

    def foresee(self, course: Course, block: SaturationBlock) -> Prediction | None:
        """What the next image should read; none before the first."""
        return None if self._foresee is None else self._foresee(course, block)

    def advise(self, number: int, course: Course, followed: Followed, info: Info, is_enough: bool) -> Advice:
        """What to play as image `number` (0-based) given all that is known; `is_enough` as in `Prospect.advise`."""
        question, rows = self._follower.question(followed, info, self._prospect, self._noise)
        self._foresee = lambda course, block: self._follower.foresee(self._prospect.read(course, block), question, rows)
        return self._prospect.advise(course, self._prospect.answer(course, question, rows, number), is_enough)


def run(
    scene: Scene,
    follower: Follower,
    prospect: Prospect,
    schedule: Sequence[SaturationBlock],
    choice: Fixed | Adaptive,
    *,
    n_given: int = 1,
    until_stop: bool = False,
    until_area: float = 0.0,
) -> Trace:
    """Scan a scene.

    Parameters
    ----------
    schedule
        The approved one.
    choice
        Replaces blocks of it.
    n_given
        So many of its first blocks, at least one, are played whatever the choice is.
    until_stop
        End where all voxels may stop, by the scan's own rule; otherwise go on to the schedule's end.
    until_area
        End also where the voxels' median confidence-region area has come down to this.
    """
    scanner, course = Scanner(scene), prospect.begin()
    followed = follower.begin(dict(scene.maps), scene.n_voxels)
    noise = _measured_noise(scene)
    rule = session.rule_of(scene.described)._replace(asks_operator=False)  # an operator who agrees at once
    state, record = stopping.init(), lack_of_fit.init()
    truth, images, block = scene.truth, [], schedule[0]
    infos, places, blocks, advices, vetoes = [], [], [], [], []
    for number in range(len(schedule)):
        images.append(scanner.play(block))
        if (foreseen := choice.foresee(course, block)) is not None:
            record = lack_of_fit.update(record, prediction.surprise(foreseen, images[-1]))
        followed, info = follower.absorb(followed, block, images[-1], noise)
        course = prospect.play(course, block)
        region = _region(rule, info)
        meets_targets = not stopping.behind(rule, [region])
        advice = choice.advise(number + 1, course, followed, info, until_stop and meets_targets)
        fit = _fit(info, np.stack(images), noise, scene.described, record)
        remaining = np.inf if advice is None else advice.remaining_gain
        may_stop = meets_targets or stopping.is_futile(rule, remaining)
        told = follower.told(advice.beyond) if advice is not None and may_stop else {}
        fit = lack_of_fit.within_ranges(fit, told)
        record = lack_of_fit.judged(record, fit, number + 1)
        veto = lack_of_fit.doubtful(told) if fit.passed else "lack of fit"
        state, verdict = stopping.update(rule, state, number + 1, [region], veto, remaining)
        infos.append(info.summary)
        places.append(follower.place(followed, info, truth))
        blocks.append(block)
        advices.append(advice)
        vetoes.append(not fit.passed)
        if (until_stop and verdict.stop) or np.median(info.summary.cr_area) <= until_area:
            break
        if number + 1 < len(schedule):
            is_advised = advice is not None and advice.block is not None and number + 1 >= n_given
            block = advice.block if is_advised else schedule[number + 1]  # type: ignore[union-attr]
    return Trace(
        blocks=blocks,
        area=np.stack([summary.cr_area for summary in infos]),
        estimate=np.stack([summary.map for summary in infos]),
        inside=np.stack([(truth >= summary.lower) & (truth <= summary.upper) for summary in infos]),
        credibility=np.stack([place.credibility for place in places]),
        log_ratio=np.stack([place.log_ratio for place in places]),
        advice=advices,
        vetoed=vetoes,
        stopped_at=state.would_stop_at,
        truth=truth,
        began_s=0.0 if scene.true.first_state.n_dummies else -blocks[0].t_rec_s,
    )


def _measured_noise(scene: Scene) -> NoiseEstimate:
    """From as many degrees of freedom as a small region has after a few images."""
    rng = np.random.default_rng((*scene.seed, 5))
    return NoiseEstimate(float(scene.sigma * np.sqrt(rng.chisquare(NOISE_DOF) / NOISE_DOF)), NOISE_DOF)


def _region(rule: stopping.Rule, info: Info) -> stopping.Region:
    summary = info.summary
    halfwidth = stopping.relative_halfwidth(summary.map, summary.lower, summary.upper)
    converged = stopping.converged(rule, halfwidth, summary.edge_mass)
    return stopping.Region("scene", float(np.mean(converged)), float(len(converged)))


def _fit(info: Info, images: Float[np.ndarray, "image voxel"], noise: NoiseEstimate, scan: Scan, record: Record) -> lack_of_fit.Check:
    residual = info.nrmse.astype(float) ** 2 * np.sum(images**2, axis=0)
    return lack_of_fit.check(residual, info.amplitude, noise.sigma, scan.noise.discrepancy, len(images), record)
