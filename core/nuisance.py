"""Nuisances: what the signals depend on besides the two parameters, and how a few simulated nodes stand for all of it.

Signals are simulated on a tensor grid of Chebyshev nodes over the scan's ranges of T1, T2, B0, B1, carry-over, .. and
interpolated by polynomials in between. In the likelihood a nuisance is a random coefficient of mean 0 and variance 1 times a column:

* measured: the signal's derivative at the centre of a block of voxels of like values, times the map's standard deviation (a voxel's
  own value then is a known mean of its coefficient);
* unmeasured: the derivative at the centre of the range, times the standard deviation of the range and `SPREAD`. A range may be cut into equal
  slices, which then form a mixture: the finer quadrature against which the plain one is checked.

This is first-order propagation: the coefficient is taken as Gaussian; most curvature and products of two nuisances are left out, and `SPREAD`
makes up for them. An unmeasured nuisance may have its curvature as well, where it has no slope (B0 at a pool's own offset) or spans more than an
octave (T1, T2): of the square of the deviation, the mean belongs to the mean signal, and the rest is one more coefficient, uncorrelated with the
first. So may the product of two: what a readout or the first state leaves recovers with T1, and how much of it is one more coefficient. (Over the
wide phantom's ranges, at steered pulses, these two products are 0.5 % of M0 rms, as much as the square of T1; no other is more than 0.06 %.)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache, reduce
from itertools import product
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

SPREAD = 1.15
"""Factor on the standard deviation of what is not measured. Of 1 536 voxels drawn from the wide phantom's priors the 95 % region holds 96.5, 95.3,
95.1 and 95.1 % at 3, 5, 8 and 12 images (`benchmarks/promises.py priors`; without it, and without products, 93.1, 91.7, 90.8 and 91.9 %)."""
END_OF_RANGE = 3**0.5 / SPREAD
"""Coefficient of what lies at an end of its range."""


class Axis(NamedTuple):
    """One nuisance: its range, the nodes that interpolate it, and how it is marginalised when it is unmeasured."""

    name: str
    lower: float
    upper: float
    n_nodes: int = 3
    n_slices: int = 1
    logarithmic: bool = False
    """Interpolate in the logarithm (relaxation times)."""
    curved: bool = False
    """While it is unmeasured its curvature counts too."""
    times: str = ""
    """Another, curved axis: while both are unmeasured, their product counts too."""

    @property
    def n_coefficients(self) -> int:
        """Random coefficients while it is unmeasured."""
        return 1 + self.curved

    @property
    def middle(self) -> float:
        return 0.5 * (self.lower + self.upper)

    def coordinate(self, value: Float[np.ndarray, " x"]) -> Float[np.ndarray, " x"]:
        """-1 .. 1 over the range."""
        low, high = self.lower, self.upper
        if self.logarithmic:
            value, low, high = np.log(value), np.log(low), np.log(high)
        return (2 * value - low - high) / (high - low)

    def node_values(self) -> Float[np.ndarray, " node"]:
        """The quantity at the nodes."""
        low, high = (np.log(self.lower), np.log(self.upper)) if self.logarithmic else (self.lower, self.upper)
        mixed = 0.5 * (low + high) + 0.5 * (high - low) * _chebyshev_nodes(self.n_nodes)
        return np.exp(mixed) if self.logarithmic else mixed


class Measured(NamedTuple):
    """What a map says of one nuisance in a block of voxels of like values: Gaussian about each voxel's value."""

    centre: float
    """Where the signal is linearised."""
    sd: float
    """Error of the map; also the unit of the voxels' shifts from the centre."""


def of_range(lower: float, upper: float) -> tuple[float, float]:
    """Centre, and standard deviation times `SPREAD`, of what is not measured and uniform over a range."""
    return 0.5 * (lower + upper), SPREAD * (upper - lower) / 12**0.5


def tensor_nodes(axes: Sequence[Axis]) -> Float[np.ndarray, "node axis"]:
    """Values of every axis at every node of the tensor grid; one row of no columns when there are no axes."""
    return np.array(list(product(*(axis.node_values() for axis in axes))), dtype=float)


def columns(axes: Sequence[Axis], maps: Mapping[str, Measured]) -> Float[np.ndarray, "mixture column node"]:
    """The linear maps from signals at the nodes to the likelihood's columns, for every mixture component.

    Column 0 is the mean signal, the others belong to one coefficient each, in the order of `coefficients`.
    """
    slices = [range(1 if axis.name in maps else axis.n_slices) for axis in axes]
    return np.stack([_component(axes, maps, choice) for choice in product(*slices)])


def coefficients(axes: Sequence[Axis], mapped: Iterable[str]) -> list[str]:
    """Names of the coefficients: of every axis, and after it that of its curvature where it has one; then those of the products."""
    measured = frozenset(mapped)
    own = [name for axis in axes for name in (axis.name, f"{axis.name} squared")[: 1 if axis.name in measured else axis.n_coefficients]]
    return own + [f"{axes[i].name} times {axes[j].name}" for i, j in products(axes, measured)]


def products(axes: Sequence[Axis], mapped: Collection[str]) -> list[tuple[int, int]]:
    """Pairs of axes whose product counts."""
    places = {axis.name: j for j, axis in enumerate(axes) if axis.curved and axis.name not in mapped}
    return [(i, places[axis.times]) for i, axis in enumerate(axes) if axis.times in places and axis.name not in mapped]


def told(axes: Sequence[Axis], mapped: Collection[str], values: Mapping[str, float]) -> dict[str, float]:
    """Of values by the coefficients' names, those of what is not measured and whose coefficient tells where in its range it lies, and whether beyond.

    B0 is one, for it has a slope at all but the pool's own offset, and so is the offset. Relaxation times over more than an octave are none: on
    those signals depend too unevenly.
    """
    readable = {axis.name for axis in axes if axis.name not in mapped and not (axis.logarithmic and axis.curved)} | {"offset"}
    return {name: value for name, value in values.items() if name in readable}


def with_offset(columns: Float[np.ndarray, "mixture column node"], centre: float, sd: float) -> Float[np.ndarray, "mixture column_ node_"]:
    """Append the node that always reads 1: the mean signal gains `centre`, and an unknown offset (sd > 0) is one more column."""
    padded = np.concatenate([columns, np.zeros_like(columns[..., :1])], axis=-1)
    padded[:, 0, -1] = centre
    if sd == 0:
        return padded
    row = np.zeros_like(padded[:, :1])
    row[..., -1] = sd
    return np.concatenate([padded, row], axis=1)


def _component(axes: Sequence[Axis], maps: Mapping[str, Measured], choice: Sequence[int]) -> Float[np.ndarray, "column node"]:
    """Columns of one mixture component: the mean, then the derivatives along each axis with the others at their centres."""
    known = [maps.get(axis.name) or _slice_of_range(axis, index) for axis, index in zip(axes, choice, strict=True)]
    rows = [_rows(axis, each, axis.curved and axis.name not in maps) for axis, each in zip(axes, known, strict=True)]
    values = [row[0] for row in rows]
    others = [_outer([*values[:j], other, *values[j + 1 :]]) for j, row in enumerate(rows) for other in row[1:]]
    both = [_outer([row[1] if j in pair else row[0] for j, row in enumerate(rows)]) for pair in products(axes, maps)]
    return np.stack([_outer(values), *others, *both])


def _slice_of_range(axis: Axis, index: int) -> Measured:
    width = (axis.upper - axis.lower) / axis.n_slices
    return Measured(*of_range(axis.lower + width * index, axis.lower + width * (index + 1)))


def _rows(axis: Axis, known: Measured, is_curved: bool) -> list[Float[np.ndarray, " node"]]:
    """Weights of the nodes for the mean, for the derivative times the standard deviation, and for the curvature where it counts.

    F(centre + sd u) = F + F' sd u + F'' sd^2 u^2 / 2; over a range u is uniform, and u^2 has mean 1 and standard deviation sqrt(4/5).
    """
    value = np.clip(known.centre, axis.lower, axis.upper)
    span = np.log(axis.upper / axis.lower) * value if axis.logarithmic else axis.upper - axis.lower
    basis, slope, bend = (each[0] for each in _lagrange(axis.n_nodes, axis.coordinate(np.array([value]))))
    slope = slope * 2 / span  # by the quantity itself, as the next line
    bend = bend * (2 / span) ** 2 - (slope / value if axis.logarithmic else 0.0)
    if not is_curved:
        return [basis, slope * known.sd]
    mean = 0.5 * bend * (known.sd / SPREAD) ** 2
    return [basis + mean, slope * known.sd, SPREAD * np.sqrt(0.8) * mean]


def _chebyshev_nodes(n: int) -> Float[np.ndarray, " node"]:
    """Roots of T_n; the centre alone when n is 1."""
    return -np.cos((2 * np.arange(n) + 1) * np.pi / (2 * n))


def _lagrange(n_nodes: int, x: Float[np.ndarray, " x"]) -> list[Float[np.ndarray, "x node"]]:
    """Lagrange basis polynomials of the Chebyshev nodes, and their first and second derivatives, at x in -1 .. 1."""
    return [np.polynomial.chebyshev.chebval(x, each).T.reshape(len(x), n_nodes) for each in _basis(n_nodes)]


@cache
def _basis(n_nodes: int) -> tuple[Float[np.ndarray, "power node"], ...]:
    """Chebyshev coefficients of these polynomials (column j: that of node j), and of their derivatives."""
    cheb = np.polynomial.chebyshev
    polynomials = np.linalg.inv(cheb.chebvander(_chebyshev_nodes(n_nodes), n_nodes - 1))
    return polynomials, *(cheb.chebder(polynomials, order) for order in (1, 2))


def _outer(factors: Sequence[Float[np.ndarray, " node_i"]]) -> Float[np.ndarray, " node"]:
    """Tensor product of the axes' weights, flat."""
    return reduce(lambda result, factor: np.outer(result, factor).reshape(-1), factors, np.ones(1))
