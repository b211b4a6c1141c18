"""The next pulse of a session: asks the scan's prospect about a sample of the region's voxels, one course of the scan long."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from scansteer.core import design, prediction, predictive
from scansteer.core.design import Question
from scansteer.core.grid_posterior import Info
from scansteer.core.noise import NoiseEstimate
from scansteer.core.prediction import Prediction
from scansteer.protocols.prospect import Advice, Prospect, Rows
from scansteer.protocols.scan import SaturationBlock, Scan
from scansteer.realtime.reference import Reference

jax.config.update("jax_enable_x64", True)  # the physics needs it; core leaves the choice to its user

N_VOXELS = 64
"""Voxels whose posteriors are asked, spread over regions and posterior means."""
FEWEST_DOF = 10
"""Degrees of freedom behind the noise from which on the next image is predicted: before, its scatter is a guess."""


class Advisor:
    """Chooses the next pulse after every image."""

    def __init__(self, scan: Scan) -> None:
        """Compile and simulate the candidates: seconds."""
        self.scan = scan
        self._prospect = Prospect(scan)
        self._course = self._prospect.begin()
        self._at_draws, self._predict = jax.jit(predictive.at_draws), jax.jit(prediction.predict)
        self._asked: tuple[Question, Rows] | None = None
        self._sample = np.zeros(0, int)

    @property
    def n_candidates(self) -> tuple[int, int]:
        """Pulses that the scan's limits offer, and how many of them are weighed: those that the likelihood describes."""
        return self._prospect.n_offered, len(self._prospect.candidates)

    def rehearse(self, reference: Reference) -> None:
        """Advise once on the reference's made-up voxels, so that nothing is left to compile, then forget it."""
        self.play(self.scan.schedule[0])
        region = np.arange(len(reference.rehearsal.nrmse))
        self.advise(reference, reference.rehearsal, [region], NoiseEstimate(1.0, 1.0), 0)
        self._foresee(self.scan.schedule[0])
        self._course, self._asked = self._prospect.begin(), None

    def play(self, block: SaturationBlock) -> None:
        """Carry magnetisation and history through one repetition."""
        self._course = self._prospect.play(self._course, block)

    def foresee(self, block: SaturationBlock) -> tuple[Int[np.ndarray, " voxel"], Prediction] | None:
        """What the sampled voxels should read after `block`, as far as the posterior knows that was asked last; to be called before `play`.

        The voxels are indices into the leaves of the `info` that was asked about; none before anything can be said.
        """
        if self._asked is None or float(self._asked[0].dof) < FEWEST_DOF:
            return None
        counts = np.asarray(self._asked[0].importance) > 0
        mean, variance = self._foresee(block)
        return self._sample[counts], prediction.of_region(mean[counts], variance[counts], float(self._asked[0].variance) ** 0.5)

    def _foresee(self, block: SaturationBlock) -> tuple[np.ndarray, np.ndarray]:
        assert self._asked is not None
        question, rows = self._asked
        signals = self._at_draws(self._prospect.read(self._course, block), rows)
        mean, variance = self._predict(question, signals)
        return np.asarray(mean, float), np.asarray(variance, float)

    def advise(
        self,
        reference: Reference,
        info: Info,
        regions: Sequence[np.ndarray],
        noise: NoiseEstimate,
        repetition: int,
        is_enough: bool = False,
    ) -> Advice:
        """After the image of a repetition was absorbed and its block played.

        Parameters
        ----------
        regions
            Voxels of each region, as indices into the leaves of `info`.
        is_enough
            As in `Prospect.advise`.
        """
        question, rows = self._question(reference, info, regions, noise, repetition)
        self._asked = question, rows
        return self._prospect.advise(self._course, self._prospect.answer(self._course, question, rows, repetition + 1), is_enough)

    def _question(
        self, reference: Reference, info: Info, regions: Sequence[np.ndarray], noise: NoiseEstimate, repetition: int
    ) -> tuple[Question, Rows]:
        summary, box = info.summary, reference.prior.box
        voxels, importance = sampled(regions, summary.mean)
        seed = design.seed_of(self.scan.name, repetition)
        drawn = design.draw(reference.log_posterior(voxels), summary.mean[voxels], summary.covariance[voxels], box, seed)
        self._sample = voxels
        running = reference.running(voxels, drawn.cells)
        question = Question(
            weights=np.stack([self._prospect.columns(maps) for maps in running.maps]),
            gram=running.gram,
            projection=running.projection,
            energy=running.energy,
            n_images=jnp.asarray(running.n_images),
            shift=running.shift,
            draw_weights=drawn.weights,
            mean_weights=drawn.mean_weights,
            contrast=drawn.contrast,
            importance=importance,
            variance=jnp.asarray(noise.sigma**2),
            dof=jnp.asarray(float(noise.dof)),
            discrepancy=jnp.asarray(self.scan.noise.discrepancy**2),
        )
        return question, design.rows(drawn.cells, box.n_points)


def sampled(regions: Sequence[np.ndarray], values: Float[np.ndarray, "voxel 2"]) -> tuple[np.ndarray, np.ndarray]:
    """`N_VOXELS` voxels spread over regions and values, and their importance: half shared equally by the regions, half by size.

    With fewer voxels than that the last one is repeated, with no importance.
    """
    regions = [region for region in regions if len(region)]
    sizes = [len(region) for region in regions]
    chosen = [design.stratify(region, values, n) for region, n in zip(regions, design.share_out(sizes, N_VOXELS), strict=True)]
    shares = [0.5 / len(regions) + 0.5 * size / sum(sizes) for size in sizes]
    importance = np.concatenate([np.full(len(each), share / max(len(each), 1)) for each, share in zip(chosen, shares, strict=True)])
    voxels = np.concatenate(chosen)[:N_VOXELS]
    missing = N_VOXELS - len(voxels)
    return np.pad(voxels, (0, missing), mode="edge"), np.pad(importance[:N_VOXELS], (0, missing))
