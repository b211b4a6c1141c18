"""Signals in a few functions of (f, k): what makes an encoder's state small.

Whatever the pulse, a scan's signal as a function of (f, k) lies close to a space of about ten functions, and its derivative by a nuisance
close to a few more. With F(f, k) = sum_m c_m phi_m(f, k), one image is its coefficients c, and the running sums of c c' and c S are the
sufficient statistics of any number of images at every (f, k) at once: nothing has to be interpolated between anchor points, where a
likelihood that is a small difference of large sums would be lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from scansteer.core import lattice

TOLERANCE = 5e-5
"""Root mean square of what a basis leaves of a signal, unless training says otherwise [fraction of M0]."""
N_TABLE = 128
"""Points per parameter of the table in which functions are looked up, to first order about the nearest point."""


class Basis(eqx.Module):
    """The functions phi, in blocks: those of the mean signal first, then those of each nuisance's column."""

    functions: Float[Array, "function node"]
    """Values at the simulated nodes of (f, k) (core.lattice), f-major; orthonormal within a block."""
    ranks: tuple[int, ...] = eqx.field(static=True)

    @property
    def blocks(self) -> tuple[slice, ...]:
        """Place of each column's functions."""
        edges = np.cumsum([0, *self.ranks])
        return tuple(slice(a, b) for a, b in pairwise(edges.tolist()))

    def at(
        self, places: tuple[Float[np.ndarray, " f"], Float[np.ndarray, " k"]], order: tuple[int, int] = (0, 0)
    ) -> Float[np.ndarray, "f k function"]:
        """Values, or derivatives of the given order, on the tensor grid of places (0 .. 1 along the lattice's axes); float64."""
        along = [_polynomial(place, degree) for place, degree in zip(places, order, strict=True)]
        nodes = np.asarray(self.functions, float).reshape(-1, lattice.N_NODES, lattice.N_NODES)
        return np.einsum("fa,mab,kb->fkm", along[0], nodes, along[1], optimize=True)


def make(columns: Sequence[Float[np.ndarray, "sample node"]], tolerance: float = TOLERANCE) -> Basis:
    """The smallest bases that leave less than `tolerance` (rms) of sampled columns.

    Parameters
    ----------
    columns
        For the mean signal and for every nuisance: samples over pulses and auxiliaries, at the simulated nodes.
    """
    functions = []
    for samples in columns:
        _, size, rows = np.linalg.svd(samples, full_matrices=False)
        functions.append(rows[: _rank(size, samples.size, tolerance)])
    return _of(functions)


def shortened(basis: Basis, columns: Sequence[Float[np.ndarray, "sample node"]], tolerance: float) -> Basis:
    """The first functions of each block: what is left out is less than `tolerance` (rms) of the columns, sampled as for `make`."""
    functions = []
    for samples, block in zip(columns, basis.blocks, strict=True):
        rows = np.asarray(basis.functions[block], float)
        functions.append(rows[: _rank(np.linalg.norm(samples @ rows.T, axis=0), samples.size, tolerance)])
    return _of(functions)


def coefficients(basis: Basis, columns: Float[np.ndarray, "column x node"]) -> Float[np.ndarray, "x function"]:
    """Of every column in its own block of functions."""
    functions = np.asarray(basis.functions, float)
    return np.concatenate([column @ functions[block].T for column, block in zip(columns, basis.blocks, strict=True)], axis=1)


def node_weights(place_f: Float[np.ndarray, " x"], place_k: Float[np.ndarray, " x"]) -> Float[np.ndarray, "x node"]:
    """From signals at the simulated nodes to the polynomial at arbitrary places 0 .. 1."""
    along_f, along_k = _polynomial(place_f, 0), _polynomial(place_k, 0)
    return (along_f[:, :, None] * along_k[:, None, :]).reshape(len(place_f), -1)


class Table(eqx.Module):
    """Values and first derivatives of the functions on a fine grid; float32."""

    value: Float[Array, "place padded"]
    """Padded by zeros to a multiple of `PADDED` functions: a row then starts where a CPU likes to read."""
    slope_f: Float[Array, "place padded"]
    """Change from one point of the grid to the next along f."""
    slope_k: Float[Array, "place padded"]
    n_functions: int = eqx.field(static=True)

    def __call__(self, place_f: Float[Array, "*any"], place_k: Float[Array, "*any"]) -> Float[Array, "function *any"]:
        """The functions at places 0 .. 1, to 5e-5 of M0."""
        scaled = [place.reshape(-1) * (N_TABLE - 1) for place in (place_f, place_k)]
        nearest = [jnp.clip(jnp.round(each), 0, N_TABLE - 1) for each in scaled]
        step = [(each - near)[:, None] for each, near in zip(scaled, nearest, strict=True)]
        index = nearest[0].astype(jnp.int32) * N_TABLE + nearest[1].astype(jnp.int32)
        index, step = lax.optimization_barrier((index, step))
        value, slope_f, slope_k = (each.at[index].get(mode="promise_in_bounds") for each in (self.value, self.slope_f, self.slope_k))
        rows = lax.optimization_barrier(value + step[0] * slope_f + step[1] * slope_k)
        return rows[:, : self.n_functions].T.reshape(-1, *place_f.shape)


PADDED = 16


def tabulate(basis: Basis, functions: slice = slice(None)) -> Table:
    """The table of a basis, or of some of its functions."""
    places = np.linspace(0, 1, N_TABLE)
    orders = (0, 0), (1, 0), (0, 1)
    each = [basis.at((places, places), order).reshape(N_TABLE**2, -1)[:, functions] / (N_TABLE - 1) ** sum(order) for order in orders]
    n_functions = each[0].shape[1]
    value, slope_f, slope_k = (jnp.asarray(np.pad(one, ((0, 0), (0, -n_functions % PADDED))), jnp.float32) for one in each)
    return Table(value, slope_f, slope_k, n_functions)


def _of(functions: Sequence[Float[np.ndarray, "function node"]]) -> Basis:
    return Basis(jnp.asarray(np.concatenate(functions), jnp.float32), tuple(len(each) for each in functions))


def _rank(size: Float[np.ndarray, " function"], n_values: int, tolerance: float) -> int:
    """How many functions must stay, at least one; `size` is the root of the sum of squares that each takes of the samples."""
    left = np.sqrt(np.append(np.cumsum(size[::-1] ** 2)[::-1], 0.0) / n_values)
    return max(1, int(np.argmax(left <= tolerance)))


def _polynomial(place: Float[np.ndarray, " x"], order: int) -> Float[np.ndarray, "x node"]:
    """From values at the simulated nodes to the polynomial (or its derivative by the place) at places 0 .. 1."""
    cheb = np.polynomial.chebyshev
    n = lattice.N_NODES
    nodes = -np.cos((2 * np.arange(n) + 1) * np.pi / (2 * n))
    coefficients = np.linalg.inv(cheb.chebvander(nodes, n - 1))
    for _ in range(order):
        coefficients = 2 * cheb.chebder(coefficients)
    return cheb.chebvander(2 * place - 1, len(coefficients) - 1) @ coefficients
