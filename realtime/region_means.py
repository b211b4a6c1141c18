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

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from scansteer.core import grid_posterior
from scansteer.core.code_generation import for_blocks_of_voxels
from scansteer.core.grid_posterior import Info, OnLattice
from scansteer.core.likelihood import Noise, Sums
from scansteer.core.noise import NoiseEstimate
from scansteer.realtime.reference import BLOCK, Linearised, Reference

EXTRA = 0.001, 0.002, 0.004, 0.008
"""Standard deviations of the model's error beyond the scan's discrepancy [fraction of M0]. The two-pool model leaves 0.2 to 0.3 % of the
vials of the published phantom. With 0 among them, as for a model without error, 87 instead of 89 % of the intervals of f held the truth
after 30 images of the widest scan: next to so little noise nuisances to first order are an error too (`benchmarks/promises.py means`)."""


class _Region(NamedTuple):
    voxels: np.ndarray
    n_independent: float
    linearised: Linearised


class RegionMeans:
    """The posterior of every region's mean signal, one image at a time."""

    def __init__(self, reference: Reference) -> None:
        """Compile: seconds.

        Parameters
        ----------
        reference
            Whose dictionary, prior and discrepancy are used; it plays the pulses.
        """
        self._reference = reference
        self._discrepancy = jnp.hypot(reference.scan.noise.discrepancy, jnp.asarray(EXTRA))
        self._step = jax.jit(grid_posterior.step, donate_argnums=0, compiler_options=for_blocks_of_voxels())
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
        self._sums = [self._reference.empty(1) for _ in regions]

    def absorb(self, expected: Float[jax.Array, "node point"], signal: Float[np.ndarray, " voxel"], noise: NoiseEstimate) -> Info:
        """Add one image whose expected signals are known, and infer; NumPy leaves over all regions."""

        def one(number: int) -> OnLattice:
            region = self._regions[number]
            mean = jnp.asarray(signal[region.voxels].mean(keepdims=True), jnp.float64)
            here = Noise(jnp.asarray(noise.sigma / np.sqrt(region.n_independent)), jnp.asarray(noise.dof), self._discrepancy)
            columns = self._reference.columns(region.linearised.weights, expected)
            self._sums[number], posterior = self._step(self._sums[number], columns, mean, here, self._reference.prior, region.linearised.shift)
            return jax.tree.map(np.asarray, posterior)

        found = list(self._pool.map(one, range(len(self._regions))))
        infos = [self._reference.describe(_block(found[first : first + BLOCK])) for first in range(0, len(found), BLOCK)]
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(found)], *infos)

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


def _block(regions: Sequence[OnLattice]) -> OnLattice:
    """As many as the reference describes at a time: the last one repeated."""
    padded = [*regions, *[regions[-1]] * (BLOCK - len(regions))]
    return OnLattice(
        log_posterior=np.concatenate([each.log_posterior for each in padded]),
        residual=np.concatenate([each.residual for each in padded], axis=1),
        amplitude=np.concatenate([each.amplitude for each in padded], axis=1),
        energy=np.concatenate([each.energy for each in padded]),
        power=padded[0].power,
    )
