"""Training runs: reproducible, resumed, refused."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from scansteer.core.errors import InputError
from scansteer.core.noise import NoiseEstimate
from scansteer.core.nuisance import Axis
from scansteer.protocols.builtin import BUILTIN
from scansteer.realtime import encoder_file, simulated, training
from scansteer.realtime.recording import Recording
from scansteer.realtime.training import Settings, mapped_names, size_of, train, train_files, weights_of

PHANTOM, MOUSE = BUILTIN["larg-phantom-9.4T"], BUILTIN["mt-mouse-7T-30"]
SHORT = Settings(seed=3, n_scans=2, n_groups=1, n_short_scans=2, n_steps=20, batch=64, n_widening_scans=1, n_calibration_scans=1)


def recorded(maps) -> Recording:
    noise = [NoiseEstimate(10.0, 50.0)] * 30
    signals = 1000 * np.random.default_rng(0).uniform(0.4, 0.6, (30, 40))
    return Recording("one.h5", PHANTOM.schedule, range(30), signals, noise, maps)


def test_maps_are_those_of_the_files_unless_named():
    of_file = recorded({"t1_s": np.ones(40), "t2_s": np.ones(40)})
    assert mapped_names(None, [of_file]) == ("t1_s", "t2_s")
    assert mapped_names(("t1",), [of_file]) == ("t1_s",)
    assert mapped_names(None, []) == ()


def test_no_relaxation_time_drawn_beyond_its_range_is_negative():
    t2 = Axis("t2_s", 0.3, 2.5, logarithmic=True)
    drawn = simulated._spread(t2, np.array([-0.375, 0.0, 0.5, 1.375]))
    np.testing.assert_allclose(drawn, [0.15, 0.3, 1.4, 3.325])


def test_without_names_the_maps_are_those_of_the_weights_to_start_from():
    start = weights_of("shipped", MOUSE)
    assert mapped_names(None, [], start) == ("t1_s", "t2_s")
    with pytest.raises(InputError, match=r"one\.h5 has no map of t2_s"):
        mapped_names(None, [recorded({"t1_s": np.ones(40)})], start)


def test_a_run_starts_from_weights_of_its_own_scan_alone(tmp_path):
    with pytest.raises(InputError, match="belongs to scan 'mt-mouse-7T-30', whose field_t"):
        train(PHANTOM, (), tmp_path / "none.encoder", SHORT, start=weights_of("shipped", MOUSE))
    with pytest.raises(InputError, match=r"No encoder is shipped for scan 'larg-phantom-9\.4T-wide'"):
        weights_of("shipped", BUILTIN["larg-phantom-9.4T-wide"])
    with pytest.raises(InputError, match="Cannot read encoder"):
        weights_of(str(tmp_path / "absent.encoder"), PHANTOM)


def test_calibrating_alone_needs_trained_weights(tmp_path):
    with pytest.raises(InputError, match="--steps 0 calibrates weights that are trained; name them with --from"):
        train_files(PHANTOM, [], tmp_path / "none.encoder", steps=0)


@pytest.mark.parametrize(
    ("files", "steps", "size", "sentence"),
    [
        (["one.h5"], 0, {}, "learns nothing from one.h5"),
        ([], 0, {"refinements": 8}, "--refinements 8: the weights of --from have 5, and must be trained for others; give --steps"),
        ([], 0, {"anchors": 6}, "--anchors 6: the weights of --from have 8, and must be trained for others"),
        ([], None, {"tolerance": 1e-5}, "--tolerance 1e-05: the basis of --from was made to 5e-05 and can only be shortened"),
    ],
)
def test_what_cannot_be_done_with_trained_weights_is_refused(tmp_path, files, steps, size, sentence):
    with pytest.raises(InputError, match=sentence):
        train_files(PHANTOM, [Path(each) for each in files], tmp_path / "no.encoder", steps=steps, start="shipped", **size)


@pytest.mark.long
def test_calibrating_alone_may_make_an_encoder_smaller(tmp_path):
    start = weights_of("shipped", PHANTOM)
    settings = replace(SHORT, n_steps=0, n_refinements=4, tolerance=1e-4)
    small = train(PHANTOM, (), tmp_path / "small.encoder", settings, start=start)
    assert len(small.encoder.refine) == 4
    assert all(ours <= theirs for ours, theirs in zip(small.encoder.basis.ranks, start.encoder.basis.ranks, strict=True))
    assert sum(small.encoder.basis.ranks) < sum(start.encoder.basis.ranks)
    assert small.about["settings"] == {**start.about["settings"], "n_refinements": 4, "n_anchors": 8, "tolerance": 1e-4}
    again = encoder_file.load(tmp_path / "small.encoder")
    assert (len(again.encoder.refine), again.encoder.basis.ranks) == (4, small.encoder.basis.ranks)


@pytest.mark.long
def test_calibrating_alone_keeps_weights_and_settings(tmp_path):
    start = weights_of("shipped", PHANTOM)
    calibrated = train(PHANTOM, (), tmp_path / "again.encoder", replace(SHORT, n_steps=0, **size_of(start)), start=start)
    for ours, theirs in zip(jax.tree.leaves(calibrated.encoder.first), jax.tree.leaves(start.encoder.first), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert calibrated.about["settings"] == {**start.about["settings"], **size_of(start)}
    assert np.all(np.asarray(calibrated.encoder.widening) >= 1)
    assert not np.array_equal(calibrated.encoder.widening, start.encoder.widening)  # of one scan instead of 72


def test_a_file_without_the_named_map_is_refused():
    with pytest.raises(InputError, match=r"one\.h5 has no map of b1_relative"):
        mapped_names(("b1",), [recorded({"t1_s": np.ones(40)})])
    with pytest.raises(InputError, match="--mapped names 'flow'"):
        mapped_names(("flow",), [])


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


@pytest.mark.long
def test_a_run_from_trained_weights_keeps_their_basis_and_is_better_than_one_from_nothing(tmp_path):
    start = weights_of("shipped", PHANTOM)
    settings = replace(SHORT, learning_rate=1e-4, **size_of(start))
    trained = train(PHANTOM, (), tmp_path / "further.encoder", settings, start=start)
    np.testing.assert_array_equal(trained.encoder.basis.functions, start.encoder.basis.functions)
    assert trained.about["start"] == training.digest(start)
    from_nothing = train(PHANTOM, (), tmp_path / "short.encoder", settings)
    for further, nothing in zip(trained.about["calibration"], from_nothing.about["calibration"], strict=True):
        assert further["divergence_median"] < 0.5 * nothing["divergence_median"]
