"""The digital phantom: its truth, its noise, and the physics it plays."""

import numpy as np
import pytest

from scansteer.protocols.builtin import BUILTIN
from scansteer.protocols.scan import SaturationBlock, Scan
from scansteer.simulators.phantom import Magnet, Phantom, three_vials

SCAN = BUILTIN["larg-phantom-9.4T"]
MT = BUILTIN["mt-mouse-7T-30"]
IDLE = SaturationBlock(b1_ut=0.0, offset_ppm=3.0, t_sat_s=1.0, t_rec_s=60.0)


def vial_means(phantom: Phantom, image: np.ndarray) -> np.ndarray:
    """Signal over amplitude in each vial."""
    return np.array([np.mean(image[phantom.labels == n] / phantom.amplitude[phantom.labels == n]) for n in (1, 2, 3)])


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_truth_lies_within_the_scans_boxes(name: str) -> None:
    scan = BUILTIN[name]
    phantom = three_vials(scan)
    assert phantom.geometry.matrix == (scan.matrix or (64, 64, 1))
    assert {1, 2, 3} <= set(np.unique(phantom.labels))
    for quantity, span in {**scan.parameters, **scan.auxiliaries}.items():
        truth = phantom.truth(quantity)
        assert np.array_equal(np.isnan(truth), phantom.labels == 0)
        assert np.nanmin(truth) >= span.lower and np.nanmax(truth) <= span.upper


def test_truth_may_be_chosen() -> None:
    phantom = three_vials(SCAN, values={"ksw": (100.0, 200.0, 300.0)})
    assert set(phantom.truth("ksw")[phantom.labels == 2]) == {200.0}


@pytest.fixture(scope="module")
def magnet() -> Magnet:
    return Magnet(three_vials(SCAN, snr=1e6), SCAN, seed=3)


@pytest.fixture(scope="module")
def images(magnet: Magnet) -> list[np.ndarray]:
    """No saturation in equilibrium, then strong saturation, then none after a long recovery."""
    strong = SaturationBlock(b1_ut=6.0, offset_ppm=3.0, t_sat_s=3.0, t_rec_s=1.0)
    return [magnet.play(block) for block in (IDLE, strong, IDLE)]


def test_an_unsaturated_image_of_equilibrium_shows_the_amplitude(magnet: Magnet, images: list[np.ndarray]) -> None:
    np.testing.assert_allclose(vial_means(magnet.phantom, images[0]), 1.0, atol=1e-3)  # noise 1e-6


def test_saturation_lowers_the_signal_and_a_long_recovery_restores_it(magnet: Magnet, images: list[np.ndarray]) -> None:
    assert np.all(vial_means(magnet.phantom, images[1]) < 0.6)
    np.testing.assert_allclose(vial_means(magnet.phantom, images[2]), 1.0, atol=1e-3)


def test_the_first_state_is_that_just_before_the_first_saturation() -> None:
    scan = Scan.model_validate({**SCAN.model_dump(), "first_state": {"mz": 0.5}})
    magnet = Magnet(three_vials(scan, snr=1e6), scan)
    brief = IDLE.model_copy(update={"t_sat_s": 1e-6})
    np.testing.assert_allclose(vial_means(magnet.phantom, magnet.play(brief)), 0.5, atol=1e-3)  # no 60 s of recovery


def test_dummies_are_played_before_the_first_image() -> None:
    plain = Magnet(three_vials(SCAN, snr=1e6), SCAN)
    dummy_scan = Scan.model_validate({**SCAN.model_dump(), "first_state": {"mz": 1.0, "n_dummies": 1}})
    images = [plain.play(SCAN.schedule[0]) for _ in range(2)]
    after_dummy = Magnet(three_vials(SCAN, snr=1e6), dummy_scan).play(SCAN.schedule[0])
    np.testing.assert_allclose(vial_means(plain.phantom, after_dummy), vial_means(plain.phantom, images[1]), rtol=1e-4)
    assert not np.allclose(vial_means(plain.phantom, images[0]), vial_means(plain.phantom, images[1]), rtol=1e-2)


def test_noise_has_the_stated_width_and_is_reproducible() -> None:
    class Still(Magnet):
        def _read(self, block: SaturationBlock) -> np.ndarray:
            self._n_played += 1
            return np.full(3, 0.5)

        def __init__(self, phantom: Phantom, seed: int) -> None:
            self.phantom, self._seed, self._n_played, self._offset = phantom, seed, 0, 0.0

    gaussian = Still(three_vials(SCAN, snr=50.0, noise="gaussian"), 1)
    first = gaussian.play(IDLE)
    outside = gaussian.phantom.labels == 0
    assert np.std(first[outside]) == pytest.approx(gaussian.phantom.sigma, rel=0.05)  # 3 300 pixels
    rician = Still(three_vials(SCAN, snr=50.0), 1).play(IDLE)
    assert rician.min() >= 0
    assert np.mean(rician[outside]) == pytest.approx(gaussian.phantom.sigma * np.sqrt(np.pi / 2), rel=0.05)  # Rayleigh
    again = Still(three_vials(SCAN, snr=50.0, noise="gaussian"), 1)
    np.testing.assert_array_equal(first, again.play(IDLE))
    assert not np.array_equal(first, again.play(IDLE))


def test_semisolid_scans_and_volumes_are_played() -> None:
    scan = Scan.model_validate({**MT.model_dump(), "matrix": (16, 20, 3)})
    magnet = Magnet(three_vials(scan, snr=1e6), scan)
    image = magnet.play(scan.schedule[0])
    assert image.shape == (3, 20, 16)
    means = vial_means(magnet.phantom, image)
    assert np.all((means > 0.1) & (means < 0.9))
