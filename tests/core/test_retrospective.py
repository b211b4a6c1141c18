import numpy as np

from scansteer.core import retrospective


def test_the_true_cell_wins_whatever_the_amplitude_and_the_last_misfit_sets_the_width():
    rng = np.random.default_rng(0)
    dictionary = rng.uniform(0.2, 1.0, (1, 12, 30))
    signals = np.stack([700 * dictionary[0, :, 4], 30 * dictionary[0, :, 17]]) * (1 + 0.01 * rng.normal(size=(2, 12)))
    posteriors = np.asarray(retrospective.log_posteriors(signals, dictionary))
    assert posteriors.shape == (12, 2, 30)
    np.testing.assert_array_equal(posteriors[-1].argmax(axis=1), [4, 17])
    np.testing.assert_allclose(posteriors[-1].max(axis=1), -0.5 * 12)  # the misfit of the best cell is the noise itself


def test_early_posteriors_know_the_norm_of_later_images():
    dictionary = np.array([[[1.0, 1.0], [1.0, 3.0]]])  # two cells that differ in the second image alone
    first, _ = np.asarray(retrospective.log_posteriors(np.array([[1.0, 1.2]]), dictionary))
    assert first[0, 0] > first[0, 1]  # a causal posterior of one image could not tell them apart
