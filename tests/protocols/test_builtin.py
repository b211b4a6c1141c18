"""The built-in scans."""

import pytest

from scansteer.protocols import scan as description
from scansteer.protocols import tissue_model
from scansteer.protocols.builtin import BUILTIN, SCANS


def test_names_are_unique():
    assert len(BUILTIN) == len(SCANS)


@pytest.mark.parametrize("name", BUILTIN)
def test_every_scan_survives_yaml(name):
    assert description.from_yaml(description.to_yaml(BUILTIN[name])) == BUILTIN[name]


@pytest.mark.parametrize("name", ["mt-mouse-7T", "amide-mouse-7T", "mt-human-3T", "amide-human-3T"])
def test_mouse_and_human_scans_start_with_an_unsaturated_image_after_15_s(name):
    first, *rest = BUILTIN[name].schedule
    assert (first.b1_ut, first.duration_s) == (0, 15)
    assert len(rest) == 30
    assert all(block.duration_s == 3.5 for block in rest)


@pytest.mark.parametrize("name", ["amide-mouse-7T", "amide-human-3T"])
def test_amide_scans_take_the_semisolid_from_maps(name):
    tissue = tissue_model.tissue(BUILTIN[name], {"fss": 0.1, "kssw": 25.0})  # type: ignore[dict-item]
    amide, semisolid = tissue.pools
    assert (float(semisolid.f), float(semisolid.k)) == (0.1, 25.0)
    assert float(amide.offset_hz) == pytest.approx(3.5 * BUILTIN[name].larmor_hz_per_ppm)


def test_the_human_train_is_13_pulses_of_100_ms():
    train = BUILTIN["mt-human-3T"].train
    assert BUILTIN["mt-human-3T"].schedule[1].t_sat_s / (2 * train.n_pulses - 1) == pytest.approx(0.1)
