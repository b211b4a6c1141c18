"""The marginal likelihood of one voxel's images on the lattice, from running sums.

Model. Image i of a voxel with amplitude a reads S_i = a (F_i + sum_j X_ij u_j + d_i) + e_i, where F is the signal at the
centre of a mixture component, X its derivatives by the nuisances times their standard deviations, u ~ N(0, 1), d ~ N(0, tau^2)
the discrepancy and e ~ N(0, sigma^2) the noise in pixel units. With s^2 = sigma^2 + (a tau)^2:

* u is integrated in closed form (ridge rho = s^2 / a^2 on the columns X);
* a is integrated under the prior 1/a, so that a single image says nothing about the parameters;
* sigma^2 is known from nu degrees of freedom, jointly for all images, hence a Student-t of the running sums.

Inside s^2 and rho the amplitude is the one that the lattice point itself implies, F'S / F'F (Laplace's approximation of that
dependence), averaged over a block's voxels where these share their columns (blocks are sorted by brightness); the normaliser -(n - 1) log s is kept, without which f is biased by a quarter at small n.
One image costs the same whether it is the second or the thousandth.
"""

from __future__ import annotations

from itertools import combinations_with_replacement

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Sums(eqx.Module):
    """Sufficient statistics of the images so far; `group` is 1 where all voxels share their nuisances, else voxel.

    The column axes lead: the evaluation below then runs over contiguous arrays, four times faster than with them last but one.
    """

    gram: Float[Array, "pair group mixture cell"]
    """Sums over images of products of columns (upper triangle, row by row)."""
    projection: Float[Array, "column voxel mixture cell"]
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

    log_likelihood: Float[Array, "voxel cell"]
    """Up to a constant per voxel; float32."""
    residual: Float[Array, "voxel cell"]
    """Residual sum of squares, nuisances at their best (ridge penalty included) [pixel^2]; float32."""
    amplitude: Float[Array, "voxel cell"]
    """[pixel units per M0]; float32."""


def init(n_voxels: int, n_groups: int, n_mixture: int, n_columns: int, n_cells: int) -> Sums:
    """No image yet."""
    n_pairs = n_columns * (n_columns + 1) // 2
    return Sums(
        gram=jnp.zeros((n_pairs, n_groups, n_mixture, n_cells), jnp.float64),
        projection=jnp.zeros((n_columns, n_voxels, n_mixture, n_cells), jnp.float64),
        energy=jnp.zeros(n_voxels, jnp.float64),
        n_images=jnp.zeros((), jnp.float64),
    )


def update(sums: Sums, columns: Float[Array, "column group mixture cell"], signal: Float[Array, " voxel"]) -> Sums:
    """Add one image: the columns that the simulator expects and the signal that was measured [pixel units]."""
    first, second = np.triu_indices(columns.shape[0])
    return Sums(
        gram=sums.gram + columns[first] * columns[second],
        projection=sums.projection + columns * signal[:, None, None],
        energy=sums.energy + signal**2,
        n_images=sums.n_images + 1,
    )


def fit(sums: Sums, noise: Noise) -> Fit:
    """Evaluate the likelihood; mixture components count equally."""
    gram = _symmetric(sums.gram)
    shared = sums.gram.shape[1] == 1
    first = jnp.mean(sums.projection[0], axis=0, keepdims=True) if shared else sums.projection[0]
    implied = jnp.maximum(first / gram[0][0], _TINY) ** 2
    variance = noise.sigma**2 + noise.discrepancy**2 * implied
    # the barrier has what is shared by voxels computed once, not once per voxel inside a fused loop
    whiten, occam, variance = jax.lax.optimization_barrier((*_factor(gram, variance / implied), variance))
    y = [sum(row[j] * sums.projection[j] for j in range(i, len(row))) for i, row in enumerate(whiten)]
    residual = jnp.maximum(sums.energy[:, None, None] - sum(each**2 for each in y), 0.0)
    amplitude = y[0] * whiten[0][0]
    log_likelihood = _student(occam * jnp.maximum(amplitude, _TINY) ** 2, variance, residual, noise.dof, sums.n_images)
    return _mix(log_likelihood, residual.astype(jnp.float32), amplitude.astype(jnp.float32))


def _symmetric(gram: Array) -> list[list[Array]]:
    n_columns = int((2 * gram.shape[0]) ** 0.5)
    index = {pair: i for i, pair in enumerate(combinations_with_replacement(range(n_columns), 2))}
    return [[gram[index[min(i, j), max(i, j)]] for j in range(n_columns)] for i in range(n_columns)]


def _factor(gram: list[list[Array]], ridge: Array) -> tuple[list[list[Array]], Array]:
    """W with W (G + ridge on the nuisances) W' = 1, and det(G + ridge) / ridge^p.

    Row i of W reads columns i .. C - 1: nuisances are eliminated from the last to the first, so that row 0 belongs to the signal itself
    with all nuisances projected out.
    """
    n = len(gram)
    a = [list(row) for row in gram]
    w: list[list[Array]] = [[jnp.ones_like(ridge) if i == j else jnp.zeros_like(ridge) for j in range(n)] for i in range(n)]
    determinant = jnp.ones_like(ridge)
    for j in range(n - 1, -1, -1):
        pivot = a[j][j] + ridge if j else a[0][0]
        determinant = determinant * (pivot / ridge if j else pivot)
        for i in range(j):
            factor = a[i][j] / pivot
            for k in range(i, j):
                a[i][k] = a[i][k] - factor * a[k][j]
            for k in range(j, n):
                w[i][k] = w[i][k] - factor * w[j][k]
        scale = 1 / jnp.sqrt(pivot)
        w[j] = [scale * each for each in w[j]]
    return w, determinant


def _student(occam: Array, variance: Array, residual: Array, dof: Array, n: Array) -> Array:
    """log of occam^-1/2 s^-(n-1) (1 + RSS / (nu s^2))^-(nu+n-1)/2; logarithms in float32, a fifth of the time of float64."""
    excess = jnp.log1p((residual / (dof * variance)).astype(jnp.float32))
    return -0.5 * _log(occam) - (0.5 * (n - 1)).astype(jnp.float32) * _log(variance) - (0.5 * (dof + n - 1)).astype(jnp.float32) * excess


def _mix(log_likelihood: Array, residual: Array, amplitude: Array) -> Fit:
    """Sum over the mixture axis; residual and amplitude are averaged by responsibility."""
    if log_likelihood.shape[1] == 1:
        return Fit(log_likelihood[:, 0], residual[:, 0], amplitude[:, 0])
    responsibility = jax.nn.softmax(log_likelihood, axis=1)
    return Fit(
        jax.nn.logsumexp(log_likelihood, axis=1), jnp.sum(responsibility * residual, axis=1), jnp.sum(responsibility * amplitude, axis=1)
    )


def _log(x: Array) -> Array:
    return jnp.log(x.astype(jnp.float32))


_TINY = 1e-9  # an amplitude that is not positive has no likelihood to speak of
