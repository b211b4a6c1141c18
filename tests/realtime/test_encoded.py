"""A region's engine: audit, and what happens when encoder and reference disagree."""

import equinox as eqx
import jax
import numpy as np
import pytest

from scansteer.core.noise import NoiseEstimate
from scansteer.protocols.builtin import BUILTIN
from scansteer.realtime import encoder_file
from scansteer.realtime.encoded import N_AUDITED, Encoded, sampled

MOUSE = BUILTIN["mt-mouse-7T-30"]


@pytest.fixture(scope="module")
def trained():
    found = encoder_file.shipped(MOUSE)
    assert found is not None
    return found


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
        engine.absorb(engine.play(MOUSE.schedule[n], first=n == 0), signal, NoiseEstimate(20.0, 100.0))
    assert engine.audit is not None
    assert engine.audit.n_voxels == 40
    engine._volume.encoder = jax.tree.map(lambda leaf: leaf + 0.5 if eqx.is_array(leaf) and leaf.ndim == 2 else leaf, engine._volume.encoder)
    info = engine.absorb(engine.play(MOUSE.schedule[3], first=False), signals[3], NoiseEstimate(20.0, 100.0))
    assert engine.source == "reference"
    assert "disagree" in (engine.said or "")
    assert len(info.nrmse) == 40
    engine.absorb(engine.play(MOUSE.schedule[4], first=False), signals[4], NoiseEstimate(20.0, 100.0))
    assert engine.audit is None
    engine.close()
