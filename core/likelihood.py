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

from collections.abc import Iterable
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
        energy=jnp.zeros(n_voxels, jnp.float64),
        n_images=jnp.zeros((), jnp.float64),
    )


def update(sums: Sums, columns: Float[Array, "column mixture cell"], signal: Float[Array, " voxel"]) -> Sums:
    """Add one image: the columns that the simulator expects and the signal that was measured [pixel units]."""
    first, second = np.triu_indices(columns.shape[0])
    return Sums(
        gram=sums.gram + (columns[first] * columns[second])[..., None],
        projection=sums.projection + columns[..., None] * signal,
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
    whiten, ridge, p = factor.whiten, factor.ridge, sums.projection
    y = [_total(whiten[j, i] * p[i] for i in range(j, len(p))) for j in range(len(p))]
    rhs, power = y[0], jnp.broadcast_to(factor.power, y[0].shape)
    if shift is not None:
        t = [_total(whiten[j, i] * shift[i - 1] for i in range(j, len(p))) for j in range(1, len(p))]
        rhs = rhs + ridge * _total(each * along for each, along in zip(y[1:], t, strict=True))
        linear = _total(along * mixed for along, mixed in zip(t, factor.mixed, strict=True))
        square = jnp.sum(shift**2, axis=0) - ridge * _total(along**2 for along in t)
        power = power + ridge * (2 * linear + square)
    # the barriers have their arguments computed once, not anew in every reader inside fused loops
    rhs, power, explained = jax.lax.optimization_barrier((rhs, power, _total([jnp.zeros_like(rhs), *(each**2 for each in y[1:])])))
    amplitude, excess = held(rhs / power, power, LEAST_AMPLITUDE * jnp.sqrt(factor.implied))
    residual = jnp.maximum(sums.energy - explained - rhs * (rhs / power), 0.0) + excess
    residual, amplitude = jax.lax.optimization_barrier((residual, amplitude))
    occam = factor.determinant * power * amplitude**2
    log_likelihood = _student(occam, factor.variance, residual, noise.dof, sums.n_images)
    return _mix(log_likelihood, residual.astype(jnp.float32), amplitude.astype(jnp.float32))


def _total(terms: Iterable[Array]) -> Array:
    return reduce(add, terms)


class _Factor(NamedTuple):
    """What a block's voxels share: with G the gram matrix, X its nuisance part and A = X'X + ridge; leaves (.., mixture, cell, 1)."""

    whiten: Array
    """(column, column, ..): rows 1.. are W with W A W' = 1; row 0 (not scaled) projects the nuisances out of the signal F."""
    power: Array
    """F'F with the nuisances projected out."""
    mixed: Array
    """(nuisance, ..): W X'F."""
    determinant: Array
    """det(A) / ridge^p."""
    implied: Array
    """Square of the amplitude that a cell implies by itself, F'S / F'F."""
    ridge: Array
    variance: Array


def _factor(sums: Sums, noise: Noise) -> _Factor:
    """Gaussian elimination of the nuisances, last column first."""
    n = sums.projection.shape[0]
    index = {pair: i for i, pair in enumerate(combinations_with_replacement(range(n), 2))}
    gram = [[sums.gram[index[min(i, j), max(i, j)]] for j in range(n)] for i in range(n)]
    implied = jnp.maximum(jnp.mean(sums.projection[0], axis=-1, keepdims=True) / gram[0][0], _TINY) ** 2
    variance = noise.sigma**2 + noise.discrepancy**2 * implied
    ridge = variance / implied
    a = [list(row) for row in gram]
    w = [[jnp.ones_like(ridge) if i == j else jnp.zeros_like(ridge) for j in range(n)] for i in range(n)]
    determinant = jnp.ones_like(ridge)
    for j in range(n - 1, 0, -1):
        pivot = a[j][j] + ridge
        determinant = determinant * pivot / ridge
        for i in range(j):
            factor = a[i][j] / pivot
            for k in range(i, j):
                a[i][k] = a[i][k] - factor * a[k][j]
            for k in range(j, n):
                w[i][k] = w[i][k] - factor * w[j][k]
        w[j] = [each / jnp.sqrt(pivot) for each in w[j]]
    whiten = jnp.stack([jnp.stack(row) for row in w])
    mixed = jnp.stack([_total(w[j][i] * gram[i][0] for i in range(j, n)) for j in range(1, n)]) if n > 1 else jnp.zeros((0, *ridge.shape))
    # the barrier has all this computed once per cell, not once per voxel inside a fused loop
    return _Factor(*jax.lax.optimization_barrier((whiten, a[0][0], mixed, determinant, implied, ridge, variance)))


def held(amplitude: Array, power: Array, least: Array) -> tuple[Array, Array]:
    """The amplitude, held at `least`, and by how much that makes the residual larger.

    The prior 1/a and the ridge both assume an amplitude like the one that the cell implies. Where nuisances explain a voxel almost without its
    signal, down to amplitudes that are not positive, 1/a would make such a cell the most probable of all.
    """
    short = jnp.maximum(least - amplitude, 0.0)
    return jnp.maximum(amplitude, least), power * short**2  # the sum with `short` would round a tiny `least` to zero


def _student(occam: Array, variance: Array, residual: Array, dof: Array, n: Array) -> Array:
    """log of occam^-1/2 s^-(n-1) (1 + RSS / (nu s^2))^-(nu+n-1)/2; logarithms in float32, a fifth of the time of float64."""
    excess = jnp.log1p((residual / (dof * variance)).astype(jnp.float32))
    return -0.5 * _log(occam) - (0.5 * (n - 1)).astype(jnp.float32) * _log(variance) - (0.5 * (dof + n - 1)).astype(jnp.float32) * excess


def _mix(log_likelihood: Array, residual: Array, amplitude: Array) -> Fit:
    """Sum over the mixture axis; residual and amplitude are averaged by responsibility."""
    if log_likelihood.shape[0] == 1:
        return Fit(log_likelihood[0], residual[0], amplitude[0])
    responsibility = jax.nn.softmax(log_likelihood, axis=0)
    return Fit(
        jax.nn.logsumexp(log_likelihood, axis=0), jnp.sum(responsibility * residual, axis=0), jnp.sum(responsibility * amplitude, axis=0)
    )


def _log(x: Array) -> Array:
    return jnp.log(x.astype(jnp.float32))


_TINY = 1e-9  # an implied amplitude that is not positive
