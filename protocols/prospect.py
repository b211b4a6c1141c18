"""What may be played next in a scan, and what it is expected to tell: candidates, limits and quota joined with their expected gains.

The candidates are simulated once, at a few nuisance nodes and coarse points (`core.predictive`); any number of courses of the scan can then be
followed: what was played, and the magnetisation that it left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from scansteer.core import design, dictionary, nuisance, predictive
from scansteer.core.code_generation import for_large_programs
from scansteer.core.design import Answer, Question, Quota
from scansteer.core.dictionary import Magnetisation
from scansteer.core.errors import ScansteerError
from scansteer.core.nuisance import Measured
from scansteer.core.predictive import Coarse, Responses
from scansteer.core.signal import LongitudinalMap
from scansteer.protocols import candidates, forward, limits, tissue_model
from scansteer.protocols.limits import Blocks, Played
from scansteer.protocols.scan import SaturationBlock, Scan, bounds

MOST_AHEAD = 48
"""Images of the schedule's rest that are looked ahead."""
TIE = 0.03
"""Candidates whose worth is less than this below the best one's are as good as the best: gains come from few draws."""
TIE_REFERENCE = 0.5
"""The same for an unsaturated image while none has been played."""
HASTE = 0.25
"""An image costs its duration to this power: 0 counts images, 1 counts seconds. What other powers do: benchmarks/promises.md."""

FARTHEST = 10.0
"""Two pulses are never less alike (`candidates.distances`)."""
NEGLIGIBLE_CURVATURE = 0.002
"""Fraction of M0: a fraction of the noise of a good scan."""
_MOST_KNOWN = 1024  # maps kept: an adaptive scan without end must not fill the memory

Rows = tuple[np.ndarray, np.ndarray]
"""As `design.rows` gives them."""


class Advice(NamedTuple):
    """What to play next, and what it is worth: expected loss of log confidence-region area, mean over the sampled voxels [nat]."""

    block: SaturationBlock | None
    """None: limits and quota leave no candidate, or the likelihood describes none."""
    gain: float
    scheduled_gain: float
    """Of the schedule's next block; 0 at its end."""
    remaining_gain: float
    """Of the rest of the schedule together, at most `MOST_AHEAD` images: what stopping now would forgo."""
    beyond: Float[np.ndarray, " nuisance"]
    """As in `design.Answer`."""
    best_gain: float
    """Of the candidate that is expected to tell most, whatever it costs; 0 without one."""


class Course(NamedTuple):
    """One course of the scan so far."""

    magnetisation: Magnetisation
    """At the coarse nodes and points, after the latest readout."""
    played: tuple[Played, ...]
    """Dummies included, back to back."""

    @property
    def end_s(self) -> float:
        return self.played[-1].end_s if self.played else 0.0

    @property
    def blocks(self) -> list[SaturationBlock]:
        return [one.block for one in self.played]


class Prospect:
    """The next pulse of a scan."""

    def __init__(self, scan: Scan, quota: Quota | None = None) -> None:
        """Compile and simulate the candidates and the schedule: seconds.

        Raises
        ------
        ScansteerError
            JAX computes in single precision, in which the spin physics overflows.
        """
        if not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
            raise ScansteerError("The spin physics needs double precision; call jax.config.update('jax_enable_x64', True) before anything else.")
        self.scan = scan
        self.quota = quota or Quota()
        self._star, ahead = forward.coarse(scan)
        self._coarse = Coarse(ahead, jax.jit(dictionary.reading)(ahead), jax.tree.map(jnp.asarray, self._star.place))
        self._block_map = jax.jit(dictionary.block_map, compiler_options=for_large_programs())
        self._play = jax.jit(dictionary.play)
        self._candidates_at = jax.jit(_candidates_at)
        self._rest_at = jax.jit(_rest_at)
        self._predict = jax.jit(predictive.predict)
        self._predict_ahead = jax.jit(predictive.predict_ahead)
        self._answer = jax.jit(design.answer)
        self._schedule = _stacked([self._map_of(block) for block in scan.schedule])
        self._start = jax.jit(dictionary.start)(ahead)
        self._weights: dict[frozenset, np.ndarray] = {}
        self._maps: dict[SaturationBlock, LongitudinalMap] = {}
        offered, course = candidates.candidates(scan), self._underway()
        bends = self._bends_of_schedule(course)
        self.n_offered = len(offered)
        """Pulses within the scan's limits. Only those are candidates that the likelihood describes as well as it does the approved schedule."""
        self.candidates, self._responses = self._described(offered, course, bends)
        self._probes, self._responses_of_probes = self._described(candidates.probes(scan), course, bends)
        self._coordinates = candidates.coordinates(scan, self.candidates)
        self._predict(self._coarse, self._responses_of_probes, course.magnetisation)  # compiles: a probe must not wait for it

    def begin(self) -> Course:
        """Before the first image; dummies have been played."""
        course = Course(self._start, ())
        for _ in range(self.scan.first_state.n_dummies):
            course = self.play(course, self.scan.schedule[0])
        return course

    def play(self, course: Course, block: SaturationBlock) -> Course:
        """One more repetition. The first of all skips its recovery: the first state is that before its RF."""
        begun = block if course.played else block.model_copy(update={"t_rec_s": 0.0})
        left, _ = self._play(self._coarse.forward, self._coarse.read, course.magnetisation, self._known_map_of(begun))
        return Course(left, (*course.played, Played(course.end_s, block)))

    def allowed(self, course: Course) -> Bool[np.ndarray, " candidate"]:
        """Candidates within limits and quota."""
        latest = limits.blocks(course.blocks[-self.quota.window :])
        barred = design.barred(self.quota, self._coordinates, candidates.coordinates(self.scan, latest))
        return limits.allowed(self.scan.limits, self.scan.train, course.played, self.candidates) & ~barred

    def may_follow(self, course: Course, block: SaturationBlock) -> bool:
        """Whether any block, a candidate or not, keeps limits and quota."""
        one = limits.blocks([block])
        latest = candidates.coordinates(self.scan, limits.blocks(course.blocks[-self.quota.window :]))
        barred = design.barred(self.quota, candidates.coordinates(self.scan, one), latest)
        return bool(limits.allowed(self.scan.limits, self.scan.train, course.played, one)[0] and not barred[0])

    def cost(self, blocks: Blocks) -> Float[np.ndarray, " block"]:
        """What playing each block costs: 1 for one that lasts as long as the schedule's blocks do on average."""
        usual = np.mean([block.duration_s for block in self.scan.schedule])
        return (blocks.duration_s / usual) ** HASTE

    def read_candidates(self, course: Course) -> Float[np.ndarray, "node candidate point"]:
        """What each candidate would read next per unit amplitude, at the coarse nodes and points."""
        return np.asarray(self._predict(self._coarse, self._responses, course.magnetisation))

    def read(self, course: Course, block: SaturationBlock) -> Float[np.ndarray, "node 1 point"]:
        """What any block would read next."""
        begun = block if course.played else block.model_copy(update={"t_rec_s": 0.0})
        one = jax.tree.map(lambda leaf: leaf[None], self._known_map_of(begun))
        return np.asarray(self._predict_ahead(self._coarse, course.magnetisation, one))

    def columns(self, maps: dict[str, Measured]) -> Float[np.ndarray, "mixture column node_"]:
        """From the coarse nodes to the likelihood's columns.

        Parameters
        ----------
        maps
            Where the likelihood is linearised in the mapped auxiliaries.
        """
        key = frozenset(maps.items())
        if key not in self._weights:
            self._weights[key] = self._with_offset(predictive.columns(self._star, maps))
        return self._weights[key]

    def plain_columns(self, maps: Mapping[str, Measured]) -> Float[np.ndarray, "column node_"]:
        """The same without mixtures: every nuisance that is not mapped over all of its range."""
        whole = self._star._replace(axes=tuple(axis._replace(n_slices=1) for axis in self._star.axes))
        return self._with_offset(predictive.columns(whole, maps))[0]

    def _with_offset(self, columns: Float[np.ndarray, "mixture column node"]) -> np.ndarray:
        return nuisance.with_offset(columns, *nuisance.of_range(*bounds(self.scan.readout.offset)))

    def answer(self, course: Course, question: Question, rows: Rows, next_repetition: int) -> Answer:
        """Expected gains of all candidates, and of the schedule from `next_repetition` on."""
        n_scheduled = len(self.scan.schedule)
        ahead = next_repetition + np.arange(min(n_scheduled, MOST_AHEAD))
        blocks = jax.tree.map(lambda leaf: leaf[np.minimum(ahead, n_scheduled - 1)], self._schedule)
        candidates_at = self._candidates_at(self._coarse, self._responses, course.magnetisation, rows)
        rest_at = self._rest_at(self._coarse, course.magnetisation, blocks, rows)
        return jax.block_until_ready(self._answer(question, candidates_at, rest_at, (ahead < n_scheduled).astype(float)))

    def probe(self, course: Course) -> SaturationBlock | None:
        """The pulse that puts the model to the test. None: limits leave none.

        First the first image's once more, for it alone depends on the first state and the earliest on a gain that drifts; then, of those that leave
        about half of the signal, where most is to be seen, the one least like all that was played.
        """
        images = course.blocks[self.scan.first_state.n_dummies :]
        if images and images[0] not in images[1:] and self.may_follow(course, images[0]):
            return images[0]
        saturated = [block for block in course.blocks if block.b1_ut > 0]
        is_allowed = limits.allowed(self.scan.limits, self.scan.train, course.played, self._probes)
        if not is_allowed.any():
            return None
        signal = np.clip(np.mean(np.asarray(self._predict(self._coarse, self._responses_of_probes, course.magnetisation))[0], axis=-1), 0.0, 1.0)
        unlike = candidates.distances(self._probes, limits.blocks(saturated), self.scan.limits.b1_max_ut).min(axis=1, initial=FARTHEST)
        return self._probes.block(int(np.argmax(np.where(is_allowed, signal * (1 - signal) * unlike, -1.0))))

    def advise(self, course: Course, answer: Answer, is_enough: bool = False) -> Advice:
        """The allowed candidate of the largest worth, expected gain over cost; of those as good, the one with the least RF energy.

        The less RF, the less the reading depends on B1, offset and the pool model, and the more SAR is left for later. A first unsaturated
        image counts as good already where it is worth half of the best: it tells the amplitude whatever is wrong with the model, and
        what it makes of later images a gain that looks one image ahead does not see.

        Parameters
        ----------
        is_enough
            The targets are met and only the least number of images or confirmations are missing: what the model says of itself is known well enough,
            and the next image had better test it (`probe`; no gain is promised).
        """
        gains = np.where(self.allowed(course), np.asarray(answer.candidates), -np.inf)
        most = max(0.0, float(np.max(gains, initial=0.0)))
        advice = Advice(None, 0.0, float(answer.scheduled), float(answer.remaining), np.asarray(answer.beyond, float), most)
        if is_enough and (block := self.probe(course)) is not None:
            return advice._replace(block=block)
        worth = gains / self.cost(self.candidates)
        if not np.isfinite(best := float(np.max(worth, initial=-np.inf))):
            return advice
        has_reference = any(block.b1_ut == 0 for block in course.blocks)
        tie = np.where((self.candidates.b1_ut == 0) & (not has_reference), TIE_REFERENCE, TIE)
        as_good = np.flatnonzero(worth >= (1 - tie) * best)
        energy = (self.candidates.b1_ut**2 * self.candidates.t_sat_s)[as_good]
        chosen = int(as_good[np.lexsort((-worth[as_good], energy))[0]])
        return advice._replace(block=self.candidates.block(chosen), gain=float(gains[chosen]))

    def _underway(self) -> Course:
        """Some images into the schedule."""
        course = self.begin()
        for block in self.scan.schedule[:2]:
            course = self.play(course, block)
        return course

    def _bends_of_schedule(self, course: Course) -> Float[np.ndarray, "axis 1"]:
        """The most that a scheduled pulse bends along each nuisance, and at least what is negligible."""
        schedule = np.concatenate([self.read(course, block) for block in self.scan.schedule], axis=1)
        usual = np.max(predictive.curvature(self._star, schedule), axis=1, keepdims=True, initial=0.0)
        return np.maximum(usual, NEGLIGIBLE_CURVATURE)

    def _described(self, blocks: Blocks, course: Course, most: Float[np.ndarray, "axis 1"]) -> tuple[Blocks, Responses]:
        """Blocks that bend no more. The likelihood takes nuisances to first order, few to second.

        (With B0 and B1 unknown, strong pulses near water bend so much that no posterior that used them would hold.)
        """
        respond, tissue = jax.jit(predictive.response), self._coarse.place[1]
        simulated = [blocks.block(index) for index in range(len(blocks))] or self.scan.schedule[:1]  # of no block at all, shapes would be unknown
        each = [respond(self._coarse.read, self._map_of(block), tissue) for block in simulated]
        responses = predictive.together(each)
        bends = predictive.curvature(self._star, np.asarray(self._predict(self._coarse, responses, course.magnetisation)))
        kept = np.flatnonzero(np.all(bends <= most, axis=0)[: len(blocks)])
        return blocks.take(kept), predictive.some(responses, kept)

    def _map_of(self, block: SaturationBlock) -> LongitudinalMap:
        return self._block_map(self._coarse.forward, tissue_model.saturation(self.scan, block))

    def _known_map_of(self, block: SaturationBlock) -> LongitudinalMap:
        if block not in self._maps:
            if len(self._maps) >= _MOST_KNOWN:
                self._maps.pop(next(iter(self._maps)), None)
            self._maps[block] = self._map_of(block)
        return self._maps[block]


def _candidates_at(coarse: Coarse, responses: Responses, state: Magnetisation, rows: Rows):
    return predictive.at_draws(predictive.predict(coarse, responses, state), rows)


def _rest_at(coarse: Coarse, state: Magnetisation, blocks: LongitudinalMap, rows: Rows):
    return predictive.at_draws(predictive.predict_ahead(coarse, state, blocks), rows)


def _stacked(trees: Sequence):
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *trees)
