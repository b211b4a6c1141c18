"""The posterior of a whole volume: the encoder for every voxel, the reference auditing a random sample of them at every image.

Same interface as `realtime.reference.Reference`. The audited voxels are drawn once, from every region, seeded by the scan's name, for the
reference's sums must have seen every image; the draws that compare are seeded by the scan's name and the number of images. Where the two
disagree beyond `MEDIAN_BOUND` or `OVER_4_BOUND` the reference takes over for the whole region; if the region is too large for it, this is said
and stops are vetoed.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from scansteer.core import agreement, design, nuisance, voxel_columns
from scansteer.core.code_generation import for_large_programs
from scansteer.core.encoder import Gaussian
from scansteer.core.errors import InputError
from scansteer.core.grid_posterior import Info, Prior
from scansteer.core.noise import NoiseEstimate
from scansteer.protocols import forward
from scansteer.protocols.scan import SaturationBlock, Scan, bounds
from scansteer.realtime.encoder_file import Trained, check, load, shipped
from scansteer.realtime.messages import Audit
from scansteer.realtime.reference import Reference
from scansteer.realtime.volume import BATCH, SMALL_BATCH, Volume

VOLUME = 20_000
"""Voxels of a matrix from which on few large calls are faster than many small ones that share the cores evenly."""
N_AUDITED = 128
"""Voxels, enough for `design` to ask about and for the two bounds below: 5 % of 128 is more than six voxels' worth of draws."""
N_DRAWS = 100
MEDIAN_BOUND = 2.0
"""Largest acceptable median Mahalanobis distance, either way (1.18 is a perfect match)."""
OVER_4_BOUND = 0.05
"""Largest acceptable share of distances over 4, either way."""
FIRST_AUDITED = 3
"""Number of images from which disagreement counts: before, a posterior is little more than the prior."""
MOST_VOXELS_OF_REFERENCE = 2048
"""Regions up to this size can be handed to the reference within seconds."""


class Encoded:
    """The posterior of every voxel of a region, one image at a time; see the module."""

    def __init__(self, scan: Scan, mapped: Sequence[str], trained: Trained) -> None:
        """Compile and simulate the schedule: seconds.

        Raises
        ------
        InputError
            The weights belong to another scan, or were trained with other maps.
        """
        self.scan = scan
        axes = (*forward.chain_axes(scan), *forward.tissue_axes(scan))
        self._mapped = tuple(axis.name for axis in axes if axis.name in mapped)
        check(trained, scan, self._mapped)  # before anything is compiled
        columns = voxel_columns.make(axes, self._mapped, nuisance.of_range(*bounds(scan.readout.offset)))
        self._coordinate = trained.encoder.coordinate
        self._compare = jax.jit(self._distances, compiler_options=for_large_programs())
        with ThreadPoolExecutor(1) as side_by_side:  # both compile for long
            batch = SMALL_BATCH if math.prod(scan.matrix or (0,)) < VOLUME else BATCH
            volume = side_by_side.submit(Volume, trained.encoder, columns, scan.noise.discrepancy, batch=batch)
            self._reference = Reference(scan, mapped)
            self._rehearse_comparison()
            self._volume = volume.result()
        self._seed = zlib.crc32(scan.name.encode())
        self._history: list[tuple[np.ndarray, np.ndarray, NoiseEstimate]] | None = None
        self._region: tuple[dict[str, np.ndarray], np.ndarray] | None = None
        self._audited = np.zeros(0, int)
        self._n_images = 0
        self.source: Literal["reference", "encoder"] = "encoder"
        self._sampled: Info | None = None
        self._posterior: Gaussian | None = None
        self.audit: Audit | None = None
        self.said: str | None = None
        """What happened at the latest image that a person should know."""
        self.veto: str | None = None
        """Why a stop is out of the question; none: nothing speaks against it."""

    @property
    def prior(self) -> Prior:
        return self._reference.prior

    def begin(
        self, maps: dict[str, Float[np.ndarray, " voxel"]], brightness: Float[np.ndarray, " voxel"], regions: Sequence[np.ndarray]
    ) -> None:
        """Fix the voxels; see `Reference.begin`."""
        n_voxels = len(brightness)
        used = {name: np.asarray(maps[name], float) for name in self._mapped}
        errors = {name: map_error(self.scan, name, values) for name, values in used.items()}
        self._volume.begin(voxel_columns.rows_of_voxels(self._volume.columns, used, errors), n_voxels)
        self._audited = sampled(regions, np.random.default_rng(self._seed))
        self._reference.begin({name: values[self._audited] for name, values in used.items()}, brightness[self._audited])
        self._region = used, brightness
        self._history = [] if n_voxels <= MOST_VOXELS_OF_REFERENCE else None
        self._n_images, self.source, self.audit, self.said, self.veto = 0, "encoder", None, None, None

    def absorb(self, expected: Float[jax.Array, "node point"], signal: Float[np.ndarray, " voxel"], noise: NoiseEstimate) -> Info:
        """Add one image whose expected signals `play` has given, infer, audit; NumPy leaves over all voxels."""
        self._n_images += 1
        self.said = None
        if self.source == "reference":
            self.audit = None
            return self._reference.absorb(expected, signal, noise)
        answer = self._volume.absorb(np.asarray(expected), signal, noise)
        self._posterior = answer.posterior
        if self._history is not None:
            self._history.append((np.asarray(expected), signal, noise))
        self._sampled = self._reference.absorb(expected, signal[self._audited], noise)
        self.audit = self._judge(answer.posterior, noise)
        apart = self._n_images >= FIRST_AUDITED and _disagree(self.audit)
        self.veto = None
        return self._hand_over(answer.info) if apart else answer.info

    def draw(self) -> Float[np.ndarray, "voxel 2"] | None:
        """One random (f, k) per voxel, seeded by scan and image number; none where the reference answers."""
        if self.source == "reference" or self._posterior is None:
            return None
        return self._volume.draw(self._key(), self._posterior)

    def reserve(self, n_voxels: int) -> None:
        """See `Reference.reserve`."""
        self._reference.reserve(min(n_voxels, N_AUDITED))

    def play(self, block: SaturationBlock, *, first: bool) -> jnp.ndarray:
        """See `Reference.play`."""
        return self._reference.play(block, first=first)

    @property
    def exact(self) -> Reference:
        """The reference that audits; its running sums are those of the audited voxels."""
        return self._reference

    def among_all(self, voxels: Int[np.ndarray, " voxel"]) -> Int[np.ndarray, " voxel"]:
        """Indices among the region's voxels of those that `for_advice` speaks of."""
        return voxels if self.source == "reference" or self._sampled is None else self._audited[voxels]

    def for_advice(self, info: Info, regions: Sequence[np.ndarray]) -> tuple[Reference, Info, Sequence[np.ndarray]]:
        """The audited voxels and their exact posteriors; a region without any, there being more regions than audited voxels, is left out."""
        if self.source == "reference" or self._sampled is None:
            return self._reference, info, regions
        inside = [np.flatnonzero(np.isin(self._audited, region)) for region in regions]
        return self._reference, self._sampled, [each for each in inside if len(each)] or [np.arange(len(self._audited))]

    def close(self) -> None:
        self._volume.close()
        self._reference.close()

    def _judge(self, posterior: Gaussian, noise: NoiseEstimate) -> Audit:
        """Encoder against reference on the audited voxels; always the same number, the last one repeated."""
        n = len(self._audited)
        rows = np.minimum(np.arange(N_AUDITED), n - 1)
        ours = jax.tree.map(lambda leaf: leaf[self._audited[rows]], posterior)
        power = np.float64(noise.dof + self._n_images - 1)
        m1, m2 = (np.asarray(each)[:n] for each in self._compare(self._key(), ours, self._reference.log_posterior(rows), power))
        over = max(float(np.mean(m1 > agreement.TOO_FAR)), float(np.mean(m2 > agreement.TOO_FAR)))
        return Audit(n_voxels=n, m1_median=_bounded(np.median(m1)), m2_median=_bounded(np.median(m2)), fraction_over_4=over)

    def _key(self) -> jax.Array:
        return jax.random.fold_in(jax.random.PRNGKey(self._seed), self._n_images)

    def _distances(self, key, ours: Gaussian, log_posterior, power):
        lattice = agreement.follow(log_posterior, self.prior, self._coordinate, power)
        distances = agreement.compare(key, ours, lattice, N_DRAWS)
        return distances.m1, distances.m2

    def _hand_over(self, info: Info) -> Info:
        """The reference takes over, with all images so far; if the region is too large for it, stops are vetoed."""
        assert self.audit is not None and self._region is not None
        found = (
            f"Encoder and reference disagree: Mahalanobis medians {self.audit.m1_median:.2f} and {self.audit.m2_median:.2f}, "
            f"{self.audit.fraction_over_4:.1%} over 4"
        )
        if self._history is None:
            self.said = self.veto = f"{found}; the region is too large for the reference, so no stop is called."
            return info
        self._reference.begin(*self._region)
        for expected, signal, noise in self._history:
            info = self._reference.absorb(jnp.asarray(expected), signal, noise)
        self.source, self._history = "reference", None
        self.said = f"{found}; the reference decides from now on."
        return info

    def _rehearse_comparison(self) -> None:
        n_cells = self.prior.box.n_cells
        ours = Gaussian(np.zeros((N_AUDITED, 2), np.float32), np.tile(np.array([1, 0, 1], np.float32), (N_AUDITED, 1)))  # pyright: ignore[reportArgumentType]
        jax.block_until_ready(self._compare(jax.random.PRNGKey(0), ours, np.zeros((N_AUDITED, n_cells), np.float32), np.float64(10.0)))


def sampled(regions: Sequence[Int[np.ndarray, " voxel"]], rng: np.random.Generator) -> Int[np.ndarray, " voxel"]:
    """Which voxels are audited: drawn at random within each region, so that also a small one has some. Ascending."""
    shares = design.share_out([len(region) for region in regions], N_AUDITED)
    return np.unique(np.concatenate([rng.permutation(region)[:share] for region, share in zip(regions, shares, strict=True)]))


def map_error(scan: Scan, name: str, values: np.ndarray) -> np.ndarray:
    """Standard deviation of a map, as the scan states it."""
    described = scan.auxiliaries[name]  # type: ignore[index]
    return np.hypot(described.map_error, described.map_error_relative * values)


def _disagree(audit: Audit) -> bool:
    return max(audit.m1_median, audit.m2_median) > MEDIAN_BOUND or audit.fraction_over_4 > OVER_4_BOUND


def _bounded(value: float | np.floating) -> float:
    """A distance that is not finite is as good as infinite: JSON knows neither."""
    return float(value) if np.isfinite(value) else 1e6


def engine_maker(encoder: str | None) -> Callable[[Scan, list[str]], Reference | Encoded]:
    """What computes a session's posteriors, by the command line's `--encoder`.

    `none`: the reference. A file: that encoder, refused if it belongs to another scan or other maps. Nothing: the encoder that is shipped with
    the scan; the reference if there is none, or if it does not fit, which is said.

    Raises
    ------
    InputError
        The file is not an encoder.
    """
    given = None if encoder in (None, "none") else load(Path(encoder))

    def make(scan: Scan, mapped: list[str]) -> Reference | Encoded:
        if given is not None:
            return Encoded(scan, mapped, given)
        trained = shipped(scan) if encoder is None else None
        if trained is None:
            return Reference(scan, mapped)
        try:
            return Encoded(scan, mapped, trained)
        except InputError as error:
            reference = Reference(scan, mapped)
            reference.said = f"{error} The reference decides."
            return reference

    return make
