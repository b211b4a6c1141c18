"""The encoder's state and likelihood, on a small made-up family of signals."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scansteer.core import encoder as encoders
from scansteer.core import lattice, likelihood, signal_basis, training
from scansteer.core.code_generation import for_large_programs, with_barriers
from scansteer.core.coordinate import Coordinate
from scansteer.core.encoder import Gaussian
from scansteer.core.likelihood import Noise

COORDINATE = Coordinate(jnp.array([0.0, 0.0]), jnp.array([0.3, 70.0]), ("uniform", "beta"))
N_POINTS = (16, 16)
N_IMAGES = 7


def made_up_signals(rng, n_images):
    """Mean signal and one nuisance's column at the simulated nodes, (image, column, node)."""
    place = 0.5 * (1 - np.cos((2 * np.arange(lattice.N_NODES) + 1) * np.pi / (2 * lattice.N_NODES)))
    f, k = (each.reshape(-1) for each in np.meshgrid(place, place, indexing="ij"))
    a, b, c = rng.uniform(0.2, 1.5, (3, n_images, 1))
    mean = 1 / (1 + a * f + b * f * k + 0.3 * c * k**2)
    return np.stack([mean, 0.05 * np.exp(-c * f) * k], axis=1)


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    samples = made_up_signals(rng, 200)
    basis = signal_basis.make([samples[:, 0], samples[:, 1]])
    encoder = encoders.make(jax.random.PRNGKey(0), basis, COORDINATE, n_refinements=2)
    return encoder, encoders.plan(encoder), made_up_signals(rng, N_IMAGES)


def measured(images, rng, n_voxels):
    """Noisy signals of voxels somewhere in the box, (image, voxel)."""
    cells = rng.integers(60, 340, n_voxels)
    return 50 * images[:, 0, cells] + rng.standard_normal((len(images), n_voxels))


def state_of(world, signals, order=None):
    encoder, _, images = world
    state = encoders.init(signals.shape[1], 1, sum(encoder.basis.ranks))
    for i in range(len(images)) if order is None else order:
        columns = [images[i, j][None] for j in (0, 1)]
        coefficients = signal_basis.coefficients(encoder.basis, columns).T
        state = encoders.update(encoder.basis, state, jnp.asarray(coefficients), jnp.asarray(signals[i]))
    return state


def compiled(function):
    return eqx.filter_jit(function, compiler_options=for_large_programs() | with_barriers())


NOISE = Noise(jnp.asarray(1.0), jnp.asarray(40.0), jnp.asarray(0.01))


def test_the_basis_leaves_less_of_a_signal_than_it_promises(world):
    encoder, plan, images = world
    coefficients = signal_basis.coefficients(encoder.basis, [images[:, 0], images[:, 1]])
    block = encoder.basis.blocks[0]
    left = images[:, 0] - coefficients[:, block] @ np.asarray(encoder.basis.functions[block])
    assert np.sqrt(np.mean(left**2)) < 3 * signal_basis.TOLERANCE  # images that the basis was not made from
    at = jnp.linspace(0.03, 0.97, 9)
    exact = np.diagonal(encoder.basis.at((np.asarray(at), np.asarray(at))))
    np.testing.assert_allclose(plan.table(at, at), exact, atol=1e-3 * np.abs(exact).max())  # first order, steps of 1/127


def test_its_likelihood_is_that_of_the_reference(world):
    encoder, plan, images = world
    signals = measured(images, np.random.default_rng(1), 1)
    sums = likelihood.init(1, 1, 2, N_POINTS[0] * N_POINTS[1])
    for image, signal in zip(images, signals, strict=True):
        cells = lattice.upsample(jnp.asarray(image)[:, None], N_POINTS)
        sums = likelihood.update(sums, cells, jnp.asarray(signal))
    exact = np.asarray(jax.jit(likelihood.fit)(sums, NOISE).log_likelihood)[:, 0]
    place = jnp.linspace(0, 1, 16, dtype=jnp.float32)
    z = jnp.stack(jnp.meshgrid(*(COORDINATE.from_place(axis, place) for axis in (0, 1)), indexing="ij")).reshape(2, -1, 1)
    inner = np.abs(np.asarray(z[..., 0])).max(axis=0) < 4
    evaluate = compiled(lambda state: encoders.evaluate(encoder, plan, encoders.expand(encoder, plan, state, z[:, 0].T), NOISE, z))
    found = np.asarray(evaluate(state_of(world, signals)).log_likelihood)[:, 0]
    near = inner & (exact > exact.max() - 30)
    assert near.sum() > 10
    difference = (found - exact)[near]
    np.testing.assert_allclose(difference - difference.mean(), 0.0, atol=0.15)  # nats; the basis leaves 5e-5 of M0


def plain(values, coefficients, ranks, signals, noise):
    """One voxel's marginal likelihood, residual and amplitude where the functions have these values, in float64 and as in the docstring."""
    columns = np.stack([each.sum(axis=1) for each in np.split(coefficients * values, np.cumsum(ranks)[:-1], axis=1)], axis=1)
    f, x, (n, p) = columns[:, 0], columns[:, 1:], (len(signals), len(ranks) - 1)
    sigma, dof, tau = (float(each) for each in (noise.sigma, noise.dof, noise.discrepancy))
    implied = max(f @ signals / (f @ f), 1e-9) ** 2
    variance = sigma**2 + tau**2 * implied
    ridge = variance / implied
    a = x.T @ x + ridge * np.eye(p)
    without = lambda u, v: u @ v - (u @ x) @ np.linalg.solve(a, x.T @ v)  # noqa: E731 - the nuisances projected out
    power, amplitude = without(f, f), without(f, signals) / without(f, f)
    residual = without(signals, signals) - amplitude * without(f, signals)
    occam = np.linalg.slogdet(a)[1] - p * np.log(ridge) + np.log(power * amplitude**2)
    chance = -0.5 * (occam + (n - 1) * np.log(variance) + (dof + n - 1) * np.log1p(residual / (dof * variance)))
    return chance, residual, amplitude


def test_its_likelihood_is_that_of_plain_double_precision_for_voxels_with_columns_of_their_own():
    rng = np.random.default_rng(8)
    samples = rng.permutation(np.concatenate([made_up_signals(rng, 200), 0.1 * made_up_signals(rng, 200)[:, :1] ** 3], axis=1))
    basis = signal_basis.make([*np.moveaxis(samples, 1, 0)], 3e-4)
    encoder = encoders.make(jax.random.PRNGKey(0), basis, COORDINATE, n_refinements=1)
    plan, n_voxels = encoders.plan(encoder), 5
    own = samples[: N_IMAGES * n_voxels].reshape(N_IMAGES, n_voxels, 3, -1)
    coefficients = np.stack([signal_basis.coefficients(basis, np.moveaxis(image, 1, 0)) for image in own])
    signals = 50 * own[:, :, 0, 190] + rng.standard_normal((N_IMAGES, n_voxels))
    state = encoders.init(n_voxels, n_voxels, sum(basis.ranks))
    for image, signal in zip(coefficients, signals, strict=True):
        state = encoders.update(basis, state, jnp.asarray(image.T), jnp.asarray(signal))
    z = jnp.asarray(rng.normal(0, 0.7, (2, 4, n_voxels)), jnp.float32)
    evaluate = compiled(lambda state: encoders.evaluate(encoder, plan, encoders.expand(encoder, plan, state, z[:, 0].T), NOISE, z))
    anchored = compiled(lambda state: encoders.anchor_features(encoder, plan, state, NOISE))
    found, values = evaluate(state), np.asarray(plan.table(*(COORDINATE.place(axis, z[axis]) for axis in (0, 1))), float)
    for voxel in range(n_voxels):
        here = coefficients[:, voxel], basis.ranks, signals[:, voxel], NOISE
        expected = np.array([plain(values[:, point, voxel], *here) for point in range(4)])
        np.testing.assert_allclose(found.log_likelihood[:, voxel], expected[:, 0], atol=2e-3)  # nats; float32, a hundred terms
        np.testing.assert_allclose(found.residual[:, voxel], expected[:, 1], rtol=1e-3)
        np.testing.assert_allclose(found.amplitude[:, voxel], expected[:, 2], rtol=1e-5)
        height = np.array([plain(np.asarray(anchor, float), *here)[0] for anchor in np.concatenate(plan.anchors, axis=1)])
        weight = np.exp((height - height.max()) / 16 + np.asarray(plan.log_mass))  # the third temperature
        mean = weight @ np.asarray(plan.places) / weight.sum()
        np.testing.assert_allclose(anchored(state)[10:12, voxel], mean, atol=1e-3)


def test_the_order_of_images_changes_nothing(world):
    signals = measured(world[2], np.random.default_rng(2), 16)
    encoder, plan, _ = world
    infer = compiled(lambda state: encoders.infer(encoder, plan, state, NOISE)[0])
    first, second = infer(state_of(world, signals)), infer(state_of(world, signals, order=[3, 0, 6, 1, 5, 2, 4]))
    np.testing.assert_allclose(first.mean, second.mean, atol=1e-5)
    np.testing.assert_allclose(first.root, second.root, atol=1e-5)


def test_newton_finds_the_peak_of_a_gaussian():
    stencil, precision, peak = encoders.STENCIL, np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([0.4, -0.7])
    height = -0.5 * np.einsum("pi,ij,pj->p", stencil - peak, precision, stencil - peak)
    step, root = encoders.newton(jnp.asarray(height - height[0], jnp.float32)[:, None])
    np.testing.assert_allclose(step[:, 0], peak, atol=1e-5)
    root = root.T
    covariance = np.array([[root[0, 0], 0], [root[0, 1], root[0, 2]]])
    np.testing.assert_allclose(covariance @ covariance.T, np.linalg.inv(precision), atol=1e-5)


def test_divergence_is_zero_of_itself_and_known_otherwise():
    p = Gaussian(jnp.array([[0.1, -0.3]]), jnp.array([[0.5, 0.2, 0.3]]))
    q = Gaussian(jnp.array([[0.2, 0.1]]), jnp.array([[0.8, -0.1, 0.6]]))
    a, b = (np.array([[r[0], 0], [r[1], r[2]]]) for r in (np.asarray(p.root[0]), np.asarray(q.root[0])))
    inverse, shift = np.linalg.inv(b @ b.T), np.asarray(q.mean[0] - p.mean[0])
    expected = 0.5 * (np.trace(inverse @ a @ a.T) + shift @ inverse @ shift - 2 + np.log(np.linalg.det(b @ b.T) / np.linalg.det(a @ a.T)))
    assert float(training.divergence(p, p)[0]) == pytest.approx(0.0, abs=1e-7)
    assert float(training.divergence(p, q)[0]) == pytest.approx(expected, rel=1e-6)


def test_only_perceptrons_learn(world):
    learnt = eqx.filter(world[0], training.trainable(world[0]))
    assert learnt.basis.functions is None
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(learnt))


def test_an_encoder_is_deepened_by_copies_of_its_last_refinement_that_go_on_from_there(world):
    shallow, _, images = world
    deep = training.resized(shallow, 4, shallow.n_anchors)
    assert (len(shallow.refine), len(deep.refine)) == (2, 4)
    state = state_of(world, measured(images, np.random.default_rng(3), 8))
    before, after = (compiled(encoders.stages)(each, encoders.plan(each), state, NOISE) for each in (shallow, deep))
    for ours, theirs in zip(after[:3], before, strict=True):
        np.testing.assert_allclose(ours.mean, theirs.mean, atol=1e-6)
        np.testing.assert_allclose(ours.root, theirs.root, atol=1e-6)
    assert np.max(np.abs(after[3].mean - after[2].mean)) > 1e-6


def test_an_encoder_without_its_last_refinement_ends_one_stage_earlier(world):
    deep, _, images = world
    shallow = training.resized(deep, 1, deep.n_anchors)
    state = state_of(world, measured(images, np.random.default_rng(3), 8))
    ours, theirs = (compiled(encoders.stages)(each, encoders.plan(each), state, NOISE) for each in (shallow, deep))
    assert (len(ours), len(theirs)) == (2, 3)
    np.testing.assert_allclose(ours[-1].mean, theirs[1].mean, atol=1e-6)


def test_fewer_anchors_see_the_same_likelihood_where_the_data_say_little(world):
    encoder, plan, images = world
    coarse = training.resized(encoder, 2, 6)
    coarse_plan = encoders.plan(coarse)
    assert (len(plan.places), len(coarse_plan.places)) == (64, 36)
    np.testing.assert_allclose(np.sum(np.exp(coarse_plan.log_mass)), 1, rtol=1e-5)
    state = state_of(world, measured(images, np.random.default_rng(3), 8), range(2))
    loud = Noise(jnp.asarray(8.0), NOISE.dof, NOISE.discrepancy)
    fine, few = (compiled(encoders.anchor_features)(each, with_plan, state, loud) for each, with_plan in ((encoder, plan), (coarse, coarse_plan)))
    assert np.max(np.abs(fine)) > 0.2
    np.testing.assert_allclose(few, fine, atol=0.05)


def test_a_shortened_basis_keeps_its_first_functions_and_leaves_what_it_may():
    rng = np.random.default_rng(0)
    samples = made_up_signals(rng, 200)
    columns = [samples[:, 0], samples[:, 1]]
    basis = signal_basis.make(columns)
    short = signal_basis.shortened(basis, columns, 1e-3)
    assert short.ranks == signal_basis.make(columns, 1e-3).ranks
    assert all(few < many for few, many in zip(short.ranks, basis.ranks, strict=True))
    for column, ours, theirs in zip(columns, short.blocks, basis.blocks, strict=True):
        functions = np.asarray(short.functions[ours], float)
        np.testing.assert_array_equal(functions, np.asarray(basis.functions[theirs], float)[: len(functions)])
        assert np.sqrt(np.mean((column - column @ functions.T @ functions) ** 2)) < 1.1e-3


def test_the_last_gaussian_is_widened_by_the_factor_of_its_number_of_images(world):
    plain, _, images = world
    factors = jnp.linspace(1.0, 1.3, encoders.N_WIDENED, dtype=jnp.float32)
    wide = eqx.tree_at(lambda e: e.widening, plain, factors)
    signals = measured(images, np.random.default_rng(3), 8)
    for n in (3, len(images)):
        state = state_of(world, signals, range(n))
        ours, theirs = (compiled(encoders.infer)(each, encoders.plan(each), state, NOISE)[0] for each in (wide, plain))
        np.testing.assert_array_equal(ours.mean, theirs.mean)
        np.testing.assert_allclose(ours.root, factors[n - 1] * theirs.root, rtol=1e-6)


def test_voxels_that_cannot_be_are_answered_with_numbers(world):
    """Nothing but noise below zero, no signal at all, far more signal than noise."""
    encoder, plan, images = world
    signals = measured(images, np.random.default_rng(3), 4)
    signals[:, 0], signals[:, 1], signals[:, 2] = -1.0, 0.0, 1e5 * signals[:, 2]
    for n in (1, 3, len(images)):
        state = state_of(world, signals, range(n))
        posterior, _, points = compiled(encoders.infer)(encoder, plan, state, NOISE)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((posterior, points.z)))


def test_infer_ends_where_the_stages_do(world):
    shallow, _, images = world
    encoder = training.resized(shallow, 3, shallow.n_anchors)
    state = state_of(world, measured(images, np.random.default_rng(3), 8))
    plan = encoders.plan(encoder)
    found, last = compiled(encoders.infer)(encoder, plan, state, NOISE)[0], compiled(encoders.stages)(encoder, plan, state, NOISE)[-1]
    np.testing.assert_allclose(found.mean, last.mean, atol=1e-5)
    np.testing.assert_allclose(found.root, last.root, atol=1e-5)
