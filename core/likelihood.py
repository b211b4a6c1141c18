"""The marginal likelihood of one voxel's images on the lattice, from running sums.

Model. Image i of a voxel with amplitude a reads S_i = a (F_i + sum_j X_ij u_j + d_i) + e_i, where F is the signal at the
centre of a mixture component, X its derivatives by the nuisances times their standard deviations, u ~ N(0, 1), d ~ N(0, tau^2)
the discrepancy and e ~ N(0, sigma^2) the noise in pixel units. With s^2 = sigma^2 + (a tau)^2:

* u is integrated in closed form (ridge rho = s^2 / a^2 on the columns X); where a nuisance was measured u has a known mean, so that
  voxels with slightly different T1, T2, .. share one set of columns;
* a is integrated under the prior 1/a, so that a single image says nothing about the parameters;
* sigma^2 is known from nu degrees of freedom, jointly for all images, hence a Student-t of the running sums.

Inside s^2 and rho the amplitude is the one that the lattice point itself implies, F'S / F'F (Laplace's approximation of that
dependence), averaged over a block's voxels, which are of like brightness; the normaliser -(n - 1) log s
is kept, without which f is biased by a quarter at small n.
One image costs the same whether it is the second or the thousandth.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import combinations_with_replacement
from operator import add
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

LEAST_AMPLITUDE = 0.1
"""Of the amplitude that a cell implies without nuisances: less than this they may not leave of it."""


class Sums(eqx.Module):
    """Sufficient statistics of the images so far, of a block of voxels that share their columns.

    The voxel axis is last: what voxels share is then read once per cell and not once per cell and voxel.
    """

    gram: Float[Array, "pair mixture cell 1"]
    """Sums over images of products of columns (upper triangle, row by row)."""
    projection: Float[Array, "column mixture cell voxel"]
    """Sums over images of column times signal."""
    mean_projection: Float[Array, "mixture cell 1"]
    """Of the first column, averaged over voxels; kept beside it, for averaging it anew at every image would copy it first."""
    energy: Float[Array, " voxel"]
    """Sum of squared signals [pixel^2]."""
    n_images: Float[Array, ""]


class Noise(eqx.Module):
    """What is known of the noise: one pixel's standard deviation, its degrees of freedom, and the model's own error."""

    sigma: Float[Array, ""]
    """[pixel units]"""
    dof: Float[Array, ""]
    discrepancy: Float[Array, ""]
    """tau, standard deviation of the model's error per image [fraction of M0]."""


class Fit(eqx.Module):
    """The marginal likelihood, and the residual and amplitude that belong to it, on the lattice."""

    log_likelihood: Float[Array, "cell voxel"]
    """Up to a constant per voxel; float32."""
    residual: Float[Array, "cell voxel"]
    """Residual sum of squares, nuisances at their best (ridge penalty included) [pixel^2]; float32."""
    amplitude: Float[Array, "cell voxel"]
    """[pixel units per M0]; float32."""


def init(n_voxels: int, n_mixture: int, n_columns: int, n_cells: int) -> Sums:
    """No image yet."""
    n_pairs = n_columns * (n_columns + 1) // 2
    return Sums(
        gram=jnp.zeros((n_pairs, n_mixture, n_cells, 1), jnp.float64),
        projection=jnp.zeros((n_columns, n_mixture, n_cells, n_voxels), jnp.float64),
        mean_projection=jnp.zeros((n_mixture, n_cells, 1), jnp.float64),
        energy=jnp.zeros(n_voxels, jnp.float64),
        n_images=jnp.zeros((), jnp.float64),
    )


def update(sums: Sums, columns: Float[Array, "column mixture cell"], signal: Float[Array, " voxel"]) -> Sums:
    """Add one image: the columns that the simulator expects and the signal that was measured [pixel units]."""
    first, second = np.triu_indices(columns.shape[0])
    return Sums(
        gram=sums.gram + (columns[first] * columns[second])[..., None],
        projection=sums.projection + columns[..., None] * signal,
        mean_projection=sums.mean_projection + columns[0][..., None] * jnp.mean(signal),
        energy=sums.energy + signal**2,
        n_images=sums.n_images + 1,
    )


def at_cells(
    sums: Sums, voxels: Int[np.ndarray, " voxel"], cells: Int[np.ndarray, "voxel draw"]
) -> tuple[Float[np.ndarray, "voxel draw mixture column column"], Float[np.ndarray, "voxel draw mixture column"], Float[np.ndarray, " voxel"]]:
    """Some voxels' sums at a few cells each: gram matrix, projection, energy. In NumPy."""
    n = sums.projection.shape[0]
    pair = np.zeros((n, n), int)
    pair[np.triu_indices(n)] = np.arange(len(sums.gram))
    gram = np.asarray(sums.gram)[:, :, cells, 0][np.maximum(pair, pair.T)]
    projection = np.asarray(sums.projection)[:, :, cells, voxels[:, None]]
    return np.transpose(gram, (3, 4, 2, 0, 1)), np.transpose(projection, (2, 3, 1, 0)), np.asarray(sums.energy)[voxels]


def fit(sums: Sums, noise: Noise, shift: Float[Array, "nuisance voxel"] | None = None) -> Fit:
    """Evaluate the likelihood; mixture components count equally.

    Parameters
    ----------
    shift
        Known means of the nuisances' coefficients u, voxel by voxel, where they were measured; none: all are 0.
    """
    factor = _factor(sums, noise)
    ridge, zero = factor.ridge, jnp.zeros_like(sums.projection[0])
    rhs, *y = _whitened(factor, sums.projection)
    power = factor.power
    if shift is not None:
        _, *t = _whitened(factor, [jnp.zeros_like(shift[0]), *shift])
        rhs = rhs + ridge * _product(y, t, zero)
        linear, square = _product(t, factor.mixed, zero), jnp.sum(shift**2, axis=0) - ridge * _product(t, t, zero)
        power = power + ridge * (2 * linear + square)
    # the barriers have their arguments computed once, not anew in every reader inside fused loops
    rhs, power, inverse, explained = jax.lax.optimization_barrier((rhs, power, 1 / power, _product(y, y, zero)))
    amplitude, excess = held(rhs * inverse, power, LEAST_AMPLITUDE * jnp.sqrt(factor.implied))
    residual = jnp.maximum(sums.energy - explained - rhs**2 * inverse, 0.0) + excess
    residual, amplitude, power = jax.lax.optimization_barrier(tuple(each.astype(jnp.float32) for each in (residual, amplitude, power)))
    log_likelihood = _student(factor, power * amplitude**2, residual, noise.dof, sums.n_images)
    return _mix(log_likelihood, residual, amplitude)


def _total(terms: Iterable[Array]) -> Array:
    return reduce(add, terms)


def _product(a: Iterable[Array], b: Iterable[Array], zero: Array) -> Array:
    """Sum of the products; `zero` where there are none."""
    return reduce(add, (each * other for each, other in zip(a, b, strict=True)), zero)


class _Factor(NamedTuple):
    """What a block's voxels share: with G the gram matrix, X its nuisance part and A = X'X + ridge; leaves (mixture, cell, 1)."""

    whiten: list[list[Array]]
    """Rows 1.. are W with W A W' = 1, from the diagonal on; row 0 (not scaled) projects the nuisances out of the signal F."""
    power: Array
    """F'F with the nuisances projected out."""
    mixed: list[Array]
    """W X'F, of each nuisance."""
    determinant: Array
    """det(A) / ridge^p."""
    implied: Array
    """Square of the amplitude that a cell implies by itself, F'S / F'F."""
    ridge: Array
    variance: Array


def _factor(sums: Sums, noise: Noise) -> _Factor:
    """Cholesky's decomposition of A, last column first, and its inverse.

    Every entry is a sum of products of entries that are final, and one pass over the cells makes it; Gaussian elimination would overwrite each in
    every step.
    """
    n = sums.projection.shape[0]
    gram = dict(zip(combinations_with_replacement(range(n), 2), sums.gram, strict=True))
    implied = jnp.maximum(sums.mean_projection / gram[0, 0], _TINY) ** 2
    variance = noise.sigma**2 + noise.discrepancy**2 * implied
    ridge = variance / implied
    determinant, zero = jnp.ones_like(ridge), jnp.zeros_like(ridge)
    root: list[list[Array]] = [[] for _ in range(n)]
    """Of each row what lies right of the diagonal, last column first."""
    whiten: list[list[Array]] = [[] for _ in range(n)]
    for j in range(n - 1, 0, -1):
        pivot = gram[j, j] + ridge - _product(root[j], root[j], zero)
        determinant = determinant * pivot / ridge
        scale = jax.lax.optimization_barrier(1 / jnp.sqrt(pivot))
        column = [(gram[i, j] - _product(root[i], root[j], zero)) * scale for i in range(j)]
        for row, entry in zip(root[:j], jax.lax.optimization_barrier(column), strict=True):
            row.append(entry)
        whiten[j] = [scale, *_inverse_row(root[j], whiten[j + 1 :], scale)]
    mixed = root[0][::-1]
    whiten[0] = [jnp.ones_like(ridge), *_inverse_row(root[0], whiten[1:], jnp.ones_like(ridge))]
    power = gram[0, 0] - _product(mixed, mixed, zero)
    # the barrier has all this computed once per cell, not once per voxel inside a fused loop
    return _Factor(*jax.lax.optimization_barrier((whiten, power, mixed, determinant, implied, ridge, variance)))


def _inverse_row(root: list[Array], below: list[list[Array]], scale: Array) -> list[Array]:
    """The inverse's row right of the diagonal, from the root's (last column first) and the inverse's rows below."""
    right = root[::-1]
    row = [-scale * _total(right[m] * below[m][k - m] for m in range(k + 1)) for k in range(len(right))]
    return jax.lax.optimization_barrier(row)


def _whitened(factor: _Factor, values: Sequence[Array] | Array) -> list[Array]:
    """Of every row of `factor.whiten`."""
    return [_total(weight * values[j + i] for i, weight in enumerate(row)) for j, row in enumerate(factor.whiten)]


def held(amplitude: Array, power: Array, least: Array) -> tuple[Array, Array]:
    """The amplitude, held at `least`, and by how much that makes the residual larger.

    The prior 1/a and the ridge both assume an amplitude like the one that the cell implies. Where nuisances explain a voxel almost without its
    signal, down to amplitudes that are not positive, 1/a would make such a cell the most probable of all.
    """
    short = jnp.maximum(least - amplitude, 0.0)
    return jnp.maximum(amplitude, least), power * short**2  # the sum with `short` would round a tiny `least` to zero


def _student(factor: _Factor, power: Array, residual: Array, dof: Array, n: Array) -> Array:
    """log of occam^-1/2 s^-(n-1) (1 + RSS / (nu s^2))^-(nu+n-1)/2; in float32, logarithms take a fifth of the time of float64.

    Occam's factor is `power`, F'F a^2 with the nuisances projected out, times det(A) / ridge^p.
    """
    shared = (-0.5 * jnp.log(factor.determinant) - 0.5 * (n - 1) * jnp.log(factor.variance)).astype(jnp.float32)
    excess = jnp.log1p(residual / (dof * factor.variance).astype(jnp.float32))
    return shared - 0.5 * jnp.log(power) - (0.5 * (dof + n - 1)).astype(jnp.float32) * excess


def _mix(log_likelihood: Array, residual: Array, amplitude: Array) -> Fit:
    """Sum over the mixture axis; residual and amplitude are averaged by responsibility."""
    if log_likelihood.shape[0] == 1:
        return Fit(log_likelihood[0], residual[0], amplitude[0])
    responsibility = jax.nn.softmax(log_likelihood, axis=0)
    return Fit(jax.nn.logsumexp(log_likelihood, axis=0), jnp.sum(responsibility * residual, axis=0), jnp.sum(responsibility * amplitude, axis=0))


_TINY = 1e-9  # an implied amplitude that is not positive
