"""A volume's answers: batches of blocks, neighbours, the most probable values, random draws."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scansteer.core import encoder as encoders
from scansteer.core import voxel_columns
from scansteer.core.noise import NoiseEstimate
from scansteer.core.signal_basis import Basis
from scansteer.protocols import forward
from scansteer.protocols.builtin import BUILTIN
from scansteer.realtime import encoder_file
from scansteer.realtime.encoded import map_error
from scansteer.realtime.volume import BATCH, Volume, voxel_coefficients

MOUSE, AMIDE = BUILTIN["mt-mouse-7T-30"], BUILTIN["amide-human-3T"]
NOISE = NoiseEstimate(5.0, 100.0)


@pytest.fixture(scope="module")
def trained():
    found = encoder_file.shipped(MOUSE)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def volume(trained):
    """Of blocks so small that 150 voxels take two batches, the second one not full."""
    axes = forward.tissue_axes(MOUSE)
    made = Volume(trained.encoder, voxel_columns.make(axes, trained.mapped, (0.0, 0.0)), MOUSE.noise.discrepancy, block=2)
    assert 2 * BATCH < 150 < 4 * BATCH
    yield made
    made.close()


def answers(volume: Volume, places):
    """Three made-up images of the voxels at the given places of a scene of 150."""
    rng = np.random.default_rng(5)
    t1, t2, signals = rng.uniform(1.1, 2.7, 150), rng.uniform(0.03, 0.14, 150), rng.uniform(300, 700, (3, 150))
    nodes = int(np.prod([axis.n_nodes for axis in volume.columns.axes])) + 1
    expected = rng.uniform(0.4, 0.8, (3, nodes, 400))
    maps = {"t1_s": t1[places], "t2_s": t2[places]}
    volume.begin(voxel_columns.rows_of_voxels(volume.columns, maps, {name: map_error(MOUSE, name, each) for name, each in maps.items()}), len(places))
    for image, signal in zip(expected, signals, strict=True):
        answer = volume.absorb(image, signal[places], NOISE)
    return answer


def test_a_voxel_is_answered_bit_for_bit_alike_alone_and_among_others(volume):
    everyone = answers(volume, np.arange(150))
    for place in (0, 77, 149):
        alone = answers(volume, np.array([place]))
        for ours, theirs in zip(jax.tree.leaves(alone), jax.tree.leaves(everyone), strict=True):
            np.testing.assert_array_equal(ours[0], theirs[place])


@pytest.mark.long
def test_a_voxel_is_answered_bit_for_bit_alike_alone_and_among_a_hundred_thousand_others(trained):
    rng, n_voxels = np.random.default_rng(6), 100_001
    volume = Volume(trained.encoder, voxel_columns.make(forward.tissue_axes(MOUSE), trained.mapped, (0.0, 0.0)), MOUSE.noise.discrepancy)
    nodes = int(np.prod([axis.n_nodes for axis in volume.columns.axes])) + 1
    expected, signals = rng.uniform(0.4, 0.8, (3, nodes, 400)), rng.uniform(300, 700, (3, n_voxels))
    maps = {"t1_s": rng.uniform(1.1, 2.7, n_voxels), "t2_s": rng.uniform(0.03, 0.14, n_voxels)}
    rows = voxel_columns.rows_of_voxels(volume.columns, maps, {name: map_error(MOUSE, name, each) for name, each in maps.items()})

    def answer(voxels):
        volume.begin(tuple(row[:, voxels] for row in rows), len(voxels))
        for image, signal in zip(expected, signals, strict=True):
            last = volume.absorb(image, signal[voxels], NOISE)
        return jax.tree.leaves(last)

    everyone = answer(np.arange(n_voxels))
    for place in (0, *rng.integers(n_voxels, size=40), n_voxels - 1):
        for ours, theirs in zip(answer(np.array([place])), everyone, strict=True):
            np.testing.assert_array_equal(ours[0], theirs[place])
    volume.close()


def densities(volume: Volume, steps, values):
    """Log density over (f, k) at `steps` posterior deviations from the given values, (voxel, step), of the first batch."""
    encoder, known, posterior = volume.encoder, volume._known(NOISE), answers(volume, np.arange(150)).posterior
    at = [encoder.coordinate.z(axis, jnp.asarray(values[:, axis], jnp.float32)) for axis in (0, 1)]
    width = [posterior.root[:, 0], np.hypot(posterior.root[:, 1], posterior.root[:, 2])]
    z = np.stack([np.asarray(centre)[:, None] + np.outer(sd, step) for centre, sd, step in zip(at, width, steps.T, strict=True)])

    @eqx.filter_jit
    def of_block(given):
        state, here = given
        expansion = encoders.expand(encoder, volume._plan, state, here[:, 0].T)
        seen = encoders.evaluate(encoder, volume._plan, expansion, known, here).log_likelihood
        return seen + sum(encoder.coordinate.log_density(axis, here[axis]) for axis in (0, 1))

    blocks = jnp.moveaxis(jnp.asarray(volume._blocks(z.clip(-4.5, 4.5), 0)), -1, 2)
    found = jax.lax.map(of_block, (volume._states[0], blocks))
    return np.moveaxis(np.asarray(found), 1, 2).reshape(-1, len(steps))


def test_what_is_called_most_probable_is_at_the_top_of_the_density_and_the_mean_is_not(volume):
    summary = answers(volume, np.arange(150)).info.summary
    grid = np.linspace(-0.5, 0.5, 9)
    steps = np.concatenate([np.zeros((1, 2)), np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)])
    below = []
    for values in (summary.map, summary.mean):
        density = densities(volume, steps, values)
        below.append(np.max(density, axis=1) - density[:, 0])
    assert np.percentile(below[0], 90) < 0.1  # nats; made-up signals, of which no pair of parameters is right
    assert np.median(below[0]) < 0.1 * np.median(below[1])


def test_coefficients_of_voxels_with_six_maps_are_those_of_the_weights_of_all_nodes():
    axes, rng = forward.tissue_axes(AMIDE), np.random.default_rng(2)
    names = tuple(axis.name for axis in axes)
    columns = voxel_columns.make(axes, names, (0.0, 0.0))
    maps = {axis.name: rng.uniform(axis.lower, axis.upper, 5) for axis in axes}
    rows = voxel_columns.rows_of_voxels(columns, maps, {name: 0.1 * np.abs(values) for name, values in maps.items()})
    ranks = tuple(range(1, len(names) + 2))
    basis = Basis(jnp.zeros((sum(ranks), 1)), ranks)
    at_nodes = rng.normal(size=(columns.n_mapped_nodes, sum(ranks)))
    found = voxel_coefficients(basis, columns.kinds, rows, jnp.asarray(at_nodes))
    plainly = [at_nodes[:, block].T @ voxel_columns.weights(rows, kind).T for kind, block in zip(columns.kinds, basis.blocks, strict=True)]
    np.testing.assert_allclose(found, np.concatenate(plainly), rtol=1e-9, atol=1e-12)


def test_a_random_draw_of_every_voxel_lies_in_its_intervals_as_often_as_they_say(volume):
    answer = answers(volume, np.arange(150))
    draws = np.stack([volume.draw(jax.random.PRNGKey(number), answer.posterior) for number in range(20)])
    summary = answer.info.summary
    assert draws.shape == (20, 150, 2)
    assert np.mean((draws >= summary.lower) & (draws <= summary.upper)) == pytest.approx(0.95, abs=0.015)  # 6 000 draws of a parameter or two
