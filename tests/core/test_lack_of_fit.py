import numpy as np
import pytest

from scansteer.core import lack_of_fit

SIGMA = 25.0


def residuals(n_images, n_voxels=500, ratio=1.0, shared=0, seed=0):
    """Residual sums of squares of a model that holds; some directions are one draw for all voxels."""
    rng = np.random.default_rng(seed)
    own = rng.chisquare(n_images - 3 - shared, n_voxels) if n_images - 3 > shared else 0.0
    return ratio * SIGMA**2 * (own + (rng.chisquare(shared) if shared else 0.0) + np.zeros(n_voxels))


def check(residual, n_images, record=None, **kwargs):
    amplitude = np.full(len(residual), 4000.0)
    return lack_of_fit.check(residual, amplitude, SIGMA, kwargs.pop("discrepancy", 0.0), n_images, record or lack_of_fit.init(), **kwargs)


@pytest.mark.parametrize("dof", [1, 2, 5, 30])
def test_quantile_is_that_of_chi_squared(dof):
    known = {1: 10.83, 2: 13.82, 5: 20.52, 30: 59.70}  # tables, 99.9 %
    assert lack_of_fit.quantile(dof) == pytest.approx(known[dof], rel=0.035)


def test_a_model_that_holds_passes_and_one_that_does_not_fails():
    for n in (8, 15, 30):
        assert check(residuals(n), n).passed
        assert not check(residuals(n, ratio=2.5), n).passed


def test_a_refusal_holds_although_later_images_fit():
    bad, good = check(residuals(8, ratio=2.5), 8), check(residuals(20), 20)
    assert (bad.passed, good.passed) == (False, True)
    record = lack_of_fit.judged(lack_of_fit.init(), good, 6)
    assert check(residuals(8), 8, record).passed
    record = lack_of_fit.judged(record, bad, 8)
    assert not check(residuals(20), 20, record).passed
    assert lack_of_fit.judged(record, check(residuals(20), 20, record), 20).refused_at == 8
    assert lack_of_fit.update(record, 1.0).refused_at == 8


def test_nothing_is_said_while_nothing_is_left_over():
    found = check(np.zeros(10), 3)
    assert found.statistic is None
    assert found.passed


def test_what_voxels_share_is_judged_as_one_draw():
    """Of 400 scans of five images whose two residual directions are shared, a bound for noise alone would refuse two thirds."""
    passed = [check(residuals(5, shared=2, seed=seed), 5, n_shared=2).passed for seed in range(400)]
    assert np.mean(passed) > 0.98
    alone = [check(residuals(5, shared=2, seed=seed), 5).passed for seed in range(400)]
    assert np.mean(alone) < 0.9


def test_a_single_voxel_is_judged_by_its_own_scatter():
    passed = [check(residuals(6, n_voxels=1, seed=seed), 6).passed for seed in range(400)]
    assert np.mean(passed) > 0.98


def test_discrepancy_is_allowed_and_shared():
    rng = np.random.default_rng(3)
    passed = [check(np.full(300, SIGMA**2 + 50.0**2 * rng.chisquare(2) / 2) * 2, 5, discrepancy=50 / 4000).passed for _ in range(300)]
    assert np.mean(passed) > 0.98


def test_surprising_images_are_refused_although_the_fit_absorbed_them():
    record = lack_of_fit.init()
    for _ in range(8):
        record = lack_of_fit.update(record, 1.0)
    assert check(residuals(9), 9, record).passed
    record = lack_of_fit.update(record, 25.0)
    found = check(residuals(10), 10, record)
    assert not found.passed
    assert found.prediction == pytest.approx(33 / 9)


def test_predictions_of_a_model_that_holds_are_seldom_refused_at_any_image():
    """All voxels err together: the worst case. 30 images, refused at any of them in at most 2 % of scans."""
    rng, refused = np.random.default_rng(5), 0
    for _ in range(500):
        record, failed = lack_of_fit.init(), False
        for value in rng.chisquare(1, 29):
            record = lack_of_fit.update(record, value)
            failed |= not check(np.zeros(5), 3, record).passed
        refused += failed
    assert refused / 500 <= 0.02


def test_what_lies_beyond_its_range_is_a_refusal_that_names_it():
    fits = check(residuals(20), 20)
    assert lack_of_fit.within_ranges(fits, {"b0_ppm": 1.9, "offset": -np.inf}) == fits
    assert lack_of_fit.within_ranges(fits, {}) == fits
    assert lack_of_fit.within_ranges(fits, {"b0_ppm": np.nan, "offset": 1.0}) == fits
    found = lack_of_fit.within_ranges(fits, {"b1_relative": 2.5, "b0_ppm": 4.0, "offset": -np.inf})
    assert (found.passed, found.outside) == (False, "b0_ppm")
    record = lack_of_fit.judged(lack_of_fit.init(), found, 12)
    assert (record.refused_at, record.outside) == (12, "b0_ppm")
    assert lack_of_fit.judged(record, check(residuals(20), 20, record), 13) == record


def test_what_may_lie_beyond_its_range_is_in_doubt():
    assert lack_of_fit.doubtful({"b0_ppm": 1.9, "offset": 1.7, "b1_relative": np.nan}) == "b0_ppm"
    assert lack_of_fit.doubtful({"b0_ppm": 1.5, "offset": -np.inf}) is None


def test_a_refusal_for_another_reason_still_learns_what_lies_beyond_its_range():
    bad = check(residuals(8, ratio=2.5), 8)
    record = lack_of_fit.judged(lack_of_fit.init(), bad, 8)
    found = lack_of_fit.within_ranges(bad, {"b0_ppm": 4.0})
    assert lack_of_fit.judged(record, found, 12) == record._replace(outside="b0_ppm")
