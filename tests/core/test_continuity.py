import numpy as np
import pytest

from scansteer.core import continuity

N_VOXELS, SIGMA = 400, 15.0


def scan(n_images=16, seed=0, sigma=SIGMA):
    """Images that span amplitude and two contrasts; every voxel follows the same course."""
    rng = np.random.default_rng(seed)
    amplitude = rng.uniform(1500, 3000, N_VOXELS)
    tissue = np.stack([np.ones(N_VOXELS), rng.uniform(-1, 1, N_VOXELS), rng.uniform(-1, 1, N_VOXELS)])
    weights = np.stack([rng.uniform(0.5, 1, n_images), rng.uniform(-0.1, 0.1, n_images), rng.uniform(-0.1, 0.1, n_images)])
    return weights.T @ (tissue * amplitude) + sigma * rng.normal(size=(n_images, N_VOXELS))


def follow(images):
    """State at the end, and the images that departed as a whole."""
    state, left_out = continuity.init(images.shape[1]), []
    for number, image in enumerate(images):
        departure = continuity.compare(state, image)
        if departure is not None and departure.of_all:
            left_out.append(number)
        else:
            state = continuity.update(state, image, departure)
    return state, left_out


@pytest.mark.parametrize("sigma", [0.0, SIGMA, 60.0])
def test_a_steady_subject_raises_no_alarm(sigma):
    for seed in range(5):
        state, left_out = follow(scan(seed=seed, sigma=sigma))
        assert not left_out
        assert not state.moved.any()


def test_voxels_that_become_other_tissue_are_found_and_no_others():
    images = scan()
    images[8:, :10] = 0.5 * images[8:, :10] + 0.5 * images[8:, 100:110] * 1.3
    state, left_out = follow(images)
    assert not left_out
    assert np.mean(state.moved[:10]) >= 0.5  # the others' new tissue is too much like the old one
    assert not state.moved[10:].any()


def test_one_bad_image_does_not_condemn_a_voxel():
    images = scan()
    images[9, :5] *= 1.5
    state, _ = follow(images)
    assert not state.moved.any()


def test_a_restless_voxel_is_measured_by_itself():
    images = scan()
    images[:, :4] += 5 * SIGMA * np.random.default_rng(4).normal(size=(16, 4))
    state, left_out = follow(images)
    assert not left_out
    assert not state.moved.any()


def test_a_subject_that_moved_is_told_from_then_on():
    images = scan()
    images[10:] = np.roll(images[10:], 37, axis=1)
    assert follow(images)[1] == list(range(10, 16))


def test_a_damaged_image_is_left_out_and_the_scan_goes_on():
    images = scan()
    images[10] = np.random.default_rng(2).uniform(0, 3000, N_VOXELS)
    assert follow(images)[1] == [10]


def test_a_common_factor_is_not_this_checks_business():
    images = scan()
    images[10] *= 1.3
    assert follow(images)[1] == []


def test_nothing_is_said_of_few_images_or_few_voxels():
    images = scan()
    state, _ = follow(images[:4])
    assert continuity.compare(state, images[4]) is None
    few = images[:, :10]
    state, _ = follow(few[:9])
    assert continuity.compare(state, few[9]) is None


def test_the_gram_matrix_is_that_of_the_history():
    state, _ = follow(scan())
    np.testing.assert_allclose(state.gram, state.history @ state.history.T, rtol=1e-12)
