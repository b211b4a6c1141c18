"""The likelihood's columns of every voxel at its own auxiliary values, as coefficients of a signal basis.

The rows of what is not mapped are those of `core.nuisance`, shared by all voxels. Along what is mapped, signals are interpolated at the
voxel's own value (the polynomial through the simulated nodes), and their slope times the map's error is that nuisance's column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

from scansteer.core import nuisance
from scansteer.core.nuisance import Axis

Rows = tuple[Float[Array, "2 voxel node"], ...]
"""Of each mapped axis, the weights of its nodes for the value and for the slope; NumPy or JAX."""


class Columns(NamedTuple):
    """How signals at the nuisance nodes become columns; made once per scan."""

    axes: tuple[Axis, ...]
    mapped: tuple[str, ...]
    shared: Float[np.ndarray, "row node"]
    """Unmapped axes: the mean row, then one row for each coefficient."""
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
        row.extend(range(following, following + axis.n_coefficients))
        kind.extend([0] * axis.n_coefficients)
        following += axis.n_coefficients
    row.extend(range(following, len(shared)))  # products
    kind.extend([0] * (len(shared) - following))
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


def rows_of_voxels(
    columns: Columns,
    values: Mapping[str, Float[np.ndarray, " voxel"]],
    errors: Mapping[str, Float[np.ndarray, " voxel"]],
    held: bool = True,
) -> tuple[Float[np.ndarray, "2 voxel node"], ...]:
    """Along each mapped axis, every voxel's weights of the nodes for its value, and for the slope there times the map's error.

    Values outside an axis's range are held at its ends (or, for simulated tissue a little beyond it, extrapolated). Without maps there are none.
    """
    mapped = [axis for axis in columns.axes if axis.name in columns.mapped]
    return tuple(np.stack(_interpolation(axis, np.asarray(values[axis.name]), np.asarray(errors[axis.name]), held)) for axis in mapped)


def weights(rows: Rows, kind: int) -> Float[Array, "voxel mapped_node"]:
    """Every voxel's weights of the mapped nodes, for its value (kind 0) or for the slope along the mapped axis of that kind.

    Made for a block of voxels when they are needed: six mapped axes have a thousand nodes. Without maps all voxels share one row.
    """
    result = np.ones((1, 1), np.float32) if not rows else rows[0][int(kind == 1)]
    for number, row in enumerate(rows[1:], 2):
        result = (result[:, :, None] * row[int(kind == number)][:, None, :]).reshape(len(result), -1)
    return result  # pyright: ignore[reportReturnType] - NumPy in, NumPy out


def of_voxels(
    columns: Columns,
    values: Mapping[str, Float[np.ndarray, " voxel"]],
    errors: Mapping[str, Float[np.ndarray, " voxel"]],
    held: bool = True,
) -> Float[np.ndarray, "kind voxel mapped_node"]:
    """The weights of every kind, for a few voxels."""
    rows = rows_of_voxels(columns, values, errors, held)
    return np.stack([weights(rows, kind) for kind in range(1 + len(rows))])


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
