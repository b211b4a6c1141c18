"""The reference posterior: exact on a lattice over the box of (f, k), one image at a time.

Voxels are processed in blocks of a fixed size, padded: shapes never change, so nothing is compiled after the first image, and a voxel's
answer depends on its neighbours by the block's mean brightness alone.
"""

from __future__ import annotations

from typing import Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scansteer.core import lattice, likelihood, region
from scansteer.core.lattice import Box
from scansteer.core.likelihood import Noise, Sums
from scansteer.core.region import Summary


class Prior(eqx.Module):
    """The box of (f, k) and the prior density in it."""

    box: Box
    log_density: tuple[Float[Array, " f"], Float[Array, " k"]]
    """Of f and of k at the lattice points, each normalised over its side of the box; float32."""

    def on_cells(self) -> Float[Array, " cell"]:
        """Joint log density; cells are f-major."""
        return (self.log_density[0][:, None] + self.log_density[1]).reshape(-1)


class Info(eqx.Module):
    """What a person or a monitor wants to see of one block of voxels after an image."""

    summary: Summary
    nrmse: Float[Array, " voxel"]
    """Norm of the residual at the MAP over the norm of the signal."""
    amplitude: Float[Array, " voxel"]
    """Amplitude at the MAP [pixel units per M0]."""


PriorShape = Literal["uniform", "log-uniform", "beta"]


def make_prior(lower: Float[Array, " 2"], upper: Float[Array, " 2"], n_points: tuple[int, int], shapes: tuple[PriorShape, PriorShape]) -> Prior:
    """Independent priors over a box.

    `uniform`; `log-uniform`, which needs a positive lower bound; `beta`: Beta(2, 2) over the side, a parabola that vanishes at both ends, so
    that the maximum of a posterior that knows little lies within the box and not at its edge.
    """
    box = Box(lower, upper, n_points)

    def density(axis: int) -> Array:
        here = box.in_numpy()
        low, high = here.lower[axis], here.upper[axis]
        points = here.value(axis, np.arange(n_points[axis], dtype=float))
        if shapes[axis] == "log-uniform":
            value = -np.log(points * np.log(high / low))
        elif shapes[axis] == "beta":
            share = np.clip((points - low) / (high - low), 1e-4, 1 - 1e-4)
            value = np.log(6 * share * (1 - share) / (high - low))
        else:
            value = np.full(n_points[axis], -np.log(high - low))
        return jnp.asarray(value, jnp.float32)

    return Prior(box, (density(0), density(1)))


def expected_columns(weights: Float[Array, "mixture column node"], signals: Float[Array, "node point"], box: Box) -> Array:
    """The likelihood's columns (column, mixture, cell) on the lattice, from the dictionary's signals of one image."""
    return lattice.upsample(jnp.einsum("mcn,nx->cmx", weights, signals), box.n_points)


LogPosterior = Float[Array, "voxel cell"]
"""On the lattice, up to a constant per voxel; float32."""


class OnLattice(eqx.Module):
    """The posterior of some voxels before it is described."""

    log_posterior: LogPosterior
    residual: Float[Array, "cell voxel"]
    """As in `likelihood.Fit`."""
    amplitude: Float[Array, "cell voxel"]
    energy: Float[Array, " voxel"]
    """Sum of squared signals [pixel^2]."""
    power: Float[Array, ""]
    """As in `region.summarise`."""


def step(
    sums: Sums,
    columns: Float[Array, "column mixture cell"],
    signal: Float[Array, " voxel"],
    noise: Noise,
    prior: Prior,
    shift: Float[Array, "nuisance voxel"] | None = None,
) -> tuple[Sums, OnLattice]:
    """Add one image and infer; `shift` as in `likelihood.fit`."""
    sums = likelihood.update(sums, columns, signal)
    return sums, on_lattice(sums, noise, prior, shift)


def on_lattice(sums: Sums, noise: Noise, prior: Prior, shift: Float[Array, "nuisance voxel"] | None = None) -> OnLattice:
    """The posterior of every voxel of a block; `shift` as in `likelihood.fit`."""
    fit = likelihood.fit(sums, noise, shift)
    power = noise.dof + sums.n_images - 1
    return OnLattice(fit.log_likelihood.T + prior.on_cells(), fit.residual, fit.amplitude, sums.energy, power)


def describe(posterior: OnLattice, prior: Prior) -> tuple[Info, Float[Array, " voxel"]]:
    """What is said of every voxel, and the log evidence of its model: comparable between posteriors of the same images."""
    n_points = prior.box.n_points
    summary, evidence = region.with_evidence(posterior.log_posterior.reshape(-1, *n_points), prior.log_density, prior.box, posterior.power)
    at_map = prior.box.position(0, summary.map[:, 0]), prior.box.position(1, summary.map[:, 1])
    residual, amplitude = (region.at_point(field, at_map, n_points) for field in (posterior.residual, posterior.amplitude))
    return Info(summary, jnp.sqrt(jnp.maximum(residual, 0.0) / jnp.maximum(posterior.energy, 1e-30)), amplitude), evidence
