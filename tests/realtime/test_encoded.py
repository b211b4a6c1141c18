"""A volume's engine: blocks, neighbours, audit, and what happens when encoder and reference disagree."""

import jax
import numpy as np
import pytest

from scansteer.core import voxel_columns
from scansteer.core.noise import NoiseEstimate
from scansteer.protocols import forward
from scansteer.protocols.builtin import BUILTIN
from scansteer.realtime import encoder_file
from scansteer.realtime.encoded import N_AUDITED, Encoded, map_error, sampled
from scansteer.realtime.volume import Volume

MOUSE = BUILTIN["mt-mouse-7T-30"]


@pytest.fixture(scope="module")
def trained():
    found = encoder_file.shipped(MOUSE)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def volume(trained):
    axes = forward.tissue_axes(MOUSE)
    made = Volume(trained.encoder, voxel_columns.make(axes, trained.mapped, (0.0, 0.0)), MOUSE.noise.discrepancy, block=64)
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
        answer = volume.absorb(image, signal[places], NoiseEstimate(5.0, 100.0))
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
            last = volume.absorb(image, signal[voxels], NoiseEstimate(5.0, 100.0))
        return jax.tree.leaves(last)

    everyone = answer(np.arange(n_voxels))
    for place in (0, *rng.integers(n_voxels, size=40), n_voxels - 1):
        for ours, theirs in zip(answer(np.array([place])), everyone, strict=True):
            np.testing.assert_array_equal(ours[0], theirs[place])
    volume.close()


def test_every_region_is_audited_however_small():
    regions = [np.arange(5000), np.arange(5000, 5007), np.arange(5007, 5008)]
    audited = sampled(regions, np.random.default_rng(0))
    assert len(np.unique(audited)) == len(audited) <= N_AUDITED
    assert [np.isin(region, audited).any() for region in regions] == [True, True, True]
    np.testing.assert_array_equal(sampled([np.arange(9)], np.random.default_rng(0)), np.arange(9))


@pytest.mark.long
def test_an_encoder_that_disagrees_hands_over_to_the_reference(trained):
    engine = Encoded(MOUSE, ["t1_s", "t2_s"], trained)
    rng = np.random.default_rng(3)
    maps = {"t1_s": rng.uniform(1.3, 1.9, 40), "t2_s": rng.uniform(0.04, 0.06, 40)}
    signals = 1000 * rng.uniform(0.4, 0.6, (5, 40))
    engine.begin(maps, signals[0], [np.arange(40)])
    for n, signal in enumerate(signals[:3]):
        engine.absorb(signal, NoiseEstimate(20.0, 100.0), MOUSE.schedule[n], first=n == 0)
    assert engine.audit is not None
    assert engine.audit.n_voxels == 40
    engine._volume.encoder = jax.tree.map(lambda leaf: leaf + 0.5 if leaf.dtype == np.float32 and leaf.ndim == 2 else leaf, engine._volume.encoder)
    info = engine.absorb(signals[3], NoiseEstimate(20.0, 100.0), MOUSE.schedule[3], first=False)
    assert engine.source == "reference"
    assert "disagree" in (engine.said or "")
    assert len(info.nrmse) == 40
    engine.absorb(signals[4], NoiseEstimate(20.0, 100.0), MOUSE.schedule[4], first=False)
    assert engine.audit is None
    engine.close()


def test_a_random_draw_of_every_voxel_lies_in_its_intervals_as_often_as_they_say(volume):
    answer = answers(volume, np.arange(150))
    draws = np.stack([volume.draw(jax.random.PRNGKey(number), answer.posterior) for number in range(20)])
    summary = answer.info.summary
    assert draws.shape == (20, 150, 2)
    assert np.mean((draws >= summary.lower) & (draws <= summary.upper)) == pytest.approx(0.95, abs=0.015)  # 6 000 draws of a parameter or two
