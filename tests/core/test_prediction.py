import jax.numpy as jnp
import numpy as np
import pytest

from one_voxel import between, question
from scansteer.core import prediction
from scansteer.core.prediction import Prediction


def test_prediction_with_an_unknown_amplitude_is_that_of_a_linear_regression():
    signals, images = np.array([0.5, 0.8, 0.3]), np.array([510.0, 790.0, 305.0])
    asked = question(signals[:, None], images, 10.0, np.array([[1.0, 0.0]]))
    mean, variance = prediction.predict(asked, jnp.full((1, 1, 1, 1), 0.6))
    amplitude = signals @ images / (signals @ signals)
    assert float(mean[0]) == pytest.approx(0.6 * amplitude, rel=1e-5)  # float32
    assert float(variance[0]) == pytest.approx(100 * (1 + 0.36 / (signals @ signals)), rel=1e-4)


def test_a_narrow_posterior_predicts_from_its_mean_and_not_from_its_nearest_cell():
    images = np.array([510.0, 790.0, 305.0])
    cell, neighbour = (question(np.array(each)[:, None], images, 10.0, np.array([[1.0, 0.0]])) for each in ([0.5, 0.8, 0.3], [0.55, 0.8, 0.25]))
    asked = between(cell, neighbour, np.array([[1.25, -0.25]]))
    means = [float(prediction.predict(each, jnp.full((1, 1, 1, 1), 0.6))[0][0]) for each in (cell, neighbour)]
    mean, _ = prediction.predict(asked, jnp.full((1, 2, 1, 1), 0.6))
    assert abs(means[1] - means[0]) > 1
    assert float(mean[0]) == pytest.approx(1.25 * means[0] - 0.25 * means[1], rel=1e-5)


@pytest.mark.parametrize("shared", [0.0, 0.5, 1.0])
def test_surprise_is_one_on_average_however_much_voxels_err_together(shared):
    rng = np.random.default_rng(0)
    values = []
    for _ in range(2000):
        z = np.sqrt(shared) * rng.normal() + np.sqrt(1 - shared) * rng.normal(size=200)
        values.append(prediction.surprise(Prediction(np.full(200, 100.0), np.full(200, 2.0), np.full(200, 2.0)), 100 + 2 * z))
    assert np.mean(values) == pytest.approx(1.0, abs=0.12)  # 4 standard errors of the mean of 2000 chi-squared


def test_a_few_voxels_that_moved_do_not_surprise():
    z = np.random.default_rng(1).normal(size=200)
    clean = prediction.surprise(Prediction(np.zeros(200), np.ones(200), np.ones(200)), z)
    z[:8] = 50.0
    assert prediction.surprise(Prediction(np.zeros(200), np.ones(200), np.ones(200)), z) == pytest.approx(clean, rel=0.2)


def test_noise_averages_over_a_region_and_what_is_shared_does_not():
    made = prediction.of_region(np.full(100, 1000.0), np.full(100, 5.0**2 + 12.0**2), 12.0)
    np.testing.assert_allclose(made.sd, 13.0)
    np.testing.assert_allclose(made.shared_sd, np.sqrt(25 + 1.44))
