"""Is an encoder calibrated? Simulated scans whose truth is known: coverage, simulation-based calibration, agreement with the reference.

And what makes it so: `widened` sets the factors by which its posteriors are widened after every number of images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy import stats

from scansteer.core import coordinate as coordinates
from scansteer.core import encoder as encoders
from scansteer.core import training
from scansteer.core.code_generation import with_barriers
from scansteer.core.encoder import Encoder, Gaussian, State
from scansteer.core.likelihood import Noise
from scansteer.realtime.progress import Tell
from scansteer.realtime.simulated import DOF_RANGE, SIGMA_RANGE, Conditions, Drawn, Simulator

LEVELS = (0.5, 0.8, 0.95)
N_GROUPS = 2
"""Groups of 64 voxels in each simulated scan: voxels of one scan share its noise and its pulses, so that many scans tell more than many voxels."""

AIM = 0.94
"""Share of simulated truths that the 95 % region is widened to hold. Not more: what is wider than the reference is farther from it, and from
scan to scan the share differs by a point either way."""



class Simulated(NamedTuple):
    """One simulated scan, and what an encoder makes of it."""

    conditions: Conditions
    expected: np.ndarray
    drawn: Drawn
    encoded: Gaussian
    """(image, voxel, ..)."""


def widened(simulator: Simulator, encoder: Encoder, seed: int, n_scans: int, tell: Tell) -> Encoder:
    """The same encoder with the factors that make its 95 % regions hold `AIM` of the truths of other simulated scans; none below 1.

    A factor is that of its number of images and the two beside it together, for from scan to scan they scatter more than they differ.
    """
    plain = eqx.tree_at(lambda e: e.widening, encoder, jnp.ones_like(encoder.widening))
    scans = list(_simulated(simulator, plain, (seed, 7), n_scans, tell, "widening"))
    distances = np.concatenate([_distances(each.drawn.truth, each.encoded) for each in scans], axis=1)
    reached = np.array([np.quantile(distances[max(0, index - 1) : index + 2], AIM) for index in range(len(distances))])
    factors = np.maximum(np.sqrt(reached / stats.chi2.ppf(0.95, 2)), 1.0)
    size = len(encoder.widening)
    factors = np.pad(factors[:size], (0, max(0, size - len(factors))), mode="edge")
    return eqx.tree_at(lambda e: e.widening, encoder, jnp.asarray(factors, jnp.float32))


def calibrate(
    simulator: Simulator,
    encoder: Encoder,
    seed: int,
    n_scans: int,
    pool: ThreadPoolExecutor,
    tell: Tell,
) -> list[dict[str, Any]]:
    """For every number of images from 3: coverage of the encoder's and the reference's regions, rank statistics, divergence from the reference."""
    truths, ours, theirs = [], [], []
    for conditions, expected, drawn, encoded in _simulated(simulator, encoder, (seed, 5), n_scans, tell, "calibrating"):
        theirs.append(simulator.references(drawn, conditions, expected, pool))
        ours.append(encoded)
        truths.append(drawn.truth)
    truth = np.concatenate(truths)
    mine, reference = (jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *each) for each in (ours, theirs))
    names = simulator.scan.parameter_names
    return [_figures(n, truth, _at(mine, n), _at(reference, n), names) for n in range(3, len(mine.mean) + 1)]


def _simulated(
    simulator: Simulator, encoder: Encoder, seed: tuple[int, int], n_scans: int, tell: Tell, label: str
) -> Iterator[Simulated]:
    """Half of the scans play the schedule; the others random orders of its pulses."""
    infer = eqx.filter_jit(
        lambda encoder, plan, state, noise: encoders.infer(encoder, plan, state, noise)[0],
        compiler_options=with_barriers(),  # pyright: ignore[reportCallIssue] - for jax.jit
    )
    plan = encoders.plan(encoder)
    for number in range(n_scans):
        tell(label, number, n_scans)
        rng = np.random.default_rng([*seed, number])
        blocks = simulator.scan.schedule if number % 2 == 0 else simulator.random_order(rng)
        sigma, dof = (float(np.exp(rng.uniform(*np.log(span)))) for span in (SIGMA_RANGE, DOF_RANGE))
        conditions = Conditions(blocks, sigma, dof)
        expected = simulator.expected(blocks)
        drawn = simulator.draw(rng, conditions, N_GROUPS, expected)
        yield Simulated(conditions, expected, drawn, _encoded(simulator, encoder, plan, infer, conditions, drawn, expected))


def _encoded(simulator: Simulator, encoder: Encoder, plan, infer, conditions: Conditions, drawn, expected) -> Gaussian:
    """The encoder's posteriors, (image, voxel, ..)."""
    coefficients = simulator.coefficients(encoder.basis, expected, drawn.maps)
    n_voxels = drawn.signals.shape[1]
    group = np.arange(n_voxels) * coefficients.shape[1] // n_voxels
    noise = Noise(*(jnp.asarray(each) for each in (conditions.sigma, conditions.dof, simulator.scan.noise.discrepancy)))
    state: State = encoders.init(n_voxels, n_voxels, coefficients.shape[2])
    result = []
    for image, signal in zip(coefficients, drawn.signals, strict=True):
        state = encoders.update(encoder.basis, state, jnp.asarray(image[group].T), jnp.asarray(signal))
        result.append(jax.tree.map(np.asarray, infer(encoder, plan, state, noise)))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *result)


def _at(posterior: Gaussian, n: int) -> Gaussian:
    return Gaussian(posterior.mean[n - 1], posterior.root[n - 1])


def _figures(n: int, truth: np.ndarray, ours: Gaussian, theirs: Gaussian, names: Sequence[str]) -> dict[str, Any]:
    deviation = np.stack([ours.root[:, 0], np.hypot(ours.root[:, 1], ours.root[:, 2])], axis=1)
    ranks = stats.norm.cdf((truth - ours.mean) / deviation)
    divergence = np.asarray(training.divergence(theirs, ours))
    return {
        "n": n,
        "draws": len(truth),
        "coverage": {f"{level:g}": _coverage(truth, ours, level) for level in LEVELS},
        "coverage_reference_moments": {f"{level:g}": _coverage(truth, theirs, level) for level in LEVELS},
        "rank_ks": {name: float(stats.kstest(ranks[:, axis], "uniform").statistic) for axis, name in enumerate(names)},
        "rank_histogram": {name: np.histogram(ranks[:, axis], 10, (0, 1))[0].tolist() for axis, name in enumerate(names)},
        "divergence_median": float(np.median(divergence)),
        "divergence_p99": float(np.percentile(divergence, 99)),
    }


def _coverage(truth: np.ndarray, posterior: Gaussian, level: float) -> float:
    """Share of truths inside the ellipse of that probability."""
    return float(np.mean(_distances(truth, posterior) <= stats.chi2.ppf(level, 2)))


def _distances(truth: Float[np.ndarray, "voxel 2"], posterior: Gaussian) -> Float[np.ndarray, "*image voxel"]:
    """Squared Mahalanobis distances of the truths."""
    whitened = np.asarray(coordinates.whiten(jnp.asarray(truth - posterior.mean), jnp.asarray(posterior.root)))
    return np.sum(whitened**2, axis=-1)
