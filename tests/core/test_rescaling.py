import numpy as np
import pytest

from scansteer.core import rescaling
from scansteer.core.prediction import Prediction

MEAN = np.linspace(1000.0, 3000.0, 64)
NARROW = Prediction(MEAN, 0.02 * MEAN, 0.02 * MEAN)


def image(factor=1.0, scatter=0.01, seed=0):
    return factor * MEAN * (1 + scatter * np.random.default_rng(seed).normal(size=64))


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.3, 2.0])
def test_a_rescaled_image_gives_its_factor(factor):
    assert rescaling.factor(NARROW, image(factor)) == pytest.approx(factor, rel=0.01)


@pytest.mark.parametrize("factor", [0.95, 1.0, 1.05])
def test_an_image_as_predicted_or_nearly_so_passes(factor):
    assert rescaling.factor(NARROW, image(factor)) is None


def test_nothing_is_said_by_a_prediction_as_wide_as_the_factor():
    assert rescaling.factor(Prediction(MEAN, 0.1 * MEAN, 0.1 * MEAN), image(1.3)) is None


def test_an_error_that_differs_from_voxel_to_voxel_is_the_models_and_no_factor():
    assert rescaling.factor(NARROW, image(1.3, scatter=0.15)) is None


def test_an_image_of_another_kind_is_told_by_its_brightness_whatever_its_scatter():
    assert rescaling.factor(NARROW, 1.0 + np.arange(64.0) % 3) == pytest.approx(2 / 2000, rel=0.5)


def test_after_a_rescaled_image_the_nearer_of_two_explanations_holds():
    wide = Prediction(MEAN, 0.1 * MEAN, 0.1 * MEAN)
    assert rescaling.factor(wide, image(1.25), before=1.3) == pytest.approx(1.25, rel=0.02)
    assert rescaling.factor(wide, image(1.02), before=1.3) is None


def test_the_noise_of_single_pixels_does_not_hide_a_factor():
    noisy = Prediction(MEAN, 0.06 * MEAN, 0.01 * MEAN)
    assert rescaling.factor(noisy, image(1.15, scatter=0.06)) == pytest.approx(1.15, rel=0.03)
    assert rescaling.factor(noisy._replace(shared_sd=0.06 * MEAN), image(1.15, scatter=0.06)) is None
