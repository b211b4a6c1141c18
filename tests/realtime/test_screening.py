"""Images and voxels that should not count, on a scan of a few contrasts."""

from __future__ import annotations

import numpy as np
import pytest

from scansteer.core.prediction import Prediction
from scansteer.realtime.images import Frame, Geometry
from scansteer.realtime.screening import Foresight, Screen

GEOMETRY = Geometry((20, 20, 1))


def images(n: int = 12, sigma: float = 15.0) -> np.ndarray:
    rng = np.random.default_rng(0)
    amplitude, contrast = rng.uniform(1500, 3000, 400), rng.uniform(-1, 1, 400)
    course = np.stack([rng.uniform(0.5, 1, n), rng.uniform(-0.1, 0.1, n)])
    return course.T @ (np.stack([np.ones(400), contrast]) * amplitude) + sigma * rng.normal(size=(n, 400))


def frame(pixels: np.ndarray, repetition: int, **kwargs) -> Frame:
    return Frame(pixels.reshape(1, 20, 20), GEOMETRY, repetition=repetition, **kwargs)


def foresight(expected: np.ndarray) -> Foresight:
    voxels = np.arange(0, 400, 7)
    return Foresight(voxels, Prediction(expected[voxels], 0.02 * expected[voxels], 0.02 * expected[voxels]))


def follow(signals: np.ndarray, n: int) -> Screen:
    """A screen that has seen the first `n` images."""
    screen = Screen()
    screen.begin(400)
    for number, signal in enumerate(signals[:n]):
        one = frame(signal, number)
        assert screen.look(one, signal, None, True) is None
        screen.keep(one, signal)
    return screen


@pytest.mark.parametrize(("kwargs", "said"), [({"is_dummy": True}, "dummy"), ({"role": "mask"}, "'mask'"), ({"role": "other"}, "'other'")])
def test_an_image_that_declares_itself_something_else_is_named(kwargs, said):
    assert said in Screen().declared(frame(np.ones(400), 3, **kwargs))
    assert Screen().declared(frame(np.ones(400), 3)) is None


def test_a_duplicate_is_named_with_the_image_that_it_repeats():
    signals = images()
    assert "duplicate, pixel by pixel, of that of repetition 1" in follow(signals, 4).look(frame(signals[1], 4), signals[1], None, True)


@pytest.mark.parametrize("is_masked", [True, False])
def test_a_duplicate_is_found_in_a_region_of_few_voxels_too(is_masked):
    signals = images()
    if is_masked:  # all else is zero
        signals[:, 8:] = 0.0
    screen = Screen()
    screen.begin(8)
    for number in (0, 1):
        assert screen.look(frame(signals[number], number), signals[number, :8], None, True) is None
        screen.keep(frame(signals[number], number), signals[number, :8])
    assert "duplicate" in screen.look(frame(signals[0], 2), signals[0, :8], None, True)


def test_a_duplicate_is_found_in_a_large_image_of_whole_numbers():
    volume = np.round(np.random.default_rng(0).normal(900.0, 60.0, (4, 128, 128)))
    one, again = (Frame(volume, Geometry(volume.shape), repetition=number) for number in (0, 1))
    screen = Screen()
    screen.begin(volume.size)
    screen.keep(one, volume.reshape(-1))
    assert "duplicate" in screen.look(again, volume.reshape(-1), None, True)


def test_images_without_noise_may_repeat():
    signals = images(sigma=0.0)
    assert follow(signals, 8).look(frame(signals[7], 8), signals[7], None, True) is None
    vials = 1000.0 * (1 + np.arange(400) // 134)
    assert follow(np.stack([vials, 0.9 * vials]), 2).look(frame(vials, 2), vials, None, True) is None


def test_a_rescaled_image_is_left_out_if_the_model_is_trusted():
    signals = images()
    screen, expected = follow(signals, 8), foresight(signals[8])
    assert "1.3 times what was expected" in screen.look(frame(1.3 * signals[8], 8), 1.3 * signals[8], expected, True)
    assert screen.look(frame(1.3 * signals[8], 8), 1.3 * signals[8], expected, False) is None
    assert screen.look(frame(signals[8], 8), signals[8], expected, True) is None
    assert "left out" in screen.look(frame(0.01 * signals[8], 8), 0.01 * signals[8], expected, True)


def test_a_subject_that_moved_is_said_if_the_model_did_not_foresee_it():
    signals = images()
    moved = np.roll(signals[8], 57)
    assert "the subject moved" in follow(signals, 8).look(frame(moved, 8), moved, foresight(signals[8]), True)


def test_a_contrast_that_no_earlier_image_showed_counts():
    """As the model foresees it, or where the model cannot say: then its misfit vetoes stops."""
    signals = images()
    new = signals[8] * np.random.default_rng(1).uniform(0.7, 1.0, 400)
    screen = follow(signals, 8)
    assert screen.look(frame(new, 8), new, foresight(new), True) is None
    assert screen.look(frame(new, 8), new, foresight(signals[8]), False) is None
    assert screen.look(frame(new, 8), new, None, True) is None
    screen.keep(frame(new, 8), new)
    np.testing.assert_array_equal(screen.history[8], new)


def test_voxels_that_moved_are_counted_once_and_only_where_the_model_does_not_explain_them():
    signals = images()
    signals[8:, :6] *= 1.4
    screen, said, unexplained = follow(signals, 8), [], np.arange(400) < 4
    for number in (8, 9, 10):
        one = frame(signals[number], number)
        assert screen.look(one, signals[number], None, True) is None
        screen.keep(one, signals[number])
        said.append(screen.judge(unexplained))
    assert said[0] is None
    assert "4 voxels (1.0% of the region) moved" in said[1]
    assert said[2] is None
    np.testing.assert_array_equal(screen.moved, unexplained)
    np.testing.assert_array_less(np.abs(screen.history[8:, :6] * 1.4 - signals[8:11, :6]), 300)  # as expected, not as it came


def test_many_images_that_were_not_expected_put_the_model_in_doubt():
    signals = images()
    screen = follow(signals, 8)
    for number, factor in ((8, 1.3), (9, 1.0), (10, 1.6)):
        assert screen.doubt is None
        screen.look(frame(factor * signals[number], number), factor * signals[number], foresight(signals[number]), True)
    assert screen.doubt is None  # 2 of 11
    screen.look(frame(2.0 * signals[11], 11), 2.0 * signals[11], foresight(signals[11]), True)
    assert "3 of 12 images" in screen.doubt


def test_duplicates_are_no_evidence_against_the_model():
    signals = images()
    screen = follow(signals, 4)
    for number in range(4, 9):
        assert "duplicate" in screen.look(frame(signals[1], number), signals[1], None, True)
    assert screen.doubt is None
