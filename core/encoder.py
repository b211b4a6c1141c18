"""The encoder: a physics-structured variational posterior for every voxel of a volume, from a state of fixed size, O(1) per image.

State. Each image adds the outer product of its coefficients in the scan's signal basis (core.signal_basis) and their product with the
measured signal: sufficient statistics of every pulse at once, sums, hence independent of the order of the images and of which are missing.
Pulse, nuisances and the voxel's auxiliaries enter through the coefficients, noise and its degrees of freedom when the posterior is asked for.

Decoding, in the coordinate z where the prior is N(0, 1) (core.coordinate), in stages:

1. the marginal likelihood (that of core.likelihood, with the voxel's own amplitude) at 8 x 8 anchors, raised to the powers
   1, 1/4, .. 1/4096; mean and covariance under each feed a small perceptron that gives a first Gaussian;
2. three times, and the third once more: the same likelihood at nine points of the Gaussian found so far. A Newton step through them, corrected by a
   perceptron that sees how far the nine values are from those of a Gaussian, gives the next one.

Weights are shared by all voxels and nothing depends on a neighbour.

What lost, measured on the built-in scans: see docs/train-an-encoder.md.
"""

from __future__ import annotations

from math import prod

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Float, PRNGKeyArray
from scipy.linalg import block_diag

from scansteer.core import coordinate as coordinates
from scansteer.core import signal_basis
from scansteer.core.coordinate import Coordinate
from scansteer.core.likelihood import Noise
from scansteer.core.signal_basis import Basis, Table

N_ANCHORS = 8
"""Anchors per parameter, even along the lattice's axes."""
TEMPERATURES = tuple(4.0**power for power in range(7))
STENCIL = np.array([(0, 0), (1.5, 0), (-1.5, 0), (0, 1.5), (0, -1.5), (1.1, 1.1), (-1.1, -1.1), (1.1, -1.1), (-1.1, 1.1)])
"""Points of a refinement, in standard deviations of the Gaussian found so far."""
N_REFINEMENTS = 3
"""Unless training says otherwise. Narrow posteriors, a fiftieth of the prior wide, need the third."""
WIDTHS = (64, 48)
"""Hidden units of the two layers of the first and of each further stage."""


class State(eqx.Module):
    """Sufficient statistics of the images so far; `group` is 1 where all voxels share their coefficients, else voxel. float64."""

    gram: Float[Array, "group function function"]
    projection: Float[Array, "voxel function"]
    energy: Float[Array, " voxel"]
    """Sum of squared signals [pixel^2]."""
    n_images: Float[Array, ""]


class Gaussian(eqx.Module):
    """A Gaussian in z for every voxel; float32."""

    mean: Float[Array, "voxel 2"]
    root: Float[Array, "voxel 3"]
    """Lower triangle C11, C21, C22 of C with C C' the covariance."""


class Fit(eqx.Module):
    """The marginal likelihood, and the residual and amplitude that belong to it, at some points; float32."""

    log_likelihood: Float[Array, "voxel point"]
    residual: Float[Array, "voxel point"]
    """Residual sum of squares, nuisances at their best (ridge penalty included) [pixel^2]."""
    amplitude: Float[Array, "voxel point"]
    """[pixel units per M0]"""


class Points(eqx.Module):
    """Where a refinement has looked, and what it saw."""

    z: Float[Array, "voxel point 2"]
    fit: Fit


class Expansion(eqx.Module):
    """The images less their best mean signal at one place per voxel, so that float32 suffices for what is asked about other places."""

    centre: Float[Array, "voxel mean_function"]
    """The mean signal's functions there."""
    amplitude: Float[Array, " voxel"]
    along: Float[Array, "voxel function"]
    """Gram matrix times the centre."""
    left: Float[Array, "voxel function"]
    """Projection of what is left of the images."""
    energy: Float[Array, " voxel"]
    """Sum of squares of what is left [pixel^2]."""
    gram: Float[Array, "group mean_function function"]
    """The part of the gram matrix that belongs to the mean signal, and that of the other columns among themselves."""
    gram_of_others: Float[Array, "group other other"]
    n_images: Float[Array, "*voxel"]


class Stage(eqx.Module):
    """A perceptron with a linear shortcut, for one voxel."""

    perceptron: eqx.nn.MLP
    shortcut: eqx.nn.Linear

    def __init__(self, n_in: int, width: int, *, key: PRNGKeyArray) -> None:
        first, second = jax.random.split(key)
        self.perceptron = _scaled(eqx.nn.MLP(n_in, 5, width, 2, jax.nn.silu, key=first, dtype=jnp.float32))
        self.shortcut = jax.tree.map(lambda leaf: 0.1 * leaf, eqx.nn.Linear(n_in, 5, key=second, dtype=jnp.float32))

    def __call__(self, features: Float[Array, " feature"]) -> Float[Array, " 5"]:
        return self.perceptron(features) + self.shortcut(features)


class Encoder(eqx.Module):
    """What is trained, and the basis and coordinate that it was trained for."""

    first: Stage
    refine: tuple[Stage, ...]
    basis: Basis
    coordinate: Coordinate
    repeats: int = eqx.field(static=True, default=0)
    """How often the last refinement is applied again, with the same weights: narrow posteriors are still on their way."""


class Plan(eqx.Module):
    """What follows from an encoder's basis and coordinate and is looked up at every image."""

    table: Table
    mean_table: Table
    """Of the mean signal's functions alone."""
    anchors: Float[Array, "anchor function"]
    places: Float[Array, "anchor 2"]
    """z of the anchors."""
    log_mass: Float[Array, " anchor"]
    """Log of the prior mass that an anchor stands for."""


def make(key: PRNGKeyArray, basis: Basis, coordinate: Coordinate, n_refinements: int = N_REFINEMENTS, repeats: int = 0) -> Encoder:
    """An untrained encoder: its refinements are plain Newton steps."""
    keys = jax.random.split(key, 1 + n_refinements)
    n_first = 5 * len(TEMPERATURES) + N_CONTEXT
    n_refine = len(STENCIL) - 1 + 5 + 5 + N_CONTEXT
    first = Stage(n_first, WIDTHS[0], key=keys[0])
    refine = tuple(Stage(n_refine, WIDTHS[1], key=each) for each in keys[1:])
    return Encoder(first, refine, basis, coordinate, repeats)


def plan(encoder: Encoder) -> Plan:
    """Tabulate the basis."""
    edges = np.linspace(0.0, 1.0, 2 * N_ANCHORS + 1)  # and, every other one, the centres between them
    places = edges[1::2]
    anchors = encoder.basis.at((places, places)).reshape(N_ANCHORS**2, -1)
    z = np.asarray(_from_places(encoder.coordinate, edges))
    pairs = np.stack(np.meshgrid(*z[:, 1::2], indexing="ij"), axis=-1).reshape(-1, 2)
    mass = np.diff(scipy.special.ndtr(z[:, ::2]), axis=1)
    single = jnp.float32
    table = signal_basis.tabulate(encoder.basis)
    return Plan(
        table,
        Table(table.rows[..., encoder.basis.blocks[0]]),
        jnp.asarray(anchors, single),
        jnp.asarray(pairs, single),
        jnp.asarray(np.log(np.outer(*mass)).reshape(-1), single),
    )


def init(n_voxels: int, n_groups: int, n_functions: int) -> State:
    """No image yet."""
    return State(
        gram=jnp.zeros((n_groups, n_functions, n_functions), jnp.float64),
        projection=jnp.zeros((n_voxels, n_functions), jnp.float64),
        energy=jnp.zeros(n_voxels, jnp.float64),
        n_images=jnp.zeros((), jnp.float64),
    )


def update(state: State, coefficients: Float[Array, "group function"], signal: Float[Array, " voxel"]) -> State:
    """Add one image: its coefficients in the basis and the signal that was measured [pixel units]."""
    coefficients = coefficients.astype(jnp.float64)
    return State(
        gram=state.gram + coefficients[:, :, None] * coefficients[:, None, :],
        projection=state.projection + coefficients * signal[:, None],
        energy=state.energy + signal**2,
        n_images=state.n_images + 1,
    )


def stages(encoder: Encoder, plan: Plan, state: State, noise: Noise) -> tuple[Gaussian, ...]:
    """The Gaussian after each stage, the last refinement once; for training."""
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
    expansion = _once(expand(encoder, plan, state, posterior.mean))
    arrays, rest = zip(*(eqx.partition(stage, eqx.is_array) for stage in encoder.refine + encoder.refine[-1:] * encoder.repeats), strict=True)

    def again(before: tuple[Gaussian, Points], weights: Stage) -> tuple[tuple[Gaussian, Points], None]:
        return refine(eqx.combine(weights, rest[0]), encoder, plan, expansion, noise, context, before[0]), None

    start = posterior, _no_points(len(posterior.mean))
    posterior, points = jax.lax.scan(again, start, jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays))[0]
    return posterior, expansion, points


def first_guess(encoder: Encoder, features: Float[Array, "voxel feature"], context: Float[Array, "voxel context"]) -> Gaussian:
    """Stage 1."""
    out = jax.vmap(encoder.first)(jnp.concatenate([features, context], axis=1))
    root = jnp.stack([jnp.exp(jnp.clip(out[:, 2], -7, 2)), out[:, 3], jnp.exp(jnp.clip(out[:, 4], -7, 2))], axis=1)
    # the off-diagonal scales with the second deviation: the correlation is what the perceptron sees
    root = root.at[:, 1].set(out[:, 3] * root[:, 2])
    return Gaussian(_held(out[:, :2]), root)


def refine(
    stage: Stage, encoder: Encoder, plan: Plan, expansion: Expansion, noise: Noise, context: Array, before: Gaussian
) -> tuple[Gaussian, Points]:
    """One further stage: nine points, a Newton step, a correction."""
    before = jax.lax.stop_gradient(before)  # each stage learns with its own loss
    z = jnp.clip(coordinates.points(before.mean, before.root, jnp.asarray(STENCIL, jnp.float32)), -4.5, 4.5)
    found = Points(z, evaluate(encoder, plan, expansion, noise, z))
    log_posterior = found.fit.log_likelihood - 0.5 * jnp.sum(z**2, axis=-1)
    whitened = coordinates.whiten(z - before.mean[:, None], before.root[:, None])
    step, root = _newton(log_posterior - log_posterior[:, :1])
    # how far from a Gaussian of the present width the nine values are
    excess = log_posterior[:, 1:] - log_posterior[:, :1] + 0.5 * jnp.sum(whitened[:, 1:] ** 2 - whitened[:, :1] ** 2, axis=-1)
    size = jnp.log(before.root[:, jnp.array([0, 2])])
    described = jnp.concatenate(
        [before.mean, size, before.root[:, 1:2] / before.root[:, 2:], step, jnp.log(root[:, jnp.array([0, 2])]), root[:, 1:2]],
        axis=1,
    )
    out = jax.vmap(stage)(jnp.concatenate([_squashed(excess), described, context], axis=1))
    step = step + out[:, :2]
    scale = jnp.exp(jnp.clip(out[:, 2:4], -2.0, 2.0))
    c11, c22 = root[:, 0] * scale[:, 0], root[:, 2] * scale[:, 1]
    c21 = root[:, 1] + out[:, 4] * c22
    b = before.root
    combined = jnp.stack([b[:, 0] * c11, b[:, 1] * c11 + b[:, 2] * c21, b[:, 2] * c22], axis=1)
    return Gaussian(_held(before.mean + _moved(b, step)), combined), found


def expand(encoder: Encoder, plan: Plan, state: State, z: Float[Array, "voxel 2"]) -> Expansion:
    """Take the best mean signal at one place per voxel away from its images, in float64."""
    mean, single = encoder.basis.blocks[0], jnp.float32
    centre = _once(plan.mean_table(*(encoder.coordinate.place(axis, z[:, axis]) for axis in (0, 1))))
    exact = centre.astype(jnp.float64)
    rows = state.gram[:, mean, :]
    along = _once(exact @ rows[0] if len(rows) == 1 else jnp.sum(rows * exact[:, :, None], axis=1))
    amplitude = jnp.sum(state.projection[:, mean] * exact, axis=1) / jnp.sum(along[:, mean] * exact, axis=1)
    left = state.projection - amplitude[:, None] * along
    energy = state.energy - amplitude * jnp.sum(exact * (state.projection[:, mean] + left[:, mean]), axis=1)
    others = slice(encoder.basis.ranks[0], None)
    parts = amplitude, along, left, energy, rows, state.gram[:, others, others], state.n_images
    return Expansion(centre, *(each.astype(single) for each in parts))


def evaluate(encoder: Encoder, plan: Plan, expansion: Expansion, noise: Noise, z: Float[Array, "voxel point 2"]) -> Fit:
    """The marginal likelihood at any points.

    Sums over a block of functions are products with a matrix of ones and zeros, and what follows is done on flat arrays: on a CPU both
    take a fraction of the time of sums over short last axes.
    """
    blocks, shape = encoder.basis.blocks, z.shape[:2]
    mean, others = blocks[0], slice(encoder.basis.ranks[0], None)
    # barriers keep what has many readers from being computed anew for each of them
    functions = _once(plan.table(*_once([encoder.coordinate.place(axis, z[..., axis]) for axis in (0, 1)])))
    a, left = expansion.amplitude[:, None, None], expansion.left[:, None]
    difference = _once(functions[..., mean] - expansion.centre[:, None])
    moved = _once(_matmul(difference, expansion.gram))
    first = functions * (expansion.along[:, None] + moved)
    rhs = functions * (left - a * moved)
    change = difference * (a**2 * moved[..., mean] - 2 * a * left[..., mean])
    member, count = _members(encoder.basis.ranks), len(blocks)
    sums = _summed(jnp.concatenate([first, rhs, change], axis=-1), block_diag(member, member, np.ones((encoder.basis.ranks[0], 1))))
    g = {(0, j): sums[j] for j in range(count)}
    if count > 1:
        of = _members(encoder.basis.ranks)[others, 1:]
        rows = functions[..., None, others] * jnp.asarray(of.T, functions.dtype)
        across = _matmul(rows.reshape(shape[0], -1, len(of)), expansion.gram_of_others).reshape(rows.shape) * functions[..., None, others]
        pairs = _summed(across.reshape(*shape, -1), block_diag(*[of] * (count - 1)))
        g |= {(i, j): pairs[(i - 1) * (count - 1) + j - 1] for i in range(1, count) for j in range(i, count)}
    energy = _flat(expansion.energy, shape) + sums[2 * count]
    fit = _collapse(_once(g), list(sums[count : 2 * count]), energy, _flat(expansion.amplitude, shape), noise, expansion.n_images, shape)
    return Fit(*(each.reshape(shape) for each in (fit.log_likelihood, fit.residual, fit.amplitude)))


def anchor_features(encoder: Encoder, plan: Plan, state: State, noise: Noise) -> Float[Array, "voxel feature"]:
    """Means, deviations and correlation under the likelihood raised to each power, on the anchors."""
    blocks = encoder.basis.blocks
    single = jnp.float32
    gram, projection = state.gram.astype(single), state.projection.astype(single)
    p = [projection[:, row] @ plan.anchors[:, row].T for row in blocks]
    g = {}
    for i, row in enumerate(blocks):
        for j in range(i, len(blocks)):
            products = (plan.anchors[:, row, None] * plan.anchors[:, None, blocks[j]]).reshape(len(plan.anchors), -1)
            g[i, j] = gram[:, row, blocks[j]].reshape(len(gram), -1) @ products.T
    g, p = _once((g, p))
    shape = p[0].shape
    g, p = {pair: _once(jnp.broadcast_to(each, shape)).reshape(-1) for pair, each in g.items()}, [each.reshape(-1) for each in p]
    fit = _collapse(g, p, _flat(state.energy.astype(single), shape), jnp.zeros((), single), noise, state.n_images, shape)
    height = _once(fit.log_likelihood.reshape(shape))
    height = _once(height - jnp.max(height, axis=1, keepdims=True))
    z = plan.places
    moments = jnp.concatenate([jnp.ones_like(z[:, :1]), z, z**2, z[:, :1] * z[:, 1:]], axis=1)
    return jnp.concatenate([_tempered(height, plan.log_mass, moments, t) for t in TEMPERATURES], axis=1)


def _tempered(height: Array, log_mass: Array, moments: Array, temperature: float) -> Float[Array, "voxel 5"]:
    weight = jnp.exp(height / temperature + log_mass)
    sums = weight @ moments
    mean = sums[:, 1:3] / sums[:, :1]
    variance = jnp.maximum(sums[:, 3:5] / sums[:, :1] - mean**2, 1e-5)
    mixed = sums[:, 5] / sums[:, 0] - mean[:, 0] * mean[:, 1]
    correlation = mixed / jnp.sqrt(variance[:, 0] * variance[:, 1])
    return jnp.concatenate([mean, 0.5 * jnp.log(variance), jnp.clip(correlation, -1, 1)[:, None]], axis=1)


def _collapse(
    g: dict[tuple[int, int], Array], p: list[Array], energy: Array, base: Array, noise: Noise, n: Array, shape: tuple[int, ...]
) -> Fit:
    """Integrate nuisances, amplitude and noise at every point; formulae as in core.likelihood. Flat arrays of the points of `shape`.

    The amplitude is `base` plus what is left to fit; `p` and `energy` are of the images less `base` times the mean signal.
    """
    single = jnp.float32
    sigma, dof, tau, n = (_flat(jnp.asarray(each, single), shape) for each in (noise.sigma, noise.dof, noise.discrepancy, n))
    count = len(p)
    implied = jnp.maximum(base + p[0] / g[0, 0], _TINY) ** 2
    variance = sigma**2 + tau**2 * implied
    ridge = variance / implied
    a = {(i, j): g[min(i, j), max(i, j)] for i in range(count) for j in range(count)}
    rhs, left, logs = list(p), energy, []
    for j in range(count - 1, 0, -1):
        pivot, a, rhs, left = _once((a[j, j] + ridge, a, rhs, left))
        logs.append(pivot / ridge)
        left = left - rhs[j] ** 2 / pivot
        for i in range(j):
            factor = a[i, j] / pivot
            rhs[i] = rhs[i] - factor * rhs[j]
            for k in range(i, j):
                a[i, k] = a[i, k] - factor * a[k, j]
    power = jnp.maximum(a[0, 0], 1e-12)
    step = rhs[0] / power
    amplitude = base + step
    # nuisances fit what `base` times their columns leaves out as well: they were projected out of both sides alike
    residual = jnp.maximum(left - rhs[0] * step, 0.0)
    # two factors to a logarithm: more might overflow
    logs = [*logs, power * jnp.maximum(amplitude, _TINY) ** 2]
    log_occam = sum(jnp.log(prod(logs[i : i + 2])) for i in range(0, len(logs), 2))
    log_likelihood = (
        -0.5 * log_occam - 0.5 * (n - 1) * jnp.log(variance) - 0.5 * (dof + n - 1) * jnp.log1p(residual / (dof * variance))
    )
    return _once(Fit(log_likelihood, residual, amplitude))  # pyright: ignore[reportReturnType] - the same, computed once


N_CONTEXT = 4
_TINY = 1e-9  # an amplitude that is not positive has no likelihood to speak of
_LONGEST_STEP = 4.0
_FLATTEST = 0.15


def _context(state: State, noise: Noise) -> Float[Array, "voxel context"]:
    """Number of images, degrees of freedom of the noise, signal over noise."""
    n = state.n_images
    level = 0.5 * jnp.log(jnp.maximum(state.energy, 1e-30) / (n * noise.sigma**2))
    each = (n / 15 - 1, jnp.log(n) - 2, jnp.log(jnp.clip(noise.dof, 1.0, 1e4)) / 3 - 2, level - 4)
    return jnp.stack([jnp.broadcast_to(one, level.shape) for one in each], axis=1).astype(jnp.float32)


def _newton(height: Float[Array, "voxel point"]) -> tuple[Float[Array, "voxel 2"], Float[Array, "voxel 3"]]:
    """Step and root of the covariance, both in the stencil's units, from log densities at its points."""
    r, d = float(STENCIL[1, 0]), float(STENCIL[5, 0])
    h = [height[:, i] for i in range(len(STENCIL))]
    g1, g2 = (h[1] - h[2]) / (2 * r), (h[3] - h[4]) / (2 * r)
    a11, a22 = -(h[1] + h[2] - 2 * h[0]) / r**2, -(h[3] + h[4] - 2 * h[0]) / r**2
    a12 = -(h[5] + h[6] - h[7] - h[8]) / (4 * d**2)
    smallest = 0.5 * (a11 + a22) - jnp.sqrt(0.25 * (a11 - a22) ** 2 + a12**2)
    lift = jnp.maximum(_FLATTEST - smallest, 0.0)
    a11, a22 = a11 + lift, a22 + lift
    determinant = a11 * a22 - a12**2
    step = jnp.stack([(a22 * g1 - a12 * g2) / determinant, (a11 * g2 - a12 * g1) / determinant], axis=1)
    length = jnp.sqrt(jnp.sum(step**2, axis=1, keepdims=True))
    step = step * jnp.minimum(1.0, _LONGEST_STEP / jnp.maximum(length, 1e-9))
    c11 = jnp.sqrt(a22 / determinant)
    return step, jnp.stack([c11, -a12 / determinant / c11, 1 / jnp.sqrt(a22)], axis=1)


def _moved(root: Float[Array, "voxel 3"], step: Float[Array, "voxel 2"]) -> Float[Array, "voxel 2"]:
    return jnp.stack([root[:, 0] * step[:, 0], root[:, 1] * step[:, 0] + root[:, 2] * step[:, 1]], axis=1)


def _held(mean: Float[Array, "voxel 2"]) -> Float[Array, "voxel 2"]:
    return jnp.clip(mean, -4.0, 4.0)


def _once(tree):
    return jax.lax.optimization_barrier(tree)


def _squashed(x: Array) -> Array:
    return jnp.arcsinh(0.5 * x)


def _matmul(x: Float[Array, "voxel point row"], matrix: Float[Array, "group row column"]) -> Float[Array, "voxel point column"]:
    return x @ (matrix[0] if matrix.shape[0] == 1 else matrix)


def _flat(x: Array, shape: tuple[int, ...]) -> Array:
    """One value per voxel as one per point; a number stays one."""
    return x if x.ndim == 0 else _once(jnp.broadcast_to(x[:, None], shape).reshape(-1))


def _members(ranks: tuple[int, ...]) -> Float[np.ndarray, "function block"]:
    """1 where a function belongs to a block."""
    return np.repeat(np.eye(len(ranks)), ranks, axis=0)


def _summed(x: Float[Array, "voxel point function"], member: Float[np.ndarray, "function block"]) -> Float[Array, "block flat_point"]:
    """Sums over the functions of each block."""
    return _once(jnp.asarray(member.T, x.dtype) @ _once(x.reshape(-1, x.shape[-1])).T)


def _no_points(n_voxels: int) -> Points:
    """Before a refinement has looked."""
    shape = n_voxels, len(STENCIL)
    return Points(jnp.zeros((*shape, 2), jnp.float32), Fit(*(jnp.zeros(shape, jnp.float32) for _ in range(3))))


def _scaled(perceptron: eqx.nn.MLP) -> eqx.nn.MLP:
    """Start from a small output."""
    return eqx.tree_at(lambda m: (m.layers[-1].weight, m.layers[-1].bias), perceptron, replace_fn=lambda leaf: 0.1 * leaf)


@eqx.filter_jit
def _from_places(coordinate: Coordinate, places: Float[Array, " place"]) -> Float[Array, "2 place"]:
    """z of both parameters; one program, for operation by operation it compiles for seconds."""
    return jnp.stack([coordinate.from_place(axis, places) for axis in (0, 1)])
