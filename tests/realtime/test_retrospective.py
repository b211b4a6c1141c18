"""A scan of the digital phantom looked back upon twice; the causal maps are made up."""

from __future__ import annotations

import numpy as np
import pytest

from scansteer.protocols.larg_phantom import PUBLISHED
from scansteer.protocols.scan import Range
from scansteer.realtime import figures, report
from scansteer.realtime.images import Frame
from scansteer.realtime.messages import Decision, LackOfFit, Latency, ParameterReport, RegionReport
from scansteer.realtime.retrospective import Comparison, Recorder, TooFewImages, clipped
from scansteer.simulators.phantom import Magnet, Phantom, three_vials

SCAN = PUBLISHED.model_copy(update={"matrix": (24, 24, 1), "schedule": tuple(PUBLISHED.schedule[i] for i in (17, 0, 2, 10, 5, 7, 3, 18))})
TRUE = {name: (0.5 * (span.lower + span.upper),) * 3 for name, span in SCAN.auxiliaries.items()}


def decision(n: int, repetition: int, areas: dict[int, float | None] | None = None) -> Decision:
    """`areas`: number of voxels and median area of each region."""
    parameter = ParameterReport(median=0.1, ci_lower=0.1, ci_upper=0.2, ci_halfwidth_relative=0.1, fraction_prior_limited=0.0)
    regions = tuple(
        RegionReport(
            name=f"region {n_voxels}", n_voxels=n_voxels, parameters={"fs": parameter, "ksw": parameter}, cr_area_median=area, cr_area_p90=area,
            cr_shrinkage=None, anytime_area_median=None, fraction_converged=0.0,
        )
        for n_voxels, area in (areas or {9: 0.1 / n}).items()
    )  # fmt: skip
    return Decision(
        session_id="s", sequence_number=repetition, repetition=repetition, n_images=n, n_planned=8, action="continue", reason="-", would_stop_at=None,
        regions=regions, next_pulse=None, lack_of_fit=LackOfFit(statistic=None, passed=True), posterior_source="reference", audit=None,
        valid_until_repetition=repetition + 1, latency_ms=Latency(receive=0, update=0, decide=0, total=0), margin_ms=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return three_vials(SCAN, noise="gaussian", snr=300.0, values=TRUE)


@pytest.fixture(scope="module")
def comparison(phantom: Phantom) -> Comparison:
    """Image 3 was left out."""
    magnet, recorder, inside = Magnet(phantom, SCAN, seed=1), Recorder(SCAN), phantom.labels > 0
    names = [f"{name}_{kind}" for name in ("fs", "ksw") for kind in ("map", "lower", "upper")]
    maps = {name: np.where(inside, value, np.nan) for value, name in enumerate([*names, "nrmse"], start=1)}
    for repetition, block in enumerate(SCAN.schedule):
        n_images = repetition + (repetition < 3)
        areas = {1: {30: 0.2, 10: None, 60: 0.5}, 2: {30: None, 10: None}}.get(n_images)
        recorder.note(Frame(magnet.play(block), phantom.geometry, repetition=repetition), decision(n_images, repetition, areas), maps)
    found = recorder.compare({})
    assert isinstance(found, Comparison)
    return found


def test_the_whole_scan_gives_the_truth_and_what_came_in_between_is_kept(comparison: Comparison, phantom: Phantom) -> None:
    inside = np.flatnonzero(phantom.labels)
    sampled = inside[np.linspace(0, len(inside) - 1, comparison.n_voxels).astype(int)]
    for axis, name in enumerate(("fs", "ksw")):
        truth = phantom.truth(name).reshape(-1)[sampled]
        assert np.median(np.abs(comparison.whole.estimate[-1, :, axis] / truth - 1)) < 0.1
    assert len(comparison.whole.area) == len(comparison.causal.area) == 7
    np.testing.assert_allclose(comparison.causal.area, [0.4, np.nan, *0.1 / np.arange(3, 8)])  # (30 x 0.2 + 60 x 0.5) / 90; of no region
    np.testing.assert_allclose(comparison.causal.halfwidth[0, 0], [0.5, 0.5])  # made-up maps: 1, 2, 3 and 4, 5, 6
    np.testing.assert_allclose(comparison.whole.error[-1], 0.0)


def test_maps_cover_the_region_at_a_few_numbers_of_images(comparison: Comparison, phantom: Phantom) -> None:
    assert comparison.shown_at == (3, 4, 7)
    assert comparison.whole.on_maps.shape == (3, np.count_nonzero(phantom.labels), 2)
    rows, columns = comparison.places.T
    assert np.all(phantom.labels[0, rows, columns] > 0)


def test_a_report_shows_both_views_and_says_what_they_are(comparison: Comparison) -> None:
    decisions = [decision(n, n - 1) for n in range(1, 8)]
    page = report.render(decisions, {}, {"scan": "x"}, comparison)
    assert "Looking back: causal, and normalised by the whole scan" in page
    assert "could not have been had" in page
    assert "on the left over all voxels" in page
    drawn = figures.courses(comparison)
    assert drawn.count("within the half-width") == 4
    assert "B1 [uT]" in drawn
    assert page.count("<img") == report.render(decisions, {}, {"scan": "x"}).count("<img") + 2


def test_the_pulses_are_those_of_the_images_that_count(comparison: Comparison) -> None:
    assert comparison.pulses == tuple(block for number, block in enumerate(SCAN.schedule) if number != 3)


def test_of_too_few_images_the_report_says_so() -> None:
    nothing = Recorder(SCAN).compare({})
    assert nothing == TooFewImages(0)
    page = report.render([decision(n, n - 1) for n in (1, 2, 3)], {}, {"scan": "x"}, TooFewImages(3))
    assert "takes at least 4 images that count, and there were 3." in page
    assert "Looking back" not in report.render([decision(1, 0)], {}, {"scan": "x"})


def test_maps_are_kept_within_the_scans_range() -> None:
    np.testing.assert_array_equal(clipped(np.array([0.0, 2.0, 9.0, np.nan]), Range(lower=1.0, upper=3.0)), [1, 2, 3, 2])
