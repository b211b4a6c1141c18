"""What an encoder is trained with: losses and one optimiser step. Pure; files and progress are realtime.training.

Two objectives, both of the last stage's Gaussian q:

* the evidence lower bound of the variational autoencoder whose decoder is the simulator: draw z from q, decode by the spin physics (the
  running sums give the images' likelihood under any (f, k), noise, amplitude and nuisances integrated), add the prior, subtract log q. It
  needs no truth and no reference, hence fits measured scans;
* agreement of mean and covariance with the reference's on simulated draws: Kullback-Leibler divergence from the reference (what is too
  narrow is expensive) and a share of the one towards it (what is too wide is, too). The lower bound alone settles inside banana-shaped
  and box-limited posteriors.

Earlier stages learn from the reference only, each with its own loss; where there is none, from the last stage's answer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from scansteer.core import coordinate as coordinates
from scansteer.core import encoder as encoders
from scansteer.core.agreement import draw
from scansteer.core.encoder import Encoder, Gaussian, Plan, State
from scansteer.core.likelihood import Noise

N_DRAWS = 4
"""Of z per voxel for the lower bound."""
LARGEST = 20.0
"""Divergences are bent to grow like the logarithm beyond this: no single voxel steers a step."""


class Samples(eqx.Module):
    """Voxels in the middle of scans; leaves (voxel, ..)."""

    state: State
    noise: Noise
    reference: Gaussian
    is_known: Float[Array, " voxel"]
    """1 where there is a reference, 0 for measured signals."""


class Weights(NamedTuple):
    moments: float
    towards: float
    """Of the divergence from q to the reference, beside the one from the reference to q."""
    lower_bound: float


class Losses(NamedTuple):
    moments: Float[Array, ""]
    """Of the last stage, mean over the samples that have a reference."""
    first: Float[Array, ""]
    """Of the first stage."""
    lower_bound: Float[Array, ""]
    """Negative evidence lower bound, mean over all samples (up to a constant of each)."""


def divergence(p: Gaussian, q: Gaussian) -> Float[Array, " voxel"]:
    """Kullback-Leibler divergence of two Gaussians, KL(p || q)."""
    shift = coordinates.whiten(p.mean - q.mean, q.root)
    columns = coordinates.whiten(
        jnp.stack([p.root[..., :2], jnp.stack([jnp.zeros_like(p.root[..., 2]), p.root[..., 2]], -1)]), q.root
    )
    log_volume = jnp.log(q.root[..., 0] * q.root[..., 2]) - jnp.log(p.root[..., 0] * p.root[..., 2])
    return log_volume + 0.5 * (jnp.sum(columns**2, axis=(0, -1)) + jnp.sum(shift**2, -1)) - 1


def negative_lower_bound(
    key: PRNGKeyArray, encoder: Encoder, plan: Plan, state: State, noise: Noise, posterior: Gaussian
) -> Float[Array, " voxel"]:
    """-E_q [log likelihood + log prior - log q], by draws; relative to the log posterior at q's mean, held fixed."""
    z = draw(key, posterior, N_DRAWS)
    centre = jax.lax.stop_gradient(posterior.mean)[:, None]
    points = jnp.clip(jnp.concatenate([centre, z], axis=1), -4.5, 4.5).T
    expansion = encoders.expand(encoder, plan, state, points[:, 0].T)
    height = encoders.evaluate(encoder, plan, expansion, noise, points).log_likelihood - 0.5 * jnp.sum(points**2, axis=0)
    log_q = coordinates.log_normal(
        coordinates.whiten(z - posterior.mean[:, None], posterior.root[:, None]), posterior.root[:, None]
    )
    return jnp.mean(log_q - (height[1:] - height[:1]).T, axis=1)


def loss(encoder: Encoder, plan: Plan, key: PRNGKeyArray, samples: Samples, weights: Weights) -> tuple[Float[Array, ""], Losses]:
    """The weighted sum, and its parts."""
    stages = encoders.stages(encoder, plan, samples.state, samples.noise)
    known, last = samples.is_known, stages[-1]
    aim = jax.tree.map(lambda a, b: jnp.where(known[:, None] > 0, a, jax.lax.stop_gradient(b)), samples.reference, last)
    early = [jnp.mean(_bent(divergence(aim, stage))) for stage in stages[:-1]]
    share = known / jnp.maximum(jnp.sum(known), 1.0)
    moments = jnp.sum(share * (_bent(divergence(aim, last)) + weights.towards * _bent(divergence(last, aim))))
    bound = jnp.mean(_bent(negative_lower_bound(key, encoder, plan, samples.state, samples.noise, last) + 20.0) - 20.0)
    total = weights.moments * moments + sum(early) + weights.lower_bound * bound
    return total, Losses(moments, early[0], bound)


def resized(encoder: Encoder, n_refinements: int, n_anchors: int) -> Encoder:
    """The same encoder with so many refinements, its first ones or copies of the last added, free to learn apart, and so many anchors."""
    more = max(0, n_refinements - len(encoder.refine))
    refine = encoder.refine[:n_refinements] + encoder.refine[-1:] * more
    return replace(encoder, refine=refine, n_anchors=n_anchors)


def trainable(encoder: Encoder) -> Encoder:
    """True at the leaves that training changes: the perceptrons."""
    fixed = jax.tree.map(lambda _: False, encoder)
    learnt = jax.tree.map(eqx.is_inexact_array, (encoder.first, encoder.refine))
    return eqx.tree_at(lambda e: (e.first, e.refine), fixed, learnt)


def step(
    encoder: Encoder,
    optimiser_state: optax.OptState,
    optimiser: optax.GradientTransformation,
    plan: Plan,
    key: PRNGKeyArray,
    samples: Samples,
    weights: Weights,
) -> tuple[Encoder, optax.OptState, Losses]:
    """One optimiser step. A step whose gradient is not finite changes nothing."""
    learnt, fixed = eqx.partition(encoder, trainable(encoder))
    gradient, losses = jax.grad(lambda part: loss(eqx.combine(part, fixed), plan, key, samples, weights), has_aux=True)(learnt)
    sound = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(gradient)]))
    gradient = jax.tree.map(lambda leaf: jnp.where(sound, leaf, 0.0), gradient)
    updates, optimiser_state = optimiser.update(gradient, optimiser_state, learnt)
    return eqx.combine(eqx.apply_updates(learnt, updates), fixed), optimiser_state, losses


def _bent(value: Array) -> Array:
    """Itself up to `LARGEST`, its logarithm's growth beyond."""
    beyond = jnp.maximum(value - LARGEST, 0.0)
    return jnp.minimum(value, LARGEST) + LARGEST * jnp.log1p(beyond / LARGEST)
