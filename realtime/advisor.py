"""The next pulse: joins the scan's candidates and limits, what they would read, and how much that is expected to tell.

Everything is simulated and compiled when the object is made. It carries its own, coarse magnetisation along with what is played.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from scansteer.core import design, dictionary, nuisance, predictive
from scansteer.core.design import Answer, Question, Quota
from scansteer.core.grid_posterior import Info
from scansteer.core.noise import NoiseEstimate
from scansteer.core.nuisance import Measured
from scansteer.core.predictive import Coarse
from scansteer.core.signal import LongitudinalMap
from scansteer.protocols import candidates, forward, limits, tissue_model
from scansteer.protocols.limits import Played
from scansteer.protocols.scan import SaturationBlock, Scan, bounds
from scansteer.realtime.reference import Reference

jax.config.update("jax_enable_x64", True)  # the physics needs it; core leaves the choice to its user

N_VOXELS = 64
"""Voxels whose posteriors are asked, spread over regions and posterior means."""
MOST_AHEAD = 48
"""Images of the schedule's rest that are looked ahead."""


Rows = tuple[np.ndarray, np.ndarray]
"""As `design.rows` gives them."""


class Advice(NamedTuple):
    """What to play next, and what it is worth: expected loss of log confidence-region area, mean over the sampled voxels [nat]."""

    block: SaturationBlock | None
    """None: limits and quota leave no candidate."""
    gain: float
    scheduled_gain: float
    """Of the schedule's next block; 0 at its end."""
    remaining_gain: float
    """Of the rest of the schedule together, at most `MOST_AHEAD` images: what stopping now would forgo."""


class Advisor:
    """Chooses the next pulse after every image."""

    def __init__(self, scan: Scan, quota: Quota | None = None) -> None:
        """Compile and simulate the candidates: seconds."""
        self.scan = scan
        self.candidates = candidates.candidates(scan)
        self.quota = quota or Quota()
        self._coordinates = candidates.coordinates(scan, self.candidates)
        self._star, self._forward = forward.coarse(scan)
        self._block_map = jax.jit(dictionary.block_map)
        self._play = jax.jit(dictionary.play)
        self._candidates_at = jax.jit(lambda coarse, state, rows: predictive.at_draws(predictive.predict(coarse, state), rows))
        self._rest_at = jax.jit(lambda coarse, state, blocks, rows: predictive.at_draws(predictive.predict_ahead(coarse, state, blocks), rows))
        self._answer = jax.jit(design.answer)
        self._coarse = self._simulated()
        self._schedule = _stacked([self._map_of(block) for block in scan.schedule])
        self._weights: dict[frozenset, np.ndarray] = {}
        self._begin()
        self._warm_up()
        self._begin()

    def rehearse(self, reference: Reference) -> None:
        """Advise once on the reference's made-up voxels, so that nothing is left to compile, then forget it."""
        self.play(self.scan.schedule[0])
        region = np.arange(len(reference.rehearsal.nrmse))
        self.advise(reference, reference.rehearsal, [region], NoiseEstimate(1.0, 1.0), 0)
        self._begin()

    def play(self, block: SaturationBlock) -> None:
        """Carry magnetisation and history through one repetition."""
        begun = block if self.history else block.model_copy(update={"t_rec_s": 0.0})  # the first state is that before the RF
        self.history.append(Played(self.history[-1].end_s if self.history else 0.0, block))
        self._state, _ = self._play(self._forward, self._coarse.read, self._state, self._map_of(begun))

    def allowed(self) -> Bool[np.ndarray, " candidate"]:
        """Candidates within limits and quota."""
        latest = limits.blocks([one.block for one in self.history[-self.quota.window :]])
        barred = design.barred(self.quota, self._coordinates, candidates.coordinates(self.scan, latest))
        return limits.allowed(self.scan.limits, self.scan.train, self.history, self.candidates) & ~barred

    def advise(self, reference: Reference, info: Info, regions: Sequence[np.ndarray], noise: NoiseEstimate, repetition: int) -> Advice:
        """After the image of a repetition was absorbed and its block played.

        Parameters
        ----------
        regions
            Voxels of each region, as indices into the leaves of `info`.
        """
        answer = self._asked(*self._question(reference, info, regions, noise, repetition), repetition + 1)
        allowed, gains = self.allowed(), np.asarray(answer.candidates)
        best = int(np.argmax(np.where(allowed, gains, -np.inf)))
        block, gain = (self.candidates.block(best), float(gains[best])) if allowed[best] else (None, 0.0)
        return Advice(block, gain, float(answer.scheduled), float(answer.remaining))

    def _question(
        self, reference: Reference, info: Info, regions: Sequence[np.ndarray], noise: NoiseEstimate, repetition: int
    ) -> tuple[Question, Rows]:
        summary, box = info.summary, reference.prior.box
        voxels, importance = sampled(regions, summary.mean)
        seed = design.seed_of(self.scan.name, repetition)
        drawn = design.draw(info.log_posterior[voxels], summary.mean[voxels], summary.covariance[voxels], box, seed)
        running = reference.running(voxels, drawn.cells)
        question = Question(
            weights=np.stack([self._columns(maps) for maps in running.maps]),
            gram=running.gram,
            projection=running.projection,
            shift=running.shift,
            draw_weights=drawn.weights,
            contrast=drawn.contrast,
            importance=importance,
            variance=jnp.asarray(noise.sigma**2),
            discrepancy=jnp.asarray(self.scan.noise.discrepancy**2),
        )
        return question, design.rows(drawn.cells, box.n_points)

    def _asked(self, question: Question, rows: Rows, next_repetition: int) -> Answer:
        n_scheduled = len(self.scan.schedule)
        ahead = next_repetition + np.arange(min(n_scheduled, MOST_AHEAD))
        blocks = jax.tree.map(lambda leaf: leaf[np.minimum(ahead, n_scheduled - 1)], self._schedule)
        counts = (ahead < n_scheduled).astype(float)
        rest = self._rest_at(self._coarse, self._state, blocks, rows)
        return jax.block_until_ready(self._answer(question, self._candidates_at(self._coarse, self._state, rows), rest, counts))

    def _columns(self, maps: dict[str, Measured]) -> Float[np.ndarray, "column node_"]:
        """From the star's nodes to the likelihood's columns, of the middle component where nuisances are a mixture."""
        key = frozenset(maps.items())
        if key not in self._weights:
            columns = predictive.columns(self._star, maps)
            lower, upper = bounds(self.scan.readout.offset)
            self._weights[key] = nuisance.with_offset(columns, 0.5 * (lower + upper), (upper - lower) / 12**0.5)[len(columns) // 2]
        return self._weights[key]

    def _simulated(self) -> Coarse:
        read = jax.jit(dictionary.reading)(self._forward)
        respond = jax.jit(predictive.response)
        chain, tissue = jax.tree.map(jnp.asarray, self._star.place)
        each = [respond(read, self._map_of(self.candidates.block(index)), tissue) for index in range(len(self.candidates))]
        return Coarse(self._forward, read, predictive.together(each), (chain, tissue))

    def _map_of(self, block: SaturationBlock) -> LongitudinalMap:
        return self._block_map(self._forward, tissue_model.saturation(self.scan, block))

    def _begin(self) -> None:
        self.history: list[Played] = []
        self._state = jax.jit(dictionary.start)(self._forward)
        for _ in range(self.scan.first_state.n_dummies):
            self.play(self.scan.schedule[0])

    def _warm_up(self) -> None:
        """Run everything once on made-up voxels."""
        n_columns = len(self._columns({}))
        shape = (N_VOXELS, design.N_DRAWS)
        question = Question(
            weights=np.repeat(self._columns({})[None], N_VOXELS, axis=0),
            gram=np.broadcast_to(np.eye(n_columns), (*shape, n_columns, n_columns)),
            projection=np.ones((*shape, n_columns)),
            shift=np.zeros((N_VOXELS, n_columns - 1)),
            draw_weights=np.ones(shape),
            contrast=np.ones((*shape, design.N_DRAWS)),
            importance=np.ones(N_VOXELS),
            variance=jnp.asarray(1.0),
            discrepancy=jnp.asarray(0.0),
        )
        self.play(self.scan.schedule[0])
        self._asked(question, design.rows(np.zeros(shape, int), forward.N_POINTS), 1)


def sampled(regions: Sequence[np.ndarray], values: Float[np.ndarray, "voxel 2"]) -> tuple[np.ndarray, np.ndarray]:
    """`N_VOXELS` voxels spread over regions and values, and their importance: half shared equally by the regions, half by size.

    With fewer voxels than that the first one is repeated, with no importance.
    """
    sizes = [len(region) for region in regions]
    chosen = [design.stratify(region, values, n) for region, n in zip(regions, design.share_out(sizes, N_VOXELS), strict=True)]
    shares = [0.5 / len(regions) + 0.5 * size / sum(sizes) for size in sizes]
    importance = np.concatenate([np.full(len(each), share / len(each)) for each, share in zip(chosen, shares, strict=True)])
    voxels = np.concatenate(chosen)
    missing = N_VOXELS - len(voxels)
    return np.pad(voxels, (0, missing), mode="edge"), np.pad(importance, (0, missing))


def _stacked(trees: Sequence):
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *trees)
