"""The encoder: a physics-structured variational posterior for every voxel of a volume, from a state of fixed size, O(1) per image.

State. Each image adds the outer product of its coefficients in the scan's signal basis (core.signal_basis) and their product with the
measured signal: sufficient statistics of every pulse at once, sums, hence independent of the order of the images and of which are missing.
Pulse, nuisances and the voxel's auxiliaries enter through the coefficients, noise and its degrees of freedom when the posterior is asked for.

Decoding, in the coordinate z where the prior is N(0, 1) (core.coordinate), in stages:

1. the marginal likelihood (that of core.likelihood, with the voxel's own amplitude) at 8 x 8 anchors or fewer, raised to the powers
   1, 1/4, .. 1/4096; mean and covariance under each feed a small perceptron that gives a first Gaussian;
2. several times, four unless training says otherwise: the same likelihood at nine points of the Gaussian found so far. A Newton step through
   them, corrected by a perceptron that sees how far the nine values are from those of a Gaussian, gives the next one;
3. the last one is widened by a factor for each number of images, calibrated on simulated truths: a Gaussian of the very mean and
   covariance of a curved or box-limited posterior holds fewer of them in its 95 % region than 95 %.

Weights are shared by all voxels and nothing depends on a neighbour.

Voxels are the last axis of all that is computed on the way, and sums over functions are written out: a CPU then works on eight voxels at
once and keeps a sum in a register. What several others read is kept by a barrier; compile with `core.code_generation.with_barriers`.

What lost, measured on the built-in scans: see docs/train-an-encoder.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache, reduce
from math import prod
from operator import add

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Float, Int, PRNGKeyArray

from scansteer.core import coordinate as coordinates
from scansteer.core import signal_basis
from scansteer.core.coordinate import Coordinate
from scansteer.core.likelihood import LEAST_AMPLITUDE, Noise, held
from scansteer.core.signal_basis import Basis, Table

N_ANCHORS = 8
"""Anchors per parameter, even along the lattice's axes, unless training says otherwise."""
TEMPERATURES = tuple(4.0**power for power in range(7))
STENCIL = np.array([(0, 0), (1.5, 0), (-1.5, 0), (0, 1.5), (0, -1.5), (1.1, 1.1), (-1.1, -1.1), (1.1, -1.1), (-1.1, 1.1)])
"""Points of a refinement, in standard deviations of the Gaussian found so far."""
N_WIDENED = 32
"""Numbers of images that have a factor of their own in `Encoder.widening`."""
WIDTHS = (64, 48)
"""Hidden units of the two layers of the first and of each further stage."""


class State(eqx.Module):
    """Sufficient statistics of the images so far; `group` is 1 where all voxels share their coefficients, else voxel. float64."""

    gram: Float[Array, "pair group"]
    """One of each two equal entries, in the order of `pairs`."""
    projection: Float[Array, "function voxel"]
    energy: Float[Array, " voxel"]
    """Sum of squared signals [pixel^2]."""
    n_images: Float[Array, "*voxel"]


class Gaussian(eqx.Module):
    """A Gaussian in z for every voxel; float32."""

    mean: Float[Array, "voxel 2"]
    root: Float[Array, "voxel 3"]
    """Lower triangle C11, C21, C22 of C with C C' the covariance."""


class Fit(eqx.Module):
    """The marginal likelihood, and the residual and amplitude that belong to it, at some points; float32."""

    log_likelihood: Float[Array, "point voxel"]
    residual: Float[Array, "point voxel"]
    """Residual sum of squares, nuisances at their best (ridge penalty included) [pixel^2]."""
    amplitude: Float[Array, "point voxel"]
    """[pixel units per M0]"""


class Points(eqx.Module):
    """Where a refinement has looked, and what it saw."""

    z: Float[Array, "2 point voxel"]
    log_likelihood: Float[Array, "point voxel"]


class Expansion(eqx.Module):
    """The images less their best mean signal at one place per voxel, so that float32 suffices for what is asked about other places."""

    centre: Float[Array, "mean_function voxel"]
    """The mean signal's functions there."""
    amplitude: Float[Array, " voxel"]
    along: Float[Array, "function voxel"]
    """Gram matrix times the centre."""
    left: Float[Array, "function voxel"]
    """Projection of what is left of the images."""
    energy: Float[Array, " voxel"]
    """Sum of squares of what is left [pixel^2]."""
    gram: Float[Array, "pair group"]
    n_images: Float[Array, "*voxel"]


class Stage(eqx.Module):
    """A perceptron with a linear shortcut, the same for every voxel."""

    perceptron: eqx.nn.MLP
    shortcut: eqx.nn.Linear

    def __init__(self, n_in: int, width: int, *, key: PRNGKeyArray) -> None:
        first, second = jax.random.split(key)
        self.perceptron = _scaled(eqx.nn.MLP(n_in, 5, width, 2, jax.nn.silu, key=first, dtype=jnp.float32))
        self.shortcut = jax.tree.map(lambda leaf: 0.1 * leaf, eqx.nn.Linear(n_in, 5, key=second, dtype=jnp.float32))

    def __call__(self, features: Float[Array, "feature voxel"]) -> Float[Array, "5 voxel"]:
        *hidden, last = self.perceptron.layers
        x = features
        for layer in hidden:
            x = jax.nn.silu(_affine(layer, x))
        return _affine(last, x) + _affine(self.shortcut, features)


class Encoder(eqx.Module):
    """What is trained, and the basis and coordinate that it was trained for."""

    first: Stage
    refine: tuple[Stage, ...]
    basis: Basis
    coordinate: Coordinate
    widening: Float[Array, " image"]
    """Factors on the last stage's deviations after 1, 2, .. images, the last of them also after more; 1 before calibration."""
    n_anchors: int = eqx.field(static=True, default=N_ANCHORS)
    """Per parameter."""


class Plan(eqx.Module):
    """What follows from an encoder's basis and coordinate and is looked up at every image."""

    table: Table
    mean_table: Table
    """Of the mean signal's functions alone."""
    anchors: tuple[Float[Array, "anchor function"], ...]
    """Functions at the anchors, block by block."""
    products: dict[tuple[int, int], Float[Array, "anchor pair"]]
    """Of the functions of two blocks there: times the gram matrix's entries, and summed, its quadratic form."""
    places: Float[Array, "anchor 2"]
    """z of the anchors."""
    log_mass: Float[Array, " anchor"]
    """Log of the prior mass that an anchor stands for."""


def make(key: PRNGKeyArray, basis: Basis, coordinate: Coordinate, n_refinements: int, n_anchors: int = N_ANCHORS) -> Encoder:
    """An untrained encoder: its refinements are plain Newton steps."""
    keys = jax.random.split(key, 1 + n_refinements)
    n_first = 5 * len(TEMPERATURES) + N_CONTEXT
    n_refine = len(STENCIL) - 1 + 5 + 5 + N_CONTEXT
    first = Stage(n_first, WIDTHS[0], key=keys[0])
    refine = tuple(Stage(n_refine, WIDTHS[1], key=each) for each in keys[1:])
    return Encoder(first, refine, basis, coordinate, jnp.ones(N_WIDENED, jnp.float32), n_anchors)


def plan(encoder: Encoder) -> Plan:
    """Tabulate the basis."""
    edges = np.linspace(0.0, 1.0, 2 * encoder.n_anchors + 1)  # and, every other one, the centres between them
    places = edges[1::2]
    anchors = encoder.basis.at((places, places)).reshape(encoder.n_anchors**2, -1)
    z = np.asarray(_from_places(encoder.coordinate, edges))
    grid = np.stack(np.meshgrid(*z[:, 1::2], indexing="ij"), axis=-1).reshape(-1, 2)
    mass = np.diff(scipy.special.ndtr(z[:, ::2]), axis=1)
    single = jnp.float32
    first, second = pairs(encoder.basis.ranks)
    twice = _among_themselves(encoder.basis.ranks) & (first != second)
    products = anchors[:, first] * anchors[:, second] * (1 + twice)
    return Plan(
        signal_basis.tabulate(encoder.basis),
        signal_basis.tabulate(encoder.basis, encoder.basis.blocks[0]),
        tuple(jnp.asarray(anchors[:, block], single) for block in encoder.basis.blocks),
        {pair: jnp.asarray(products[:, rows], single) for pair, rows in _block_pairs(encoder.basis.ranks).items()},
        jnp.asarray(grid, single),
        jnp.asarray(np.log(np.outer(*mass)).reshape(-1), single),
    )


@lru_cache
def pairs(ranks: tuple[int, ...]) -> tuple[Int[np.ndarray, " pair"], Int[np.ndarray, " pair"]]:
    """The two functions of every entry of a packed gram matrix: block by block, so that each quadratic form has its entries side by side."""
    edges = np.cumsum([0, *ranks])
    first, second = [], []
    for i in range(len(ranks)):
        for j in range(i, len(ranks)):
            a, b = np.triu_indices(ranks[i]) if i == j else (each.reshape(-1) for each in np.indices((ranks[i], ranks[j])))
            first.append(edges[i] + a)
            second.append(edges[j] + b)
    return np.concatenate(first), np.concatenate(second)


def init(n_voxels: int, n_groups: int, n_functions: int) -> State:
    """No image yet."""
    return State(
        gram=jnp.zeros((n_functions * (n_functions + 1) // 2, n_groups), jnp.float64),
        projection=jnp.zeros((n_functions, n_voxels), jnp.float64),
        energy=jnp.zeros(n_voxels, jnp.float64),
        n_images=jnp.zeros((), jnp.float64),
    )


def update(basis: Basis, state: State, coefficients: Float[Array, "function group"], signal: Float[Array, " voxel"]) -> State:
    """Add one image: its coefficients in the basis and the signal that was measured [pixel units]."""
    coefficients = coefficients.astype(jnp.float64)
    first, second = pairs(basis.ranks)
    return State(
        gram=state.gram + coefficients[first] * coefficients[second],
        projection=state.projection + coefficients * signal,
        energy=state.energy + signal**2,
        n_images=state.n_images + 1,
    )


def stages(encoder: Encoder, plan: Plan, state: State, noise: Noise) -> tuple[Gaussian, ...]:
    """The Gaussian after each stage; for training."""
    context = _context(state, noise)
    posterior = first_guess(encoder, anchor_features(encoder, plan, state, noise), context)
    expansion = expand(encoder, plan, state, jax.lax.stop_gradient(posterior.mean))
    result = [posterior]
    for stage in encoder.refine:
        posterior, _ = refine(stage, encoder, plan, expansion, noise, context, posterior)
        result.append(posterior)
    return tuple(result)


def infer(encoder: Encoder, plan: Plan, state: State, noise: Noise) -> tuple[Gaussian, Expansion, Points]:
    """The posterior of every voxel, and the points that the last refinement looked at.

    Refinements run in a loop, for written out they take four times as long to compile.
    """
    context = _context(state, noise)
    posterior = first_guess(encoder, anchor_features(encoder, plan, state, noise), context)
    posterior = _once(posterior)
    expansion = _once(expand(encoder, plan, state, posterior.mean))
    arrays, rest = zip(*(eqx.partition(stage, eqx.is_array) for stage in encoder.refine), strict=True)

    def again(before: tuple[Gaussian, Points], weights: Stage) -> tuple[tuple[Gaussian, Points], None]:
        return refine(eqx.combine(weights, rest[0]), encoder, plan, expansion, noise, context, before[0]), None

    start = posterior, _no_points(len(posterior.mean))
    posterior, points = jax.lax.scan(again, start, jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays))[0]
    return Gaussian(posterior.mean, posterior.root * _widening(encoder, state.n_images)[..., None]), expansion, points


def _widening(encoder: Encoder, n_images: Float[Array, "*voxel"]) -> Float[Array, "*voxel"]:
    return encoder.widening[jnp.clip(n_images.astype(jnp.int32) - 1, 0, N_WIDENED - 1)]


def first_guess(encoder: Encoder, features: Float[Array, "feature voxel"], context: Float[Array, "context voxel"]) -> Gaussian:
    """Stage 1."""
    out = _once(encoder.first(_once(jnp.concatenate([features, context]))))
    c11, c22 = (jnp.exp(jnp.clip(out[i], -7, 2)) for i in (2, 4))
    # the off-diagonal scales with the second deviation: the correlation is what the perceptron sees
    return Gaussian(_held(out[:2].T), jnp.stack([c11, out[3] * c22, c22], axis=1))


def refine(
    stage: Stage, encoder: Encoder, plan: Plan, expansion: Expansion, noise: Noise, context: Float[Array, "context voxel"], before: Gaussian
) -> tuple[Gaussian, Points]:
    """One further stage: nine points, a Newton step, a correction."""
    before = jax.lax.stop_gradient(before)  # each stage learns with its own loss
    mean, root = before.mean.T, before.root.T
    z = _once(jnp.clip(coordinates.points(before.mean, before.root, STENCIL), -4.5, 4.5))
    found = Points(z, _once(evaluate(encoder, plan, expansion, noise, z).log_likelihood))
    log_posterior = found.log_likelihood - 0.5 * (z[0] ** 2 + z[1] ** 2)
    height = log_posterior - log_posterior[:1]
    along = (z[0] - mean[0]) / root[0]
    across = (z[1] - mean[1] - root[1] * along) / root[2]
    distance = along**2 + across**2
    step, new = newton(height)
    # how far from a Gaussian of the present width the nine values are
    excess = height[1:] + 0.5 * (distance[1:] - distance[:1])
    now = jnp.stack([*mean, jnp.log(root[0]), jnp.log(root[2]), root[1] / root[2]])
    after = jnp.stack([*step, jnp.log(new[0]), jnp.log(new[2]), new[1]])
    out = _once(stage(_once(jnp.concatenate([_squashed(excess), now, after, context]))))
    step = step + out[:2]
    scale = jnp.exp(jnp.clip(out[2:4], -2.0, 2.0))
    c11, c22 = new[0] * scale[0], new[2] * scale[1]
    c21 = new[1] + out[4] * c22
    moved = coordinates.displaced(before.mean, before.root, step)
    return Gaussian(_held(moved.T), jnp.stack([root[0] * c11, root[1] * c11 + root[2] * c21, root[2] * c22], axis=1)), found


def expand(encoder: Encoder, plan: Plan, state: State, z: Float[Array, "voxel 2"]) -> Expansion:
    """Take the best mean signal at one place per voxel away from its images, in float64."""
    ranks, single = encoder.basis.ranks, jnp.float32
    centre = _once(plan.mean_table(*(encoder.coordinate.place(axis, z[:, axis]) for axis in (0, 1))))
    exact, entry = centre.astype(jnp.float64), _entries(ranks)
    along = jnp.stack([_total(state.gram[entry[i, j]] * exact[i] for i in range(ranks[0])) for j in range(sum(ranks))])
    along = _once(jnp.broadcast_to(along, state.projection.shape))
    projection = state.projection[: ranks[0]]
    amplitude = _product(projection, exact) / _product(along[: ranks[0]], exact)
    left = state.projection - amplitude * along
    energy = state.energy - amplitude * _product(exact, projection + left[: ranks[0]])
    parts = amplitude, along, left, energy, state.gram, state.n_images
    return Expansion(centre, *(each.astype(single) for each in parts))  # pyright: ignore[reportCallIssue] - in the order of the fields


def evaluate(encoder: Encoder, plan: Plan, expansion: Expansion, noise: Noise, z: Float[Array, "2 point voxel"]) -> Fit:
    """The marginal likelihood at any points."""
    places = _once([encoder.coordinate.place(axis, z[axis]) for axis in (0, 1)])
    functions = _once(plan.table(*places))
    g, p, energy = _once(_forms(encoder.basis, expansion, functions))
    return _collapse(g, p, energy, expansion.amplitude, noise, expansion.n_images)


def _forms(
    basis: Basis, expansion: Expansion, functions: Float[Array, "function point voxel"]
) -> tuple[dict[tuple[int, int], Array], list[Array], Array]:
    """Gram matrix and projections of the columns, and the energy, at every point; all of the images less their best signal at the centre."""
    a, gram = expansion.amplitude, (expansion.gram, _entries(basis.ranks))
    blocks = [range(block.start, block.stop) for block in basis.blocks]
    mean = blocks[0]
    difference = _once(functions[: len(mean)] - expansion.centre[:, None])
    square, shift = _once((_square(gram, difference, mean), _sum(expansion.along, difference, mean)))
    # of each column with what the mean signal has changed by; the mean signal itself is the centre and that change
    moved = [square + shift, *(_once(_cross(gram, functions, members, difference, mean)) for members in blocks[1:])]
    g = {(0, j): _sum(expansion.along, functions, members) + moved[j] for j, members in enumerate(blocks)}
    p = [_sum(expansion.left, functions, members) - a * moved[j] for j, members in enumerate(blocks)]
    for i, rows in enumerate(blocks[1:], 1):
        g[i, i] = _square(gram, functions, rows)
        g |= {(i, j): _cross(gram, functions, rows, functions, blocks[j]) for j in range(i + 1, len(blocks))}
    energy = expansion.energy + a * (a * square - 2 * _sum(expansion.left, difference, mean))
    return g, p, energy


Packed = tuple[Float[Array, "pair group"], Int[np.ndarray, "function function"]]
"""A packed gram matrix, and where two functions' entry lies in it."""


def _square(gram: Packed, x: Array, members: range) -> Array:
    """x' G x over some functions, each pair of equal entries once."""
    packed, entry = gram
    return 2 * _total(
        x[m] * _total([0.5 * packed[entry[m, m]] * x[m], *(packed[entry[m, n]] * x[n] for n in members if n > m)]) for m in members
    )


def _cross(gram: Packed, x: Array, rows: range, y: Array, columns: range) -> Array:
    """x' G y."""
    packed, entry = gram
    return _total(x[m] * _total(packed[entry[m, n]] * y[n] for n in columns) for m in rows)


def _sum(weights: Float[Array, "function voxel"], x: Float[Array, "function point voxel"], members: range) -> Float[Array, "point voxel"]:
    return _total(weights[m] * x[m] for m in members)


def anchor_features(encoder: Encoder, plan: Plan, state: State, noise: Noise) -> Float[Array, "feature voxel"]:
    """Means, deviations and correlation under the likelihood raised to each power, on the anchors."""
    single = jnp.float32
    gram, projection = state.gram.astype(single), state.projection.astype(single)
    p = [anchors @ projection[block] for anchors, block in zip(plan.anchors, encoder.basis.blocks, strict=True)]
    g = {pair: plan.products[pair] @ gram[rows] for pair, rows in _block_pairs(encoder.basis.ranks).items()}
    g, p = _once((g, p))
    fit = _collapse(g, p, state.energy.astype(single), jnp.zeros((), single), noise, state.n_images)
    height = _once(fit.log_likelihood)
    return _tempered(_once(height - jnp.max(height, axis=0)), plan)


def _tempered(height: Float[Array, "anchor voxel"], plan: Plan) -> Float[Array, "feature voxel"]:
    """Mean, logarithms of the deviations and correlation under each temperature."""
    z = plan.places.T
    moments = jnp.stack([jnp.ones_like(z[0]), *z, *z**2, z[0] * z[1]]) * jnp.exp(plan.log_mass)
    weights = [jnp.exp(height / TEMPERATURES[-1])]
    for _ in TEMPERATURES[1:]:  # each the fourth power of the one before, which is cheaper than its exponential; the highest loses 5e-4
        weights.append(_once(jnp.square(jnp.square(weights[-1]))))
    each = jnp.stack(weights[::-1], axis=1).reshape(len(height), -1)
    total, m1, m2, m11, m22, m12 = _once((moments @ _once(each)).reshape(6, len(weights), -1))
    m1, m2 = m1 / total, m2 / total
    v1, v2 = jnp.maximum(m11 / total - m1**2, 1e-5), jnp.maximum(m22 / total - m2**2, 1e-5)
    correlation = jnp.clip((m12 / total - m1 * m2) / jnp.sqrt(v1 * v2), -1, 1)
    each = _once((m1, m2, 0.5 * jnp.log(v1), 0.5 * jnp.log(v2), correlation))
    return jnp.stack(each, axis=1).reshape(-1, height.shape[-1])


def _collapse(
    g: dict[tuple[int, int], Array], p: list[Array], energy: Array, base: Array, noise: Noise, n: Float[Array, "*voxel"]
) -> Fit:
    """Integrate nuisances, amplitude and noise at every point; formulae as in core.likelihood. Leaves (point, voxel).

    The amplitude is `base` plus what is left to fit; `p` and `energy` are of the images less `base` times the mean signal.
    """
    single = jnp.float32
    sigma, dof, tau, n = (jnp.asarray(each, single) for each in (noise.sigma, noise.dof, noise.discrepancy, n))
    count = len(p)
    implied = jnp.maximum(base + p[0] / g[0, 0], _TINY) ** 2
    variance = sigma**2 + tau**2 * implied
    ridge, per_ridge = variance / implied, implied / variance
    a = {(i, j): g[min(i, j), max(i, j)] for i in range(count) for j in range(count)}
    rhs, left, logs = list(p), energy, []
    for j in range(count - 1, 0, -1):
        pivot = jnp.maximum(a[j, j], 0.0) + ridge  # where hardly any noise is left, what it is short of rounding may be below zero
        inverse = 1 / pivot  # once: a division takes as long as ten products
        logs.append(pivot * per_ridge)
        left = left - rhs[j] ** 2 * inverse
        for i in range(j):
            factor = a[i, j] * inverse
            rhs[i] = rhs[i] - factor * rhs[j]
            for k in range(i, j):
                a[i, k] = a[i, k] - factor * a[k, j]
    power = jnp.maximum(a[0, 0], 1e-12)
    step = rhs[0] / power
    amplitude, excess = held(base + step, power, LEAST_AMPLITUDE * jnp.sqrt(implied))
    # nuisances fit what `base` times their columns leaves out as well: they were projected out of both sides alike
    residual = jnp.maximum(left - rhs[0] * step, 0.0) + excess
    # two factors to a logarithm: more might overflow
    logs = [*logs, power * amplitude**2]
    log_occam = sum(jnp.log(prod(logs[i : i + 2])) for i in range(0, len(logs), 2))
    log_likelihood = (
        -0.5 * log_occam - 0.5 * (n - 1) * jnp.log(variance) - 0.5 * (dof + n - 1) * jnp.log1p(residual / (dof * variance))
    )
    return Fit(log_likelihood, residual, amplitude)


N_CONTEXT = 4
_TINY = 1e-9  # an implied amplitude that is not positive
_LONGEST_STEP = 4.0
_FLATTEST = 0.15


def _context(state: State, noise: Noise) -> Float[Array, "context voxel"]:
    """Number of images, degrees of freedom of the noise, signal over noise."""
    n = state.n_images
    level = 0.5 * jnp.log(jnp.maximum(state.energy, 1e-30) / (n * noise.sigma**2))
    each = (n / 15 - 1, jnp.log(n) - 2, jnp.log(jnp.clip(noise.dof, 1.0, 1e4)) / 3 - 2, level - 4)
    return jnp.stack([jnp.broadcast_to(one, level.shape) for one in each]).astype(jnp.float32)


def newton(h: Float[Array, "point voxel"]) -> tuple[Float[Array, "2 voxel"], Float[Array, "3 voxel"]]:
    """Step and root of the covariance, both in the stencil's units, from log densities at its points."""
    r, d = float(STENCIL[1, 0]), float(STENCIL[5, 0])
    g1, g2 = (h[1] - h[2]) / (2 * r), (h[3] - h[4]) / (2 * r)
    a11, a22 = -(h[1] + h[2] - 2 * h[0]) / r**2, -(h[3] + h[4] - 2 * h[0]) / r**2
    a12 = -(h[5] + h[6] - h[7] - h[8]) / (4 * d**2)
    smallest = 0.5 * (a11 + a22) - jnp.sqrt(0.25 * (a11 - a22) ** 2 + a12**2)
    lift = jnp.maximum(_FLATTEST - smallest, 0.0)
    a11, a22 = a11 + lift, a22 + lift
    determinant = a11 * a22 - a12**2
    step = jnp.stack([(a22 * g1 - a12 * g2) / determinant, (a11 * g2 - a12 * g1) / determinant])
    length = jnp.sqrt(step[0] ** 2 + step[1] ** 2)
    step = step * jnp.minimum(1.0, _LONGEST_STEP / jnp.maximum(length, 1e-9))
    c11 = jnp.sqrt(a22 / determinant)
    return _once((step, jnp.stack([c11, -a12 / determinant / c11, 1 / jnp.sqrt(a22)])))


def _held(mean: Float[Array, "voxel 2"]) -> Float[Array, "voxel 2"]:
    return jnp.clip(mean, -4.0, 4.0)


def _once(tree):
    """What has many readers is not computed anew for each of them."""
    return jax.lax.optimization_barrier(tree)


def _squashed(x: Array) -> Array:
    """arcsinh(x / 2); written out, it takes a third of the time of XLA's."""
    size = 0.5 * jnp.abs(x)
    return jnp.copysign(jnp.log(size + jnp.sqrt(size**2 + 1)), x)


def _affine(layer: eqx.nn.Linear, x: Float[Array, "feature voxel"]) -> Float[Array, "out voxel"]:
    return layer.weight @ x + layer.bias[:, None]  # pyright: ignore[reportOptionalSubscript] - all have one


def _total(terms: Iterable[Array]) -> Array:
    return reduce(add, terms)


def _product(a: Array, b: Array) -> Array:
    """Sum over the first axis of the products, written out."""
    return _total(each * other for each, other in zip(a, b, strict=True))


@lru_cache
def _entries(ranks: tuple[int, ...]) -> Int[np.ndarray, "function function"]:
    """Where two functions' entry lies in the packed gram matrix."""
    first, second = pairs(ranks)
    entry = np.zeros((sum(ranks), sum(ranks)), int)
    entry[first, second] = entry[second, first] = np.arange(len(first))
    return entry


def _among_themselves(ranks: tuple[int, ...]) -> np.ndarray:
    """Whether a pair's functions are of one block."""
    block = np.repeat(np.arange(len(ranks)), ranks)
    first, second = pairs(ranks)
    return block[first] == block[second]


@lru_cache
def _block_pairs(ranks: tuple[int, ...]) -> dict[tuple[int, int], slice]:
    """Where the entries of two blocks lie in the packed gram matrix."""
    result, start = {}, 0
    for i, rank in enumerate(ranks):
        for j in range(i, len(ranks)):
            size = rank * (rank + 1) // 2 if i == j else rank * ranks[j]
            result[i, j] = slice(start, start + size)
            start += size
    return result


def _no_points(n_voxels: int) -> Points:
    """Before a refinement has looked."""
    shape = len(STENCIL), n_voxels
    return Points(jnp.zeros((2, *shape), jnp.float32), jnp.zeros(shape, jnp.float32))


def _scaled(perceptron: eqx.nn.MLP) -> eqx.nn.MLP:
    """Start from a small output."""
    return eqx.tree_at(lambda m: (m.layers[-1].weight, m.layers[-1].bias), perceptron, replace_fn=lambda leaf: 0.1 * leaf)


@eqx.filter_jit
def _from_places(coordinate: Coordinate, places: Float[Array, " place"]) -> Float[Array, "2 place"]:
    """z of both parameters; one program, for operation by operation it compiles for seconds."""
    return jnp.stack([coordinate.from_place(axis, places) for axis in (0, 1)])
