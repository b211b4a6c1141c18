import jax.numpy as jnp
import numpy as np
import pytest

from one_voxel import question
from scansteer.core import design, prediction
from scansteer.core.design import Draws
from scansteer.core.lattice import Box
from scansteer.core.prediction import Prediction

BOX = Box(jnp.array([0.0, 0.0]), jnp.array([0.004, 1500.0]), (56, 56))


def test_prediction_with_an_unknown_amplitude_is_that_of_a_linear_regression():
    signals, images = np.array([0.5, 0.8, 0.3]), np.array([510.0, 790.0, 305.0])
    asked = question(signals[:, None], images, 10.0, np.array([[1.0, 0.0]]))
    mean, variance = prediction.predict(asked, jnp.full((1, 1, 1, 1), 0.6), jnp.ones((1, 1)))
    amplitude = signals @ images / (signals @ signals)
    assert float(mean[0]) == pytest.approx(0.6 * amplitude, rel=1e-5)  # float32
    assert float(variance[0]) == pytest.approx(100 * (1 + 0.36 / (signals @ signals)), rel=1e-4)


def test_a_narrow_posteriors_mean_is_reached_from_its_nearest_cell_along_the_gradient():
    position = np.array([20.3, 30.6])
    mean = np.array([[float(BOX.value(axis, jnp.asarray(position[axis]))) for axis in (0, 1)]])
    narrow = np.array([[[1e-12, 0.0], [0.0, 1e-6]]])
    drawn = design.draw(np.zeros((1, BOX.n_cells), np.float32), mean, narrow, BOX, 0)
    weights = prediction.mean_weights(drawn, mean, BOX)
    row, column = np.divmod(drawn.cells[0], 56)
    assert weights[0] @ (3.0 * row - 2.0 * column) == pytest.approx(3.0 * 20.3 - 2.0 * 30.6)
    assert weights.sum() == pytest.approx(1.0)


def test_a_wide_posteriors_draws_count_as_they_were_drawn():
    drawn = Draws(np.arange(16)[None], np.full((1, 16), 1 / 16), np.zeros((1, 16, 16)))
    np.testing.assert_array_equal(prediction.mean_weights(drawn, np.array([[0.002, 700.0]]), BOX), drawn.weights)


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
