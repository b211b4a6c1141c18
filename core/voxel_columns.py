"""The likelihood's columns of every voxel at its own auxiliary values, as coefficients of a signal basis.

The rows of what is not mapped are those of `core.nuisance`, shared by all voxels. Along what is mapped, signals are interpolated at the
voxel's own value (the polynomial through the simulated nodes), and their slope times the map's error is that nuisance's column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from scansteer.core import nuisance
from scansteer.core.nuisance import Axis


class Columns(NamedTuple):
    """How signals at the nuisance nodes become columns; made once per scan."""

    axes: tuple[Axis, ...]
    mapped: tuple[str, ...]
    shared: Float[np.ndarray, "row node"]
    """Unmapped axes: the mean row, then one row for each axis."""
    row: tuple[int, ...]
    """Of each column, its shared row."""
    kind: tuple[int, ...]
    """Of each column, 0 where mapped signals are interpolated, i where the slope along the i-th mapped axis is taken."""
    offset: tuple[float, float]
    """Centre and standard deviation of the additive offset [fraction of M0]; it has a column where the latter is positive."""

    @property
    def n_columns(self) -> int:
        return len(self.row) + (self.offset[1] > 0)

    @property
    def kinds(self) -> tuple[int, ...]:
        """Of every column, that of the offset included."""
        return self.kind + ((0,) if self.offset[1] > 0 else ())

    @property
    def n_mapped_nodes(self) -> int:
        return int(np.prod([axis.n_nodes for axis in self.axes if axis.name in self.mapped], dtype=int))


def make(axes: Sequence[Axis], mapped: Sequence[str], offset: tuple[float, float]) -> Columns:
    """Prepare for a scan's nuisance axes; `mapped` names those that come as maps."""
    whole = tuple(axis._replace(n_slices=1) for axis in axes)
    known = tuple(axis.name for axis in whole if axis.name in mapped)
    unmapped = [axis for axis in whole if axis.name not in known]
    shared = nuisance.columns(unmapped, {})[0]
    row, kind, following = [0], [0], 1
    for axis in whole:
        if axis.name in known:
            row.append(0)
            kind.append(1 + known.index(axis.name))
            continue
        row.append(following)
        kind.append(0)
        following += 1
    return Columns(whole, known, shared, tuple(row), tuple(kind), offset)


def at_mapped_nodes(columns: Columns, signals: Float[np.ndarray, "node x"]) -> Float[np.ndarray, "column mapped_node x"]:
    """One image's columns at the nodes of what is mapped, from its signals at all nodes (tensor order of the axes; the last reads 1)."""
    grid = np.asarray(signals[:-1]).reshape(*(axis.n_nodes for axis in columns.axes), -1)
    places = [i for i, axis in enumerate(columns.axes) if axis.name not in columns.mapped]
    moved = np.moveaxis(grid, places, range(len(places))).reshape(columns.shared.shape[1], -1)
    rows = (columns.shared @ moved).reshape(len(columns.shared), columns.n_mapped_nodes, -1)
    result = rows[list(columns.row)]
    centre, sd = columns.offset
    result[0] += centre
    return np.concatenate([result, np.full_like(result[:1], sd)]) if sd > 0 else result


def of_voxels(
    columns: Columns,
    values: Mapping[str, Float[np.ndarray, " voxel"]],
    errors: Mapping[str, Float[np.ndarray, " voxel"]],
    held: bool = True,
) -> Float[np.ndarray, "kind voxel mapped_node"]:
    """Every voxel's weights of the mapped nodes: for its value, then for the slope along each mapped axis times the map's error.

    Values outside an axis's range are held at its ends (or, for simulated tissue a little beyond it, extrapolated). Without maps all
    voxels share one row (leading voxel axis of 1).
    """
    n_voxels = len(next(iter(values.values()))) if columns.mapped else 1
    mapped = [axis for axis in columns.axes if axis.name in columns.mapped]
    rows = [_interpolation(axis, np.asarray(values[axis.name]), np.asarray(errors[axis.name]), held) for axis in mapped]
    result = [_tensor([value for value, _ in rows], n_voxels)]
    for j in range(len(mapped)):
        result.append(_tensor([slope if i == j else value for i, (value, slope) in enumerate(rows)], n_voxels))
    return np.stack(result)


def _interpolation(axis: Axis, value: np.ndarray, error: np.ndarray, held: bool) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the axis's nodes for the value, and for the slope times the error: (voxel, node) each."""
    cheb = np.polynomial.chebyshev
    if held:
        value = np.clip(value, axis.lower, axis.upper)
    at = axis.coordinate(axis.node_values())
    to_coefficients = np.linalg.inv(cheb.chebvander(at, axis.n_nodes - 1))
    x = axis.coordinate(value)
    span = np.log(axis.upper / axis.lower) * value if axis.logarithmic else np.full_like(value, axis.upper - axis.lower)
    slope = cheb.chebval(x, cheb.chebder(to_coefficients)).T if axis.n_nodes > 1 else np.zeros((len(x), 1))
    return cheb.chebval(x, to_coefficients).T, slope * (2 * error / span)[:, None]


def _tensor(factors: Sequence[np.ndarray], n_voxels: int) -> np.ndarray:
    """Voxel by voxel, the tensor product of (voxel, node) factors, flat."""
    result = np.ones((n_voxels, 1))
    for factor in factors:
        result = (result[:, :, None] * factor[:, None, :]).reshape(n_voxels, -1)
    return result
