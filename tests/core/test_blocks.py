import numpy as np

from scansteer.core import blocks


def test_every_voxel_has_a_place_and_the_last_block_is_padded():
    values = np.random.default_rng(0).uniform(1, 3, 150)
    place = blocks.of_like_voxels([values], 64)
    assert place.shape == (3, 64)
    assert set(place.ravel()) == set(range(150))


def test_voxels_of_a_block_are_alike():
    rng = np.random.default_rng(0)
    t1, t2 = rng.uniform(1, 2, 1024), rng.uniform(0.04, 0.08, 1024)
    place = blocks.of_like_voxels([t1, t2], 64)
    spread = np.array([np.ptp(np.log(t1[each])) for each in place])
    assert np.median(spread) < 0.5 * np.ptp(np.log(t1))
