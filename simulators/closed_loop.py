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
    followed, judge = follower.begin(dict(scene.maps), scene.n_voxels), _Judge(scene, follower)
    infos, places, blocks, advices, vetoes = [], [], [schedule[0]], [], []
    while True:
        image = scanner.play(blocks[-1])
        judge.look(image, choice.foresee(course, blocks[-1]))
        followed, info = follower.absorb(followed, blocks[-1], image, judge.noise)
        course = prospect.play(course, blocks[-1])
        advice = choice.advise(len(blocks), course, followed, info, until_stop and judge.meets_targets(info))
        verdict, is_vetoed = judge.decide(info, advice)
        infos.append(info.summary)
        places.append(follower.place(followed, info, scene.truth))
        advices.append(advice)
        vetoes.append(is_vetoed)
        if len(blocks) == len(schedule) or (until_stop and verdict.stop) or np.median(info.summary.cr_area) <= until_area:
            break
        advised = None if advice is None or len(blocks) < n_given else advice.block
        blocks.append(advised or schedule[len(blocks)])
    return Trace(
        blocks=blocks,
        area=np.stack([summary.cr_area for summary in infos]),
        estimate=np.stack([summary.map for summary in infos]),
        inside=np.stack([(scene.truth >= summary.lower) & (scene.truth <= summary.upper) for summary in infos]),
        credibility=np.stack([place.credibility for place in places]),
        log_ratio=np.stack([place.log_ratio for place in places]),
        advice=advices,
        vetoed=vetoes,
        stopped_at=judge.stopped_at,
        truth=scene.truth,
        began_s=0.0 if scene.true.first_state.n_dummies else -blocks[0].t_rec_s,
    )


class _Judge:
    """The scan's own stop rule, and whether the model fits, over one course."""

    def __init__(self, scene: Scene, follower: Follower) -> None:
        self.noise = _measured_noise(scene)
        self._scan, self._follower = scene.described, follower
        self._rule = session.rule_of(self._scan)._replace(asks_operator=False)  # an operator who agrees at once
        self._state, self._record = stopping.init(), lack_of_fit.init()
        self._images: list[Float[np.ndarray, " voxel"]] = []

    @property
    def stopped_at(self) -> int | None:
        """n at which a stop was called."""
        return self._state.would_stop_at

    def look(self, image: Float[np.ndarray, " voxel"], foreseen: Prediction | None) -> None:
        """At an image before it is absorbed."""
        if foreseen is not None:
            self._record = lack_of_fit.update(self._record, prediction.surprise(foreseen, image))
        self._images.append(image)

    def meets_targets(self, info: Info) -> bool:
        """Whether enough voxels are known as well as the scan asks."""
        return not stopping.behind(self._rule, [_region(self._rule, info)])

    def decide(self, info: Info, advice: Advice | None) -> tuple[stopping.Verdict, bool]:
        """After an image was absorbed: the verdict, and whether the model does not fit."""
        n = len(self._images)
        remaining = np.inf if advice is None else advice.remaining_gain
        may_stop = self.meets_targets(info) or stopping.is_futile(self._rule, remaining)
        told = self._follower.told(advice.beyond) if advice is not None and may_stop else {}
        fit = lack_of_fit.within_ranges(_fit(info, np.stack(self._images), self.noise, self._scan, self._record), told)
        self._record = lack_of_fit.judged(self._record, fit, n)
        veto = lack_of_fit.doubtful(told) if fit.passed else "lack of fit"
        self._state, verdict = stopping.update(self._rule, self._state, n, [_region(self._rule, info)], veto, remaining)
        return verdict, not fit.passed


def _measured_noise(scene: Scene) -> NoiseEstimate:
    """From as many degrees of freedom as a small region has after a few images."""
    rng = np.random.default_rng((*scene.seed, 5))
    return NoiseEstimate(float(scene.sigma * np.sqrt(rng.chisquare(NOISE_DOF) / NOISE_DOF)), NOISE_DOF)


def _region(rule: stopping.Rule, info: Info) -> stopping.Region:
    summary = info.summary
    halfwidth = stopping.relative_halfwidth(summary.map, summary.lower, summary.upper)
    converged = stopping.converged(rule, halfwidth, summary.edge_mass, summary.covariance)
    return stopping.Region("scene", float(np.mean(converged)), float(len(converged)))


def _fit(info: Info, images: Float[np.ndarray, "image voxel"], noise: NoiseEstimate, scan: Scan, record: Record) -> lack_of_fit.Check:
    residual = info.nrmse.astype(float) ** 2 * np.sum(images**2, axis=0)
    return lack_of_fit.check(residual, info.amplitude, noise.sigma, scan.noise.discrepancy, len(images), record)
