"""What each region's mean signal says: the posterior of a voxel that reads the mean of its region's voxels.

Averaging lowers the noise, and nothing else: what was not measured, and the scan's discrepancy, all voxels share, so the mean's interval does not
shrink below them. Next to so little noise even a good model is wrong by more, so the discrepancy of a mean is not known either: its values of
`EXTRA`, beside the scan's own, are equally probable before the scan, and the images weigh them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.special import ndtr, ndtri

from scansteer.core import grid_posterior, likelihood
from scansteer.core.code_generation import for_blocks_of_voxels
from scansteer.core.grid_posterior import Info, OnLattice, Prior
from scansteer.core.likelihood import Noise, Sums
from scansteer.core.noise import NoiseEstimate
from scansteer.protocols import forward
from scansteer.realtime.reference import Linearised, Reference

EXTRA = 0.001, 0.002, 0.004, 0.008
"""Standard deviations of the model's error beyond the scan's discrepancy [fraction of M0]. The two-pool model leaves 0.2 to 0.3 % of the
vials of the published phantom."""
N_POINTS = (56, 56)
"""Lattice over the box. Finer than that of voxels: means are narrower."""
TOGETHER = 8
"""Posteriors described at a time: those of two regions. Time grows with the number of regions; a single one is padded to this."""


class _Region(NamedTuple):
    voxels: np.ndarray
    n_independent: float
    linearised: Linearised


class RegionMeans:
    """The posterior of every region's mean signal, one image at a time."""

    def __init__(self, reference: Reference, n_points: tuple[int, int] = N_POINTS) -> None:
        """Compile: seconds.

        Parameters
        ----------
        reference
            Whose dictionary and discrepancy are used; it plays the pulses.
        n_points
            Lattice over the box of (f, k).
        """
        self._reference = reference
        self._prior = forward.prior(reference.scan, n_points)
        self._discrepancy = jnp.hypot(reference.scan.noise.discrepancy, jnp.asarray(EXTRA))
        self._step = jax.jit(_step, donate_argnums=0, compiler_options=for_blocks_of_voxels())
        self._describe = jax.jit(grid_posterior.describe, compiler_options=for_blocks_of_voxels())
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="scansteer-means")
        self._regions: list[_Region] = []
        self._sums: list[Sums] = []
        self._rehearse()

    def begin(self, maps: dict[str, Float[np.ndarray, " voxel"]], regions: Sequence[np.ndarray]) -> None:
        """Fix the regions.

        Parameters
        ----------
        maps
            Auxiliary values of all voxels, by name and in the scan's units.
        regions
            Indices of each region's voxels.
        """
        fraction = self._reference.scan.noise.effective_voxel_fraction
        clipped = {name: self._reference.clipped(name, maps[name]) for name in maps if name in self._reference.mapped}
        means = [{name: values[at].mean(keepdims=True) for name, values in clipped.items()} for at in regions]
        self._regions = [
            _Region(at, max(fraction * len(at), 1.0), self._reference.linearised(each)) for at, each in zip(regions, means, strict=True)
        ]
        self._sums = [self._reference.empty(1, self._prior.box) for _ in regions]

    def absorb(self, expected: Float[jax.Array, "node point"], signal: Float[np.ndarray, " voxel"], noise: NoiseEstimate) -> Info:
        """Add one image whose expected signals are known, and infer; NumPy leaves over all regions."""
        box = self._prior.box
        shared = None if self._reference.mapped else self._reference.columns(self._regions[0].linearised.weights, expected, box)

        def one(number: int) -> OnLattice:
            region = self._regions[number]
            mean = jnp.asarray(signal[region.voxels].mean(keepdims=True), jnp.float64)
            here = Noise(jnp.asarray(noise.sigma / np.sqrt(region.n_independent)), jnp.asarray(noise.dof), self._discrepancy)
            columns = self._reference.columns(region.linearised.weights, expected, box) if shared is None else shared
            self._sums[number], posterior = self._step(self._sums[number], columns, mean, here, self._prior, region.linearised.shift)
            return jax.tree.map(np.asarray, posterior)

        found = jax.tree.map(lambda *leaves: np.concatenate(leaves), *self._pool.map(one, range(len(self._regions))))
        return _weighed(*self._described(found))

    def _described(self, posteriors: OnLattice) -> tuple[Info, Float[np.ndarray, " posterior"]]:
        """`TOGETHER` at a time, the last ones of them padded."""
        n = len(posteriors.energy)
        parts = []
        for first in range(0, n, TOGETHER):
            rows = np.minimum(np.arange(first, first + TOGETHER), n - 1)
            few = jax.tree.map(lambda leaf, rows=rows: leaf[rows], posteriors)
            on_lattice = OnLattice(few.log_posterior, few.residual.T, few.amplitude.T, few.energy, few.power[0])
            parts.append(jax.block_until_ready(self._describe(on_lattice, self._prior)))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:n], *parts)

    @property
    def n_independent(self) -> list[float]:
        """Independent voxels behind each region's mean."""
        return [region.n_independent for region in self._regions]

    def close(self) -> None:
        self._pool.shutdown(wait=False)

    def _rehearse(self) -> None:
        """Run everything twice on a made-up voxel, then forget it."""
        axes = {axis.name: axis for axis in self._reference.model.axes}
        self.begin({name: np.full(1, axes[name].lower) for name in self._reference.mapped}, [np.zeros(1, int)])
        for _ in range(2):
            self.absorb(self._reference.expected, np.full(1, 100.0), NoiseEstimate(1.0, 1.0))
        self.begin({}, [])


def _step(
    sums: Sums,
    columns: Float[jax.Array, "column mixture cell"],
    signal: Float[jax.Array, "1"],
    noise: Noise,
    prior: Prior,
    shift: Float[jax.Array, "nuisance 1"] | None,
) -> tuple[Sums, OnLattice]:
    """Add one image to a region's mean, and infer at every value of the discrepancy: all leaves begin with those."""
    sums = likelihood.update(sums, columns, signal)
    found = jax.vmap(lambda tau: grid_posterior.on_lattice(sums, Noise(noise.sigma, noise.dof, tau), prior, shift))(noise.discrepancy)
    return sums, OnLattice(found.log_posterior[:, 0], found.residual[..., 0], found.amplitude[..., 0], found.energy[:, 0], found.power)


def _weighed(info: Info, evidence: Float[np.ndarray, " posterior"]) -> Info:
    """Of every region what is said at each value of the discrepancy, averaged by the values' evidence; the intervals are the mixture's own.

    Mixed on the lattice and then described, the values' posteriors are no Student-t any more, and what is narrower than the lattice is lost.
    """
    by_region = evidence.reshape(-1, len(EXTRA))
    weights = np.exp(by_region - by_region.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)

    def of_values(leaf: np.ndarray) -> np.ndarray:
        return leaf.reshape(-1, len(EXTRA), *leaf.shape[1:])

    averaged = jax.tree.map(lambda leaf: np.einsum("rl,rl...->r...", weights, of_values(leaf)), info)
    ends = of_values(info.summary.lower), of_values(info.summary.upper)
    lower, upper = (_quantile(*ends, weights, share) for share in (0.025, 0.975))
    return eqx.tree_at(lambda each: (each.summary.lower, each.summary.upper), averaged, (lower, upper))


def _quantile(
    lower: Float[np.ndarray, "region value 2"], upper: Float[np.ndarray, "region value 2"], weights: Float[np.ndarray, "region value"], share: float
) -> Float[np.ndarray, "region 2"]:
    """Of a mixture of normals whose 95 % intervals are given, by bisection between the outermost ends."""
    centre, sd = 0.5 * (lower + upper), np.maximum((upper - lower) / (2 * ndtri(0.975)), 1e-30)
    low, high = lower.min(axis=1), upper.max(axis=1)
    for _ in range(30):
        middle = 0.5 * (low + high)
        is_below = np.einsum("rl,rlp->rp", weights, ndtr((middle[:, None] - centre) / sd)) < share
        low, high = np.where(is_below, middle, low), np.where(is_below, high, middle)
    return 0.5 * (low + high)
