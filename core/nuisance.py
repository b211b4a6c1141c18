"""Nuisances: what the signals depend on besides the two parameters, and how a few simulated nodes stand for all of it.

Signals are simulated on a tensor grid of Chebyshev nodes over the scan's ranges of T1, T2, B0, B1, carry-over, .. and
interpolated by polynomials in between. A voxel's knowledge of its nuisances is a mixture of `Q` Gaussians: one, about the
measured value, where there is a map; equal slices of the range where there is none. Within each Gaussian the signal is
linearised, so that the integral over the nuisance is closed-form (see `likelihood`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

Values = Float[np.ndarray, "..."]


class Axis(NamedTuple):
    """One nuisance: its range, the nodes that interpolate it, and the slices that marginalise it when it is unmeasured."""

    name: str
    lower: float
    upper: float
    n_nodes: int = 3
    n_slices: int = 1
    logarithmic: bool = False
    """Interpolate in the logarithm (relaxation times)."""

    def coordinate(self, value: Values | float) -> Values:
        """-1 .. 1 over the range; values outside are clipped to it."""
        value = np.clip(value, self.lower, self.upper)
        low, high = self.lower, self.upper
        if self.logarithmic:
            value, low, high = np.log(value), np.log(low), np.log(high)
        return np.asarray((2 * value - low - high) / (high - low))

    def value(self, coordinate: Values) -> Values:
        """Inverse of `coordinate`."""
        low, high = (np.log(self.lower), np.log(self.upper)) if self.logarithmic else (self.lower, self.upper)
        mixed = 0.5 * (low + high) + 0.5 * (high - low) * coordinate
        return np.exp(mixed) if self.logarithmic else mixed

    def nodes(self) -> Float[np.ndarray, " node"]:
        """Chebyshev nodes in -1 .. 1 (roots of T_n; the centre alone when n_nodes is 1)."""
        n = self.n_nodes
        return -np.cos((2 * np.arange(n) + 1) * np.pi / (2 * n))

    def slices(self) -> tuple[Float[np.ndarray, " slice"], float]:
        """Centres, in values, and the standard deviation of the `n_slices` equal Gaussians that stand for the uniform range."""
        width = (self.upper - self.lower) / self.n_slices
        return self.lower + width * (np.arange(self.n_slices) + 0.5), width / np.sqrt(12)


class Knowledge(NamedTuple):
    """What is known of one nuisance in every voxel: a mixture of Gaussians with equal weights."""

    centres: Float[np.ndarray, "voxel slice"]
    """Broadcastable over voxels: (1, slices) where all voxels share it."""
    sd: Float[np.ndarray, "voxel slice"]


def unmeasured(axis: Axis) -> Knowledge:
    """Uniform over the range of the axis."""
    centres, sd = axis.slices()
    return Knowledge(centres[None, :], np.full((1, len(centres)), sd))


def measured(axis: Axis, values: Float[np.ndarray, " voxel"], sd: Float[np.ndarray, " voxel"]) -> Knowledge:
    """A Gaussian about each voxel's measured value, which is clipped to the range."""
    return Knowledge(np.clip(values, axis.lower, axis.upper)[:, None], np.maximum(sd, 0.0)[:, None])


def tensor_nodes(axes: Sequence[Axis]) -> Float[np.ndarray, "node axis"]:
    """Values of every axis at every node of the tensor grid; one row of no columns when there are no axes."""
    grids = [axis.value(axis.nodes()) for axis in axes]
    return np.array(list(product(*grids)), dtype=float)


def columns(axes: Sequence[Axis], knowledge: Sequence[Knowledge]) -> Float[np.ndarray, "voxel mixture column node"]:
    """The linear maps from signals at the nodes to the mean signal and its derivatives, for every voxel and mixture component.

    Column 0 interpolates the signal at the component's centre; column 1 + j is its derivative by nuisance j times that nuisance's
    standard deviation there. Voxels that share their knowledge share one row (leading size 1).
    """
    n_voxels = max((len(known.centres) for known in knowledge), default=1)
    blocks = []
    for choice in product(*(range(known.centres.shape[1]) for known in knowledge)):
        per_axis = [_axis_weights(axis, known, index, n_voxels) for axis, known, index in zip(axes, knowledge, choice, strict=True)]
        rows = [_outer([value for value, _ in per_axis], n_voxels)]
        for j in range(len(axes)):
            rows.append(_outer([slope if i == j else value for i, (value, slope) in enumerate(per_axis)], n_voxels))
        blocks.append(np.stack(rows, axis=1))
    return np.stack(blocks, axis=1)


def with_offset(
    columns: Float[np.ndarray, "voxel mixture column node"], centre: float, sd: float
) -> Float[np.ndarray, "voxel mixture column_ node_"]:
    """Append the node that always reads 1: the mean signal gains `centre`, and an unknown offset (sd > 0) is one more column."""
    padded = np.concatenate([columns, np.zeros_like(columns[..., :1])], axis=-1)
    padded[:, :, 0, -1] = centre
    if sd == 0:
        return padded
    row = np.zeros_like(padded[:, :, :1])
    row[..., -1] = sd
    return np.concatenate([padded, row], axis=2)


def _axis_weights(axis: Axis, known: Knowledge, index: int, n_voxels: int) -> tuple[np.ndarray, np.ndarray]:
    centre, sd = (np.broadcast_to(item[:, index], n_voxels) for item in known)
    centre = np.clip(centre, axis.lower, axis.upper)
    values, slopes = _lagrange(axis.nodes(), axis.coordinate(centre))
    span = np.log(axis.upper / axis.lower) * centre if axis.logarithmic else np.full(n_voxels, axis.upper - axis.lower)
    return values, slopes * (2 * sd / span)[:, None]


def _lagrange(nodes: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lagrange basis polynomials of `nodes` and their derivatives at x, each (len(x), len(nodes))."""
    vander = np.polynomial.chebyshev.chebvander(nodes, len(nodes) - 1)
    coefficients = np.linalg.inv(vander)  # column j: Chebyshev coefficients of basis polynomial j
    values = np.polynomial.chebyshev.chebval(x, coefficients).T
    slopes = np.polynomial.chebyshev.chebval(x, np.polynomial.chebyshev.chebder(coefficients)).T if len(nodes) > 1 else 0 * values
    return values.reshape(len(x), -1), slopes.reshape(len(x), -1)


def _outer(factors: Sequence[np.ndarray], n_voxels: int) -> np.ndarray:
    """Row-wise tensor product of (voxel, node_i) factors: (voxel, product of nodes)."""
    result = np.ones((n_voxels, 1))
    for factor in factors:
        result = (result[:, :, None] * factor[:, None, :]).reshape(n_voxels, -1)
    return result
