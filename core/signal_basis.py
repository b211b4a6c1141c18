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
from jaxtyping import Array, Float

from scansteer.core import lattice

TOLERANCE = 5e-5
"""Root mean square of what a basis leaves of a signal [fraction of M0]."""
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
        left = np.sqrt(np.append(np.cumsum(size[::-1] ** 2)[::-1], 0.0) / samples.size)
        functions.append(rows[: max(1, int(np.argmax(left <= tolerance)))])
    return Basis(jnp.asarray(np.concatenate(functions), jnp.float32), tuple(len(each) for each in functions))


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

    rows: Float[Array, "place 3 function"]

    def __call__(self, place_f: Float[Array, "*any"], place_k: Float[Array, "*any"]) -> Float[Array, "*any function"]:
        """The functions at places 0 .. 1, to 5e-5 of M0."""
        scaled = jnp.stack([place_f, place_k]) * (N_TABLE - 1)
        nearest = jnp.clip(jnp.round(scaled), 0, N_TABLE - 1)
        index = nearest.astype(jnp.int32)
        row = self.rows[index[0] * N_TABLE + index[1]]
        step = scaled - nearest
        return row[..., 0, :] + step[0][..., None] * row[..., 1, :] + step[1][..., None] * row[..., 2, :]


def tabulate(basis: Basis) -> Table:
    """The table of a basis."""
    places = np.linspace(0, 1, N_TABLE)
    each = [basis.at((places, places), order) / (N_TABLE - 1) ** sum(order) for order in ((0, 0), (1, 0), (0, 1))]
    rows = np.stack(each, axis=2).reshape(N_TABLE**2, 3, -1)
    return Table(jnp.asarray(rows, jnp.float32))


def _polynomial(place: Float[np.ndarray, " x"], order: int) -> Float[np.ndarray, "x node"]:
    """From values at the simulated nodes to the polynomial (or its derivative by the place) at places 0 .. 1."""
    cheb = np.polynomial.chebyshev
    n = lattice.N_NODES
    nodes = -np.cos((2 * np.arange(n) + 1) * np.pi / (2 * n))
    coefficients = np.linalg.inv(cheb.chebvander(nodes, n - 1))
    for _ in range(order):
        coefficients = 2 * cheb.chebder(coefficients)
    return cheb.chebvander(2 * place - 1, len(coefficients) - 1) @ coefficients
