"""Encoder files: what is in them, and which are refused."""

import equinox as eqx
import jax
import numpy as np
import pytest

from scansteer.core.errors import InputError
from scansteer.protocols.builtin import BUILTIN
from scansteer.realtime import encoder_file

MOUSE = BUILTIN["mt-mouse-7T-30"]
MAPS = ("t1_s", "t2_s")


@pytest.fixture(scope="module")
def trained():
    found = encoder_file.shipped(MOUSE)
    assert found is not None
    return found


HUMAN = ("t1_s", "t2_s", "b0_ppm", "b1_relative")
SHIPPED = {"larg-phantom-9.4T": (), "mt-mouse-7T-30": MAPS, "mt-human-3T": HUMAN, "amide-human-3T": (*HUMAN, "fss", "kssw")}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_belong_to_the_scan_as_it_is_built_in(name):
    found = encoder_file.shipped(BUILTIN[name])
    assert found is not None
    encoder_file.check(found, BUILTIN[name], SHIPPED[name])
    assert len(encoder_file.to_bytes(found)) < 1_000_000
    assert {"seed", "n_steps", "n_scans"} <= set(found.about["settings"])
    calibration = {each["n"]: each for each in found.about["calibration"]}
    assert list(calibration) == list(range(3, len(BUILTIN[name].schedule) + 1))
    for each in calibration.values():
        assert each["draws"] >= 4000
        assert 0.92 < each["coverage"]["0.95"] < 0.97


def test_a_file_gives_the_same_encoder_back(trained, tmp_path):
    path = tmp_path / "one.encoder"
    encoder_file.save(path, trained)
    again = encoder_file.load(path)
    for ours, theirs in zip(jax.tree.leaves(trained.encoder), jax.tree.leaves(again.encoder), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert again.about == trained.about


def test_weights_of_another_scan_are_refused_with_what_differs(trained):
    with pytest.raises(InputError, match="belongs to scan 'mt-mouse-7T-30', whose field_t"):
        encoder_file.check(trained, BUILTIN["larg-phantom-9.4T"], ())


def test_targets_and_limits_may_differ(trained):
    changed = MOUSE.model_copy(update={"name": "ours", "stop": MOUSE.stop.model_copy(update={"n_min": 9})})
    encoder_file.check(trained, changed, MAPS)


def test_other_maps_are_refused(trained):
    with pytest.raises(InputError, match="was trained with maps of t1_s, t2_s, this session has no maps"):
        encoder_file.check(trained, MOUSE, ())


def test_weights_that_are_not_finite_are_refused(trained):
    weights, rest = eqx.partition(trained.encoder, eqx.is_inexact_array)
    spoilt = trained._replace(encoder=eqx.combine(jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), weights), rest))
    with pytest.raises(InputError, match=r"spoilt\.encoder holds weights that are not finite"):
        encoder_file.from_bytes(encoder_file.to_bytes(spoilt), "spoilt.encoder")


def test_something_else_is_not_an_encoder(tmp_path):
    path = tmp_path / "text.encoder"
    path.write_text("weights")
    with pytest.raises(InputError, match=r"text\.encoder is not an encoder"):
        encoder_file.load(path)
    with pytest.raises(InputError, match="Cannot read encoder"):
        encoder_file.load(tmp_path / "none.encoder")


def test_a_damaged_file_is_not_an_encoder_either(trained, tmp_path):
    packed, rng = bytearray(encoder_file.to_bytes(trained)), np.random.default_rng(0)
    for place in rng.integers(len(packed), size=60):
        damaged = bytearray(packed)
        damaged[place] ^= 0x55
        try:
            encoder_file.from_bytes(bytes(damaged), "damaged.encoder")
        except InputError as error:
            assert "damaged.encoder" in str(error)
    for length in (0, 10, len(packed) // 2):
        with pytest.raises(InputError, match="damaged"):
            encoder_file.from_bytes(bytes(packed[:length]), "damaged.encoder")
