"""Whitening of many small covariance matrices, by elimination written out in array operations.

Not `jnp.linalg.cholesky` and `solve_triangular`: on a CPU those hand batches to LAPACK in XLA's thread pool, and two of them at once (in one
program, or in two threads) wait for each other for ever (jaxlib 0.10.2, two cores). A session that hangs is worse than a slow one.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def whiten(matrix: Float[Array, "... n n"]) -> Float[Array, "... n n"]:
    """The lower triangular W with W A W' = 1, which is the inverse of the Cholesky factor of A; A is symmetric and positive definite."""
    n = matrix.shape[-1]
    unit = jnp.broadcast_to(jnp.eye(n, dtype=matrix.dtype), matrix.shape)

    def eliminate(j: Array, both: Array) -> Array:
        row = lax.dynamic_index_in_dim(both, j, axis=-2, keepdims=True)
        column = lax.dynamic_index_in_dim(both, j, axis=-1, keepdims=True)
        pivot = lax.dynamic_index_in_dim(row, j, axis=-1, keepdims=True)
        below = (jnp.arange(n) > j)[:, None]
        return both - jnp.where(below, column / pivot, 0.0) * row

    both = lax.fori_loop(0, n, eliminate, jnp.concatenate([matrix, unit], axis=-1))
    pivots = jnp.diagonal(both[..., :n], axis1=-2, axis2=-1)
    return both[..., n:] / jnp.sqrt(pivots)[..., None]


def log_determinant(whitener: Float[Array, "... n n"]) -> Float[Array, "..."]:
    """log det A from its `whiten`."""
    return -2 * jnp.sum(jnp.log(jnp.diagonal(whitener, axis1=-2, axis2=-1)), axis=-1)
