"""The pulse most worth playing next: what each candidate is expected to take off the logarithm of the confidence region's area.

At a draw (f, k)_d of a voxel's posterior, amplitude and nuisances are Gaussian given the images so far: beta = a (1, u) has mean
b_d = A^-1 p and covariance s^2 A^-1, with A = F'F + ridge and p = F'S the running sums of `core.likelihood`. A candidate with
columns phi_d would read phi_d' beta + noise. What it tells about (f, k) is the spread of its predicted means over the posterior,
against all that would blur it:

    gain = 1/2 log(1 + Var_d[phi_d' b_d] / Mean_d[s^2 (1 + phi_d' A_d^-1 phi_d)])       [nat]

(Lindley 1956; for a Gaussian posterior the gain in information about two parameters is the loss of log area). The variance over the
posterior is taken over draws where the posterior is wide, and as gradient' covariance gradient where it is narrower than the
lattice; both are a quadratic form in the predictions at a few lattice cells.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from scansteer.core import lattice, predictive
from scansteer.core.lattice import Box
from scansteer.core.nuisance import END_OF_RANGE
from scansteer.core.whitening import log_determinant, whiten

N_DRAWS = 16
NARROW = 0.028
"""A posterior whose smaller principal standard deviation is less than this share of the box's side (1.3 steps of 48 points) is linearised: draws
on the lattice would blur what is known best, and pulses would be chosen that measure it once more."""

UNREAD = 0.8
"""Share of a nuisance's prior variance: of what images leave more of, they do not tell where it lies."""


class Draws(NamedTuple):
    """Lattice cells of each voxel, and how predictions at them make up mean and variance over its posterior."""

    cells: Int[np.ndarray, "voxel draw"]
    weights: Float[np.ndarray, "voxel draw"]
    """Of what varies little over the posterior; sum to 1, none is negative."""
    mean_weights: Float[np.ndarray, "voxel draw"]
    """How x at the draws makes up its mean over the posterior; sum to 1."""
    contrast: Float[np.ndarray, "voxel form draw"]
    """Variance of x over the posterior = sum over `form` of (contrast @ x)^2."""


class Conditional(eqx.Module):
    """What the images so far say of amplitude and nuisances at each draw of each voxel, as weights of the star's nodes; float32.

    A candidate with signals x at the nodes (the last node reads 1) reads x . mean, with variance s^2 (1 + |x root|^2).
    """

    mean: Float[Array, "voxel draw node_"]
    """[pixel units]"""
    root: Float[Array, "voxel draw node_ column"]
    """Amplitude and nuisances of every mixture component, and how the components' means differ."""
    variance: Float[Array, "voxel draw"]
    """s^2, noise and discrepancy [pixel^2]."""


class Question(eqx.Module):
    """What is asked about a few voxels: where their posteriors lie, and what the images so far say there."""

    weights: Float[Array, "voxel mixture column node_"]
    """From the star's nodes, and a last node that always reads 1, to the likelihood's columns."""
    gram: Float[Array, "voxel draw mixture column column"]
    projection: Float[Array, "voxel draw mixture column"]
    energy: Float[Array, " voxel"]
    n_images: Float[Array, ""]
    """These four as in `likelihood.Sums`, at the draws."""
    shift: Float[Array, "voxel nuisance"]
    """Known means of the nuisances' coefficients."""
    draw_weights: Float[Array, "voxel draw"]
    mean_weights: Float[Array, "voxel draw"]
    contrast: Float[Array, "voxel form draw"]
    """These three as in `Draws`."""
    importance: Float[Array, " voxel"]
    """Sums to 1."""
    variance: Float[Array, ""]
    """Of the noise of one pixel [pixel^2]."""
    dof: Float[Array, ""]
    """Degrees of freedom behind it."""
    discrepancy: Float[Array, ""]
    """Variance of the model's error per image [fraction of M0, squared]."""


class Answer(eqx.Module):
    """Expected gains [nat], mean over the voxels asked."""

    candidates: Float[Array, " candidate"]
    scheduled: Float[Array, ""]
    """Of the schedule's next image."""
    remaining: Float[Array, ""]
    """Of the rest of the schedule together: what stopping would forgo."""
    beyond: Float[Array, " nuisance"]
    """Not a gain: how far beyond its range the images so far put each nuisance, in standard deviations of what they tell of it; median over the
    voxels asked, of all regions together. Negative: not beyond. Of use for those that `nuisance.told` keeps."""


class Quota(NamedTuple):
    """Diversity: how often alike pulses may be played among the latest ones. It keeps redundancy to notice model error by."""

    window: int = 8
    most: int = 3
    """Repetitions of the window, the candidate's included, that may lie in one neighbourhood."""
    radius: float = 0.15
    """Two pulses are alike if no coordinate (each 0 .. 1 over its range) differs by more."""


def stratify(region: Int[np.ndarray, " voxel"], values: Float[np.ndarray, "voxel 2"], n: int) -> Int[np.ndarray, " sample"]:
    """`n` of the voxels of one region (indices into `values`), spread evenly over the first parameter and, within it, the second."""
    if len(region) <= n or n == 0:
        return region[:n]
    strata = np.array_split(region[np.argsort(values[region, 0], kind="stable")], max(1, round(n**0.5)))
    ordered = np.concatenate([stratum[np.argsort(values[stratum, 1], kind="stable")] for stratum in strata])
    return ordered[((np.arange(n) + 0.5) * len(ordered) / n).astype(int)]


def share_out(sizes: list[int], n: int) -> list[int]:
    """At most `n` sampled voxels over regions: one each, so that none starves; of the rest one half equally, the other by size.

    Never more than a region has; with more regions than `n` the last ones get none.
    """
    served = sizes[:n]
    rest, total = n - len(served), sum(served)
    shares = [min(size, 1 + int(0.5 * rest * (1 / len(served) + size / total))) for size in served]
    return shares + [0] * (len(sizes) - len(served))


def draw(
    log_posterior: Float[np.ndarray, "voxel cell"],
    mean: Float[np.ndarray, "voxel 2"],
    covariance: Float[np.ndarray, "voxel 2 2"],
    box: Box,
    seed: int,
) -> Draws:
    """Cells of each voxel's posterior: by systematic sampling where it is wide, about its mean where it is narrow."""
    box = box.in_numpy()
    mass = np.exp(log_posterior - log_posterior.max(axis=1, keepdims=True)) * _cell_areas(box)
    mass /= mass.sum(axis=1, keepdims=True)
    wide = _systematic(mass, np.random.default_rng(seed).uniform(size=len(mass)))
    centre, in_steps = _in_steps(mean, covariance, box)
    narrow = _about(centre, in_steps, box.n_points)
    is_narrow = np.linalg.eigvalsh(in_steps)[:, 0] < (NARROW * (min(box.n_points) - 1)) ** 2
    return Draws(*(np.where(is_narrow.reshape(-1, *(1,) * (a.ndim - 1)), a, b) for a, b in zip(narrow, wide, strict=True)))


def rows(cells: Int[np.ndarray, "voxel draw"], n_points: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """From the coarse points along f, and along k, to lattice cells: (voxel, draw, point) each."""
    along = (lattice.upsampling(n, predictive.N_POINTS) for n in n_points)
    f, k = (each[place] for each, place in zip(along, np.divmod(cells, n_points[1]), strict=True))
    return f, k


def seed_of(name: str, n_images: int) -> int:
    """Random choices depend on the scan and the image number, never on session or clock."""
    return zlib.crc32(f"{name}/{n_images}".encode())


def answer(
    question: Question,
    candidates: Float[Array, "voxel draw node image"],
    rest: Float[Array, "voxel draw node image"],
    counts: Float[Array, " image"],
) -> Answer:
    """What every candidate, and the rest of the schedule, is expected to tell.

    Parameters
    ----------
    candidates, rest
        Signals at the draws, by `predictive.at_draws`. That is compiled apart: in one piece with what follows XLA lays its product out
        for the reader, and takes twice as long.
    counts
        1 for images of the schedule's rest, 0 for what merely fills the array.
    """
    fit = fitted(question)
    given = jax.lax.optimization_barrier(condition(question, fit))
    draws = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (question.draw_weights, question.contrast))
    importance, counts = question.importance.astype(jnp.float32), counts.astype(jnp.float32)
    read_rest = _read_few(rest, given)
    return Answer(
        importance @ gain(_read(candidates, given), given, *draws),
        importance @ gain((read_rest[0][..., :1], [each[..., :1] for each in read_rest[1]]), given, *draws)[:, 0] * counts[0],
        importance @ joint_gain(read_rest, counts, given, *draws),
        jnp.nanmedian(jnp.where(question.importance[:, None] > 0, overrun(question, fit), jnp.nan), axis=0),
    )


class Fitted(eqx.Module):
    """Amplitude, and amplitude times nuisances, at every draw of each voxel: least squares with the nuisances' prior; float64."""

    whitener: Float[Array, "voxel draw mixture column column"]
    """W with W A W' = 1, A the gram matrix with its ridge: their covariance is s^2 W' W."""
    projected: Float[Array, "voxel draw mixture column"]
    """W times the projection: they are W' of this."""
    implied: Float[Array, "voxel draw mixture"]
    """Square of the amplitude that a cell implies by itself."""
    variance: Float[Array, "voxel draw mixture"]
    """s^2 [pixel^2]."""
    centring: Float[Array, "voxel column column"]
    """From columns F, X to F + X shift, X."""


def fitted(question: Question) -> Fitted:
    """From the running sums at the draws."""
    n_columns = question.gram.shape[-1]
    centring = jnp.eye(n_columns) + jnp.pad(question.shift[:, :, None], ((0, 0), (1, 0), (0, n_columns - 1)))  # F + X shift, X
    gram = jnp.einsum("vic,vkmij,vjd->vkmcd", centring, question.gram, centring)
    projection = jnp.einsum("vic,vkmi->vkmc", centring, question.projection)
    implied = jnp.maximum(projection[..., 0] / gram[..., 0, 0], 1e-9) ** 2
    variance = question.variance + question.discrepancy * implied
    is_nuisance = jnp.arange(n_columns) > 0
    ridge = variance / implied
    added = jnp.where(is_nuisance, ridge[..., None], 1e-9 * gram[..., 0, 0][..., None])
    whitener = whiten(gram + added[..., None] * jnp.eye(n_columns))
    return Fitted(whitener, jnp.einsum("vkmec,vkmc->vkme", whitener, projection), implied, variance, centring)


def condition(question: Question, fit: Fitted) -> Conditional:
    """What the images so far say of amplitude and nuisances; mixture components by their evidence."""
    to_nodes = jnp.einsum("vic,vmin->vmnc", fit.centring, question.weights)
    root = jnp.einsum("vmnc,vkmec->vkmne", to_nodes, fit.whitener)
    return _mixed(_share(question, fit), jnp.einsum("vkmne,vkme->vkmn", root, fit.projected), root, fit.variance)


def _share(question: Question, fit: Fitted) -> Float[Array, "voxel draw mixture"]:
    """The evidence of each component, as `likelihood.fit` has it; sums to 1."""
    n_nuisances = fit.whitener.shape[-1] - 1
    residual = jnp.maximum(question.energy[:, None, None] - jnp.sum(fit.projected**2, axis=-1), 0.0)
    occam = log_determinant(fit.whitener) + jnp.log(fit.implied)
    occam = occam - n_nuisances * jnp.log(fit.variance / fit.implied)
    excess = jnp.log1p(residual / (question.dof * fit.variance))
    n = question.n_images - 1
    return jax.nn.softmax(-0.5 * occam - 0.5 * n * jnp.log(fit.variance) - 0.5 * (question.dof + n) * excess, axis=-1)


def overrun(question: Question, fit: Fitted) -> Float[Array, "voxel nuisance"]:
    """As in `Answer`.

    The posterior of a coefficient (mean m, variance V, over all draws) is its prior N(0, 1) times what the images tell of it, which puts it at
    m / (1 - V) with variance V / (1 - V). Images that leave more than `UNREAD` of the prior's variance tell too little.
    """
    joint = jnp.einsum("vkmec,vkme->vkmc", fit.whitener, fit.projected)
    amplitude, scaled = joint[..., :1], joint[..., 1:]
    coefficient = scaled / amplitude
    off = fit.whitener[..., 1:] - coefficient[..., None, :] * fit.whitener[..., :1]  # of the ratio, to first order
    spread = fit.variance[..., None] * jnp.sum(off**2, axis=-2) / amplitude**2
    share = _share(question, fit)[..., None]
    centre = jnp.sum(share * coefficient, axis=2)
    within = jnp.sum(share * (spread + (coefficient - centre[:, :, None]) ** 2), axis=2)
    mean = jnp.einsum("vk,vkc->vc", question.mean_weights, centre)
    variance = jnp.einsum("vk,vkc->vc", question.draw_weights, within)
    variance = variance + jnp.sum(jnp.einsum("vhk,vkc->vhc", question.contrast, centre) ** 2, axis=1)
    told = jnp.maximum(1 - variance, 1 - UNREAD)
    beyond = (jnp.abs(mean / told) - END_OF_RANGE) / jnp.sqrt(variance / told)
    return jnp.where(variance < UNREAD, beyond, -jnp.inf)


def _mixed(share: Array, mean: Array, root: Array, variance: Array) -> Conditional:
    """One Gaussian with the mixture's mean and variance; (voxel, draw, mixture, ..) in."""
    centre = jnp.einsum("vkm,vkmn->vkn", share, mean)
    total = jnp.einsum("vkm,vkm->vk", share, variance)
    within = root * jnp.sqrt(share * variance / total[..., None])[..., None, None]
    roots = jnp.moveaxis(within, 2, 3).reshape(*centre.shape, -1)
    if share.shape[2] > 1:
        between = (mean - centre[:, :, None]) * jnp.sqrt(share / total[..., None])[..., None]
        roots = jnp.concatenate([roots, jnp.moveaxis(between, 2, 3)], axis=-1)
    return Conditional(*(each.astype(jnp.float32) for each in (centre, roots, total)))


Read = tuple[Float[Array, "voxel draw image"], list[Float[Array, "voxel draw image"]]]
"""What images read on average, and how that varies with amplitude and each nuisance, in units of s."""


def gain(
    read: Read, given: Conditional, weights: Float[Array, "voxel draw"], contrast: Float[Array, "voxel form draw"]
) -> Float[Array, "voxel image"]:
    """Expected gain of each of several images, one instead of the other [nat]."""
    mean, along = read
    blur = jnp.einsum("vk,vki->vi", given.variance * weights, 1 + sum(each**2 for each in along))
    spread = jnp.sum(jnp.einsum("vhk,vki->vhi", contrast, mean) ** 2, axis=1)
    return 0.5 * jnp.log1p(spread / blur)


def joint_gain(
    read: Read, counts: Float[Array, " image"], given: Conditional, weights: Float[Array, "voxel draw"], contrast: Float[Array, "voxel form draw"]
) -> Float[Array, " voxel"]:
    """Expected gain of several images together [nat]; those with counts 0 are left out.

    1/2 log det(1 + C^-1 Cov_d[m_d]) with C = Mean_d[s^2 (1 + X root_d root_d' X')]
    """
    mean, along = read
    share = given.variance * weights
    varied = jnp.stack(along, axis=-1) * counts[:, None] * jnp.sqrt(share)[..., None, None]
    blur = jnp.einsum("vkie,vkje->vij", varied, varied) + jnp.sum(share, axis=1)[:, None, None] * jnp.eye(len(counts), dtype=varied.dtype)
    spread = jnp.einsum("vki,vhk->vih", mean * counts, contrast)
    half = whiten(blur) @ spread
    return 0.5 * log_determinant(whiten(jnp.eye(half.shape[2], dtype=half.dtype) + jnp.einsum("vih,vig->vhg", half, half)))


def _read(signals: Float[Array, "voxel draw node image"], given: Conditional) -> Read:
    """Of many images: with the loop over nodes written out, eight times faster than a product of many small matrices."""

    def read(weights: Array) -> Array:
        n_nodes = signals.shape[2]
        return sum((signals[:, :, n] * weights[:, :, n, None] for n in range(n_nodes)), weights[:, :, n_nodes, None])

    return read(given.mean), [read(given.root[..., c]) for c in range(given.root.shape[-1])]


def _read_few(signals: Float[Array, "voxel draw node image"], given: Conditional) -> Read:
    """The same for few images: compiles in no time."""
    both = jnp.concatenate([given.mean[..., None], given.root], axis=-1)
    read = jnp.swapaxes(both[:, :, :-1], 2, 3) @ signals + both[:, :, -1, :, None]
    return read[:, :, 0], [read[:, :, 1 + c] for c in range(given.root.shape[-1])]


def barred(
    quota: Quota, candidates: Float[np.ndarray, "candidate coordinate"], latest: Float[np.ndarray, "played coordinate"]
) -> Bool[np.ndarray, " candidate"]:
    """Candidates whose neighbourhood has had its share of the latest repetitions."""
    recent = latest[-(quota.window - 1) :]
    alike = np.all(np.abs(candidates[:, None] - recent) <= quota.radius, axis=-1)
    return np.sum(alike, axis=1) >= quota.most


def _cell_areas(box: Box) -> Float[np.ndarray, " cell"]:
    """Up to a constant; half cells at the edges."""
    sides = []
    for n in box.n_points:
        edges = np.concatenate([[0.0], np.arange(n - 1) + 0.5, [n - 1.0]]) ** 2
        sides.append(np.diff(edges))
    return (sides[0][:, None] * sides[1]).reshape(-1)


def _systematic(mass: Float[np.ndarray, "voxel cell"], start: Float[np.ndarray, " voxel"]) -> Draws:
    cumulated = np.cumsum(mass, axis=1)
    places = (np.arange(N_DRAWS) + start[:, None]) / N_DRAWS * cumulated[:, -1:]
    cells = np.stack([np.searchsorted(row, place) for row, place in zip(cumulated, places, strict=True)])
    centring = (np.eye(N_DRAWS) - 1 / N_DRAWS) / np.sqrt(N_DRAWS)
    uniform = np.full(cells.shape, 1 / N_DRAWS)
    return Draws(np.minimum(cells, mass.shape[1] - 1), uniform, uniform, np.broadcast_to(centring, (len(mass), N_DRAWS, N_DRAWS)))


def _about(centre: Float[np.ndarray, "voxel 2"], in_steps: Float[np.ndarray, "voxel 2 2"], n_points: tuple[int, int]) -> Draws:
    """The cell nearest to the mean and its four neighbours, for the gradient: along it one moves on from the cell to the mean.

    The contrast is a root of the covariance times the gradient.
    """
    n = np.array(n_points)
    nearest = np.clip(np.rint(centre), 1, n - 2).astype(int)
    root = np.linalg.cholesky(in_steps + 1e-9 * np.eye(2))
    moves = np.array([(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)] + [(0, 0)] * (N_DRAWS - 5))
    at = nearest[:, None] + moves
    gradient = np.zeros((2, N_DRAWS))
    gradient[0, 1:3] = gradient[1, 3:5] = (0.5, -0.5)
    contrast = np.zeros((len(centre), N_DRAWS, N_DRAWS))
    contrast[:, :2] = np.swapaxes(root, 1, 2) @ gradient
    weights = np.zeros((len(centre), N_DRAWS))
    weights[:, 0] = 1.0
    mean_weights = weights + np.clip(centre - nearest, -1, 1) @ gradient
    return Draws(at[:, :, 0] * n[1] + at[:, :, 1], weights, mean_weights, contrast)


def _in_steps(
    mean: Float[np.ndarray, "voxel 2"], covariance: Float[np.ndarray, "voxel 2 2"], box: Box
) -> tuple[Float[np.ndarray, "voxel 2"], Float[np.ndarray, "voxel 2 2"]]:
    """Mean and covariance in lattice steps."""
    centre = np.stack([box.position(axis, mean[:, axis].astype(float)) for axis in (0, 1)], axis=1)
    slope = np.stack([box.slope(axis, np.maximum(centre[:, axis], 0.5)) for axis in (0, 1)], axis=1)
    return centre, np.asarray(covariance, float) / slope[:, :, None] / slope[:, None, :]
