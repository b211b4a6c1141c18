"""The two published scans, replayed. Their figures check arithmetic against the publishers' description, not truth."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from scansteer.core import resolution
from scansteer.core.noise import NoiseEstimate
from scansteer.protocols.scan import Scan, load
from scansteer.realtime.images import Frame
from scansteer.realtime.messages import Decision
from scansteer.realtime.reference import Reference
from scansteer.realtime.session import Session
from scansteer.realtime.sources import open_source
from scansteer.realtime.worker import Setup

VIALS = ((24, 18), (25, 44), (44, 30))


class Replay:
    """A scan replayed over the publishers' mask."""

    def __init__(self, folder: Path, file: str, scan: Scan, n_images: int | None = None) -> None:
        self.truth = dict(np.load(folder / f"{file}.truth.npz"))
        self.scan = scan
        self.decisions: list[Decision] = []
        self.estimates, self.halfwidths = [], []
        with open_source(folder / f"{file}.h5") as source:
            auxiliaries = {stored.frame.role: stored.frame for stored in source.auxiliaries()}
            frames = [stored.frame for stored in source.images()][:n_images]
        mask = Frame(self.truth["mask"][None].astype(float), frames[0].geometry, role="mask")
        session = Session(Setup("replay", scan, region=mask, auxiliaries=auxiliaries))
        for frame in frames:
            self.decisions.append(session.absorb(frame, received_at=0.0))
            maps = {name: values[0][self.truth["mask"]] for name, values in session.maps().items()}
            names = scan.parameter_names
            self.estimates.append([maps[f"{name}_map"] for name in names])
            self.halfwidths.append([(maps[f"{name}_upper"] - maps[f"{name}_lower"]) / 2 for name in names])
        self.nrmse = maps["nrmse"]
        self.n_points = session._reference.prior.box.n_points
        self.signals = np.stack([frame.pixels[0][self.truth["mask"]] for frame in frames])
        session.close()

    def bounded(self) -> np.ndarray:
        """Share of voxels whose error against the last image lies within the half-width, (image 3 .. 29, parameter)."""
        estimates, halfwidths = np.array(self.estimates), np.array(self.halfwidths)
        return np.mean(np.abs(estimates[2:29] - estimates[29]) <= halfwidths[2:29], axis=2)


@pytest.fixture(scope="module")
def phantom(real_scans: Path) -> Replay:
    return Replay(real_scans, "larg_phantom_9T4", load("larg-phantom-9.4T"))


@pytest.fixture(scope="module")
def mouse(real_scans: Path) -> Replay:
    return Replay(real_scans, "mouse_mt_7T", load("mt-mouse-7T-30"))


def test_phantom_meets_its_publishers_medians(phantom):
    mask = phantom.truth["mask"]
    rows, columns = np.nonzero(mask)
    f, k = phantom.estimates[-1]
    for row, column in VIALS:
        vial = (rows - row) ** 2 + (columns - column) ** 2 < 130
        assert np.median(f[vial]) == pytest.approx(np.median(phantom.truth["peer_fs"][mask][vial]), rel=0.10)
        assert np.median(k[vial]) == pytest.approx(np.median(phantom.truth["peer_ksw"][mask][vial]), rel=0.20)
    assert np.median(phantom.nrmse) <= 0.02


def test_published_description_of_the_phantom_is_refused_for_lack_of_fit(phantom):
    assert all(not decision.lack_of_fit.passed for decision in phantom.decisions[11:])
    assert all(decision.action == "continue" for decision in phantom.decisions)


@pytest.mark.parametrize("name", ["phantom", "mouse"])
def test_every_image_of_a_real_scan_counts_and_no_voxel_is_said_to_have_moved(name, request):
    decisions = request.getfixturevalue(name).decisions
    assert [decision.n_images for decision in decisions] == list(range(1, 31))
    assert max(region.fraction_moved for decision in decisions for region in decision.regions) < 0.01


def test_lattices_are_as_fine_as_the_scans_need(phantom, mouse):
    """The phantom's posteriors get narrower: its description states less discrepancy, and fewer ranges."""
    assert phantom.n_points == resolution.FINE
    assert mouse.n_points == resolution.COARSE


def test_mouse_fits_and_lies_where_it_should(mouse):
    assert np.median(mouse.nrmse) <= 0.03
    assert 0.08 <= np.median(mouse.estimates[-1][0]) <= 0.14


def test_mouse_errors_of_stopping_early_lie_within_the_intervals(mouse):
    assert np.all(mouse.bounded().mean(axis=0) >= 0.95)
    assert mouse.bounded().min() >= 0.85


def test_first_images_alone_give_the_same_decisions(phantom, real_scans):
    again = Replay(real_scans, "larg_phantom_9T4", phantom.scan, n_images=6)
    timed = {"latency_ms", "margin_ms"}
    expected = [decision.model_dump(exclude=timed) for decision in phantom.decisions[:6]]
    assert [decision.model_dump(exclude=timed) for decision in again.decisions] == expected


@pytest.mark.long
def test_wide_description_of_the_phantom_bounds_its_errors(real_scans):
    wide = Replay(real_scans, "larg_phantom_9T4", load("larg-phantom-9.4T-wide"))
    assert wide.n_points == resolution.COARSE
    assert np.all(wide.bounded().mean(axis=0) >= 0.95)
    assert wide.bounded().min() >= 0.85
    assert all(decision.lack_of_fit.passed for decision in wide.decisions)
    assert wide.decisions[-1].n_images == 30


@pytest.mark.parametrize("n", [10, 30])
def test_region_areas_agree_with_a_dense_grid(phantom, n):
    """95 % areas of 50 voxels against sorting the cells of a 200 x 200 grid over the box, uniform in f and k."""
    voxels = np.linspace(0, phantom.signals.shape[1] - 1, 50).astype(int)
    signals = phantom.signals[:n, voxels]
    ours = absorbed(phantom.scan, signals)
    fine = absorbed(phantom.scan, signals, (200, 200))
    box = fine.box
    steps = jnp.arange(200, dtype=jnp.float64)
    cell = np.outer(np.gradient(np.array(box.value(0, steps))), np.gradient(np.array(box.value(1, steps)))).ravel()
    areas = []
    for log_posterior in fine.log_posterior.astype(float):
        mass = np.exp(log_posterior - log_posterior.max()) * cell
        order = np.argsort(log_posterior)[::-1]
        inside = np.searchsorted(np.cumsum(mass[order]) / mass.sum(), 0.95)
        areas.append(cell[order[: inside + 1]].sum())
    ratio = ours.info.summary.cr_area / np.array(areas)
    assert np.median(ratio) == pytest.approx(1, abs=0.05)
    assert np.mean(np.abs(ratio - 1) < 0.05) > 0.85  # the dense grid itself counts whole cells


class Absorbed:
    def __init__(self, box, info, log_posterior) -> None:
        self.box, self.info, self.log_posterior = box, info, log_posterior


def absorbed(scan: Scan, signals: np.ndarray, n_points: tuple[int, int] | None = None) -> Absorbed:
    reference = Reference(scan, [], n_points=n_points or resolution.FINE)
    reference.begin({}, signals[0])
    for number, (signal, block) in enumerate(zip(signals, scan.schedule, strict=False)):
        info = reference.absorb(reference.play(block, first=number == 0), signal, NoiseEstimate(25.0, 1e4))
    reference.close()
    return Absorbed(reference.prior.box, info, reference.log_posterior(np.arange(signals.shape[1])))
