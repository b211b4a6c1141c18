import numpy as np
import pytest

from scansteer.core import noise


def images(n_voxels=600, n_images=12, sigma=20.0, seed=0):
    """Voxels that differ in amplitude and two parameters."""
    rng = np.random.default_rng(seed)
    shapes = rng.uniform(0.3, 0.9, (3, n_images))
    amounts = np.stack([rng.uniform(3000, 6000, n_voxels), rng.normal(0, 300, n_voxels), rng.normal(0, 100, n_voxels)])
    return (amounts.T @ shapes + sigma * rng.standard_normal((n_voxels, n_images))).T


@pytest.mark.parametrize("n", [5, 8, 12])
def test_noise_is_found_from_the_voxel_to_voxel_part(n):
    seen = images()[:n]
    assert noise.from_images(seen @ seen.T, seen.shape[1]).sigma == pytest.approx(20.0, rel=0.05)


def test_an_error_that_all_voxels_share_is_not_noise():
    seen = images()
    seen = seen * (1 + 0.05 * np.sin(np.arange(len(seen))))[:, None]
    assert noise.from_images(seen @ seen.T, seen.shape[1]).sigma == pytest.approx(20.0, rel=0.05)


def test_correlated_neighbours_cost_degrees_of_freedom():
    seen = images()
    full, half = (noise.from_images(seen @ seen.T, seen.shape[1], share) for share in (1.0, 0.5))
    assert half.sigma == full.sigma
    assert half.dof == pytest.approx(full.dof / 2)


@pytest.mark.parametrize("seen", [images()[:1], images(n_voxels=2)])
def test_too_little_to_learn_from_is_said(seen):
    estimate = noise.from_images(seen @ seen.T, seen.shape[1])
    assert estimate.dof == 1.0
    assert estimate.sigma > 0


def test_images_without_noise_give_a_finite_answer():
    seen = images(sigma=0.0)
    assert noise.from_images(seen @ seen.T, seen.shape[1]).sigma > 0
