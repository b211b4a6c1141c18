"""Training runs: reproducible, resumed, refused."""

import jax
import numpy as np
import pytest

from scansteer.core.errors import InputError
from scansteer.core.noise import NoiseEstimate
from scansteer.protocols.builtin import BUILTIN
from scansteer.realtime import encoder_file, training
from scansteer.realtime.recording import Recording
from scansteer.realtime.training import Settings, mapped_names, train

PHANTOM, MOUSE = BUILTIN["larg-phantom-9.4T"], BUILTIN["mt-mouse-7T-30"]
SHORT = Settings(seed=3, n_scans=2, n_groups=1, n_steps=20, batch=64, n_calibration_scans=1)


def recorded(maps) -> Recording:
    noise = [NoiseEstimate(10.0, 50.0)] * 30
    signals = 1000 * np.random.default_rng(0).uniform(0.4, 0.6, (30, 40))
    return Recording("one.h5", PHANTOM.schedule, range(30), signals, noise, maps)


def test_maps_are_those_of_the_files_unless_named():
    of_file = recorded({"t1_s": np.ones(40), "t2_s": np.ones(40)})
    assert mapped_names(MOUSE, None, [of_file]) == ("t1_s", "t2_s")
    assert mapped_names(MOUSE, ("t1",), [of_file]) == ("t1_s",)
    assert mapped_names(MOUSE, None, []) == ()


def test_a_file_without_the_named_map_is_refused():
    with pytest.raises(InputError, match=r"one\.h5 has no map of b1_relative"):
        mapped_names(MOUSE, ("b1",), [recorded({"t1_s": np.ones(40)})])
    with pytest.raises(InputError, match="--mapped names 'flow'"):
        mapped_names(MOUSE, ("flow",), [])


@pytest.mark.long
def test_an_interrupted_run_ends_like_an_undisturbed_one(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "STEPS_PER_CHECKPOINT", 10)
    whole = train(PHANTOM, (), tmp_path / "whole.encoder", SHORT, [recorded({})])

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "calibrating":
            raise KeyboardInterrupt

    path = tmp_path / "halves.encoder"
    with pytest.raises(KeyboardInterrupt):
        train(PHANTOM, (), path, SHORT, [recorded({})], interrupt)
    assert not path.exists()
    resumed = train(PHANTOM, (), path, SHORT, [recorded({})])
    for ours, theirs in zip(jax.tree.leaves(whole.encoder), jax.tree.leaves(resumed.encoder), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not path.with_name(path.name + training.CHECKPOINT_SUFFIX).exists()
    assert encoder_file.load(path).about["measured"] == ["one.h5"]
