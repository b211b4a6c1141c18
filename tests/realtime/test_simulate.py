"""`scansteer simulate`: scans by name, sequences by file."""

import json

import numpy as np
import pytest

from scansteer.core.errors import InputError
from scansteer.protocols.builtin import BUILTIN
from scansteer.realtime.simulate import simulate_scan, simulate_sequence

LARG = BUILTIN["larg-phantom-9.4T"]


def test_a_scan_gives_one_number_per_image_and_is_json():
    found = simulate_scan(LARG, {"f": 1.5e-3, "k": 300})
    assert all(len(found[name]) == 30 for name in ("mz_water", "mxy_abs", "offset_ppm"))
    assert json.loads(json.dumps(found)) == found
    np.testing.assert_allclose(found["mxy_abs"], np.sin(np.pi / 3) * np.array(found["mz_water"]))


def test_generic_names_stand_for_the_scans_own():
    assert simulate_scan(LARG, {"f": 1.5e-3, "k": 300}) == simulate_scan(LARG, {"fs": 1.5e-3, "ksw": 300})


def test_more_exchanging_protons_mean_less_signal():
    little, much = (simulate_scan(LARG, {"f": f, "k": 300})["mz_water"] for f in (1e-4, 3e-3))
    assert np.all(np.array(much)[:17] < np.array(little)[:17])


def test_dummy_repetitions_are_played_and_not_reported():
    described = LARG.model_copy(update={"first_state": LARG.first_state.model_copy(update={"n_dummies": 30})})
    assert len(simulate_scan(described, {})["mz_water"]) == 30
    # after thirty repetitions of the first pulse the second image of it is like the first
    first, second, *_ = simulate_scan(described, {})["mz_water"]
    assert first == pytest.approx(second, abs=1e-4)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"q": 1.0}, "no such quantity; it has .*b0_ppm.*ksw"),
        ({"f": 1e-3, "fs": 1e-3}, "given twice"),
        ({"f": float("nan")}, "finite"),
        ({"f": -1e-3}, "out of range"),
        ({"t1_s": 0.0}, "out of range"),
        ({"amine_t2_s": 0.0}, "out of range"),
    ],
)
def test_wrong_quantities_are_refused_in_one_sentence(values, says):
    with pytest.raises(InputError, match=says) as error:
        simulate_scan(LARG, values)
    assert "\n" not in str(error.value)


SEQUENCE = """[VERSION]
major 1
minor 3
revision 0
[DEFINITIONS]
offsets_ppm 1000
[BLOCKS]
1 1 0 0 0 0 0 0
2 0 0 0 0 0 1 0
[ADC]
1 1 1000000 0 0 0
[DELAYS]
1 1000000"""


def test_a_sequence_is_played_on_a_model(tmp_path):
    (tmp_path / "wait.seq").write_text(SEQUENCE)
    (tmp_path / "water.yaml").write_text("water_pool: {f: 1, t1: 2, t2: 0.1}\nb0: 3\nscale: 0\n")
    found = simulate_sequence(tmp_path / "wait.seq", tmp_path / "water.yaml")
    np.testing.assert_allclose(found["mz_water"], [1 - np.exp(-0.5)], rtol=1e-12)
    assert found["offset_ppm"] == [1000.0]
    assert found["mxy_abs"] == [0.0]


def test_missing_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.seq"):
        simulate_sequence("nowhere.seq", "nowhere.yaml")
    (tmp_path / "wait.seq").write_text(SEQUENCE)
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        simulate_sequence(tmp_path / "wait.seq", "nowhere.yaml")
