"""The published retrospective analysis, for comparison: what a posterior looks like that knows the whole sequence beforehand.

Signals and dictionary are divided by their norm over all N images, the noise is a voxel's best misfit over all N, and the prior is flat over
the box (the ps-vae paper's truncated protocol, its Eqs. 6-8):

    log p_n(cell) = -1/2 sum_{i <= n} (s_i / |s| - F_i / |F|)^2 / sigma^2,    sigma = min over cells of |s / |s| - F / |F|| / sqrt(N)

A scanner has neither norm nor misfit at image n: what is drawn from this is not what could have been known then.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def log_posteriors(signals: Float[Array, "voxel image"], dictionary: Float[Array, "voxel image cell"]) -> Float[Array, "image voxel cell"]:
    """After 1 .. N images, up to a constant per voxel; a dictionary that voxels share may have a voxel axis of length 1."""
    signals = signals / jnp.linalg.norm(signals, axis=1, keepdims=True)
    dictionary = dictionary / jnp.linalg.norm(dictionary, axis=1, keepdims=True)
    misfit = jnp.cumsum((signals[:, :, None] - dictionary) ** 2, axis=1)
    variance = jnp.min(misfit[:, -1], axis=1) / signals.shape[1]
    return jnp.swapaxes(-0.5 * misfit / variance[:, None, None], 0, 1)
