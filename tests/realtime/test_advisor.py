"""Whose posteriors the next pulse is chosen for."""

import numpy as np
import pytest

from scansteer.realtime.advisor import N_VOXELS, sampled

VALUES = np.random.default_rng(0).uniform(size=(5000, 2))


def test_every_region_is_asked_and_counts_for_half_by_itself_and_half_by_its_size():
    regions = [np.arange(4000), np.arange(4000, 4006), np.arange(4006, 5000)]
    voxels, importance = sampled(regions, VALUES)
    assert voxels.shape == importance.shape == (N_VOXELS,)
    assert importance.sum() == pytest.approx(1.0)
    for region in regions:
        assert importance[np.isin(voxels, region)].sum() == pytest.approx(0.5 / 3 + 0.5 * len(region) / 5000)


def test_few_voxels_fill_up_without_counting_twice():
    voxels, importance = sampled([np.arange(5)], VALUES)
    assert set(voxels[importance > 0]) == set(range(5))
    assert np.count_nonzero(importance) == 5
    assert importance.sum() == pytest.approx(1.0)


def test_an_empty_region_is_no_region():
    voxels, importance = sampled([np.zeros(0, int), np.arange(100)], VALUES)
    assert np.isin(voxels, np.arange(100)).all()
    assert importance.sum() == pytest.approx(1.0)
