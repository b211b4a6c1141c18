"""What the next image should read, said before it is looked at, and how far it is off.

At the draws of a voxel's posterior (`core.design`) amplitude and nuisances are Gaussian given the images so far, so the next image is
predicted with mean m and variance

    v = Var_d[m_d] + Mean_d[s^2 (1 + phi_d' A_d^-1 phi_d)]

spread of the posterior, unknown amplitude and nuisances, noise and discrepancy. If the model holds, (signal - m) / sqrt(v) has variance 1 at
every image, independently from image to image (they are innovations), but not from voxel to voxel: what voxels share errs together.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scansteer.core import design
from scansteer.core.design import Question

SD_OF_MAD = 1.4826
"""Standard deviation of a normal over its median absolute deviation."""


class Prediction(NamedTuple):
    mean: Float[np.ndarray, " voxel"]
    """[pixel units]"""
    sd: Float[np.ndarray, " voxel"]
    """Of the image about it, noise included [pixel units]."""
    shared_sd: Float[np.ndarray, " voxel"]
    """Of what voxels may err by together: all but the noise of each one's pixel [pixel units]."""


def of_region(mean: Float[np.ndarray, " voxel"], variance: Float[np.ndarray, " voxel"], sigma: float) -> Prediction:
    """From what `predict` gives, and the noise of one pixel; so many voxels leave as much of it in their mean."""
    shared = np.maximum(variance - sigma**2, 0.0) + sigma**2 / len(mean)
    return Prediction(mean, np.sqrt(variance), np.sqrt(shared))


def predict(question: Question, signals: Float[Array, "voxel draw node 1"]) -> tuple[Array, Array]:
    """Mean and variance of one image in every voxel asked about [pixel units].

    Parameters
    ----------
    question
        As it was asked after the latest image.
    signals
        Of the next image at the draws, by `predictive.at_draws`.
    """
    given = design.condition(question, design.fitted(question))
    signals = signals[..., 0]
    mean = jnp.einsum("vkn,vkn->vk", signals, given.mean[..., :-1]) + given.mean[..., -1]
    along = jnp.einsum("vkn,vknc->vkc", signals, given.root[..., :-1, :]) + given.root[..., -1, :]
    blur = jnp.sum(question.draw_weights * given.variance * (1 + jnp.sum(along**2, axis=-1)), axis=1)
    spread = jnp.sum(jnp.einsum("vhk,vk->vh", question.contrast, mean) ** 2, axis=1)
    return jnp.sum(question.mean_weights * mean, axis=1), blur + spread


def surprise(prediction: Prediction, signal: Float[np.ndarray, " voxel"]) -> float:
    """How far an image is from its prediction: squared standardised error, 1 on average if the model holds.

    median(z)^2 + (1.4826 median |z - median(z)|)^2: what voxels share and what they do not, so that the mean is 1 whether they err together or
    each on its own, and a few voxels that moved have no say.
    """
    z = (signal - prediction.mean) / prediction.sd
    together = np.median(z)
    return float(together**2 + (SD_OF_MAD * np.median(np.abs(z - together))) ** 2)
