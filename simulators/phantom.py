"""A digital phantom of three vials: the truth is known, and any pulse can be played on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from scansteer.core import signal
from scansteer.protocols import tissue_model
from scansteer.protocols.scan import SaturationBlock, Scan
from scansteer.realtime.images import Geometry

jax.config.update("jax_enable_x64", True)  # the physics needs it; core leaves the choice to its user

DEFAULT_MATRIX = (64, 64, 1)
_FIELD_OF_VIEW_MM = (32.0, 32.0, 5.0)

_block_map = eqx.filter_jit(signal.saturation_map)
_reading = eqx.filter_jit(signal.readout_map)

# Centres and radius of the vials as shares of the picture's sides.
_CENTRES = ((0.28, 0.33), (0.72, 0.38), (0.46, 0.72))
_RADIUS = 0.14

# Where each vial lies within the range of a quantity (0: lower, 1: upper).
_SHARES = {"f": (0.30, 0.45, 0.60), "k": (0.55, 0.20, 0.35), "other": (0.30, 0.50, 0.70)}


@dataclass(frozen=True)
class Phantom:
    """What lies in the scanner, per voxel and per vial."""

    geometry: Geometry
    labels: np.ndarray
    """0 outside, 1, 2, .. in the vials, shape (z, y, x)."""
    values: Mapping[str, np.ndarray]
    """Parameters and auxiliaries by the scan's names and in its units, one value per vial."""
    amplitude: np.ndarray
    """M0 x coil sensitivity [pixel units], zero outside the vials, shape (z, y, x)."""
    sigma: float
    """Standard deviation of the noise in one channel [pixel units]."""
    noise: Literal["rician", "gaussian"] = "rician"

    def truth(self, name: str) -> np.ndarray:
        """True map of a quantity, shape (z, y, x), NaN outside the vials."""
        return np.concatenate([[np.nan], self.values[name]])[self.labels]


def three_vials(
    scan: Scan,
    *,
    snr: float = 150.0,
    m0: float = 5000.0,
    noise: Literal["rician", "gaussian"] = "rician",
    values: Mapping[str, tuple[float, float, float]] | None = None,
) -> Phantom:
    """Three vials whose parameters spread over the scan's boxes, seen by a coil that is more sensitive on one side.

    Parameters
    ----------
    snr
        M0 at the centre of the picture over the noise's standard deviation.
    noise
        `rician`: magnitude of a complex signal; `gaussian`: added to the magnitude.
    values
        Truth per vial for some quantities, instead of the built-in shares of their ranges.
    """
    matrix = scan.matrix or DEFAULT_MATRIX
    geometry = Geometry(matrix, _FIELD_OF_VIEW_MM, (0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    labels = _labels(matrix)
    _, y, x = np.meshgrid(*(np.linspace(-1, 1, size) if size > 1 else np.zeros(1) for size in geometry.shape), indexing="ij")
    coil = np.exp(-0.15 * ((x - 0.8) ** 2 + (y + 0.4) ** 2)) / np.exp(-0.15 * (0.8**2 + 0.4**2))
    return Phantom(
        geometry=geometry,
        labels=labels,
        values=_values(scan) | {name: np.asarray(value, float) for name, value in (values or {}).items()},
        amplitude=m0 * coil * (labels > 0),
        sigma=m0 / snr,
        noise=noise,
    )


class Magnet:
    """A phantom while it is being scanned: carries the magnetisation of every vial from one repetition to the next.

    It plays whatever pulse it is given; one compilation serves them all.
    """

    def __init__(self, phantom: Phantom, scan: Scan, *, seed: int = 0) -> None:
        self.phantom = phantom
        self._scan = scan
        self._seed = seed
        self._train = tissue_model.train(scan)
        self._tissue = tissue_model.tissue(scan, {name: jnp.asarray(value) for name, value in phantom.values.items()}, voxels=True)
        self._reading = _reading(self._tissue, tissue_model.readout(scan))
        self._offset = tissue_model.centre(scan.readout.offset)
        self._mz = signal.equilibrium(self._tissue) * tissue_model.centre(scan.first_state.mz)
        self._map_of(scan.schedule[0])  # compiles
        self._n_played = 0
        for _ in range(scan.first_state.n_dummies):
            self._read(scan.schedule[0])

    def play(self, block: SaturationBlock) -> np.ndarray:
        """Play one repetition; its magnitude image in pixel units, float64, shape (z, y, x)."""
        mz = self._read(block)
        rng = np.random.default_rng((self._seed, self._n_played))
        phantom = self.phantom
        clean = phantom.amplitude * np.concatenate([[0.0], mz + self._offset])[phantom.labels]
        real = clean + rng.normal(0.0, phantom.sigma, clean.shape)
        if phantom.noise == "gaussian":
            return real
        return np.hypot(real, rng.normal(0.0, phantom.sigma, clean.shape))

    def _read(self, block: SaturationBlock) -> np.ndarray:
        """What each vial's water gives per unit amplitude; the first block of all has no recovery before it."""
        if self._n_played == 0:
            block = block.model_copy(update={"t_rec_s": 0.0})
        self._mz = self._map_of(block)(self._mz)
        read = np.asarray(self._reading.signal(self._mz))
        self._mz = self._reading.leave(self._mz)
        self._n_played += 1
        return read

    def _map_of(self, block: SaturationBlock) -> signal.LongitudinalMap:
        return _block_map(self._tissue, tissue_model.saturation(self._scan, block), self._train)


def _labels(matrix: tuple[int, int, int]) -> np.ndarray:
    x, y, z = matrix
    rows, columns = np.mgrid[:y, :x]
    labels = np.zeros((y, x), int)
    for number, (centre_x, centre_y) in enumerate(_CENTRES, start=1):
        distance = np.hypot((columns + 0.5) / x - centre_x, (rows + 0.5) / y - centre_y)
        labels[distance < _RADIUS] = number
    return np.repeat(labels[None], z, axis=0)


def _values(scan: Scan) -> dict[str, np.ndarray]:
    """Truth of every parameter and auxiliary of a scan, one value per vial."""
    fraction, rate = scan.parameter_names
    spans = {**scan.parameters, **scan.auxiliaries}
    shares = {fraction: _SHARES["f"], rate: _SHARES["k"]}
    placed = {name: np.array(shares.get(name, _SHARES["other"])) for name in spans}
    return {name: span.lower + placed[name] * (span.upper - span.lower) for name, span in spans.items()}
