"""The pulses to choose from."""

import numpy as np
import pytest

from scansteer.protocols import limits
from scansteer.protocols.builtin import BUILTIN
from scansteer.protocols.candidates import AT_LEAST, candidates, probes, what_is_lacking
from scansteer.protocols.scan import Range

PHANTOM = BUILTIN["larg-phantom-9.4T-wide"]


def with_limits(**update):
    return PHANTOM.model_copy(update={"limits": PHANTOM.limits.model_copy(update=update)})


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_every_scan_has_five_hundred_candidates_inside_its_limits(name):
    scan = BUILTIN[name]
    made = candidates(scan)
    assert len(made) >= AT_LEAST
    assert np.all(limits.within_ranges(scan.limits, scan.train, made))
    assert len(np.unique(np.stack(made, axis=1), axis=0)) == len(made)


def test_unsaturated_images_are_candidates_like_any_other():
    made = candidates(PHANTOM)
    assert np.count_nonzero(made.b1_ut == 0) == 3
    assert set(made.t_rec_s[made.b1_ut == 0]) == set(made.t_rec_s)


def test_a_solute_is_met_at_its_shift_and_opposite_to_it():
    assert {3.0, -3.0, -5.0, 5.0} <= set(candidates(PHANTOM).offset_ppm)


def test_ranges_of_one_value_leave_the_others_finer():
    fixed = {"offset_ppm": Range(lower=3, upper=3), "t_sat_s": Range(lower=2, upper=2), "t_rec_s": Range(lower=1, upper=1)}
    made = candidates(with_limits(**fixed))
    assert len(made) >= AT_LEAST
    assert set(made.offset_ppm) == {3.0} and set(made.t_sat_s) == {2.0} and set(made.t_rec_s) == {1.0}


def test_a_duty_cycle_that_leaves_no_rf_leaves_the_unsaturated_images():
    made = candidates(with_limits(duty_cycle_max=0.01))
    assert len(made) >= 1 and np.all(made.b1_ut == 0)


def test_a_range_from_zero_gives_no_block_without_duration():
    zero = Range(lower=0, upper=2)
    assert np.all(candidates(with_limits(t_sat_s=zero, t_rec_s=zero)).duration_s > 0)


def test_candidates_are_the_same_every_time():
    for first, second in zip(candidates(PHANTOM), candidates(PHANTOM), strict=True):
        assert np.array_equal(first, second)


def test_limits_in_which_every_pulse_lasts_no_time_leave_none():
    nothing = with_limits(t_sat_s=Range(lower=0, upper=0), t_rec_s=Range(lower=0, upper=0))
    assert len(candidates(nothing)) == len(probes(nothing)) == 0


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_built_in_scans_lack_no_pulses(name):
    assert what_is_lacking(BUILTIN[name]) is None


@pytest.mark.parametrize(
    ("update", "said"),
    [
        ({"duty_cycle_max": 0.01}, "leave no pulse that saturates"),
        ({"b1rms_10s_ut": 1e-3}, "leave no pulse that saturates"),
        ({"t_sat_s": Range(lower=0, upper=0)}, "leave no pulse that saturates"),
        ({"t_sat_s": Range(lower=0, upper=0), "t_rec_s": Range(lower=0, upper=0)}, "leave no pulse at all"),
    ],
)
def test_what_limits_leave_out_is_said(update, said):
    assert said in (what_is_lacking(with_limits(**update)) or "")
