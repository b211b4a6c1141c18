"""The posterior of a region's mean signal, on made-up vials whose truth is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from scansteer.core import resolution
from scansteer.core.noise import NoiseEstimate
from scansteer.protocols.larg_phantom import PUBLISHED
from scansteer.protocols.scan import Auxiliary, Noise, Scan
from scansteer.realtime import region_means
from scansteer.realtime.reference import Reference
from scansteer.realtime.region_means import RegionMeans
from scansteer.simulators import world

PLAYED = 17, 0, 2, 10, 5, 7, 3, 18
N_VOXELS = 40


@pytest.fixture(scope="module")
def scan() -> Scan:
    """Half as many independent voxels as voxels; T1 comes as a map, T2 does not."""
    return PUBLISHED.model_copy(
        update={
            "matrix": None,
            "schedule": tuple(PUBLISHED.schedule[i] for i in PLAYED),
            "auxiliaries": {"t1_s": Auxiliary(lower=2.5, upper=3.3, map_error_relative=0.03), "t2_s": Auxiliary(lower=0.6, upper=1.2)},
            "noise": Noise(effective_voxel_fraction=0.5),
        }
    )


@pytest.fixture(scope="module")
def reference(scan: Scan) -> Reference:
    return Reference(scan, ["t1_s"])


@pytest.fixture(scope="module")
def expected(scan: Scan, reference: Reference) -> list:
    return [reference.play(block, first=index == 0) for index, block in enumerate(scan.schedule)]


def alike(scan: Scan, number: int) -> world.Scene:
    """A vial: one tissue in all its voxels."""
    one = world.from_priors(scan, 1, (3, number))
    everywhere = {name: np.repeat(values, N_VOXELS) for name, values in one.values.items()}
    return replace(one, values=everywhere, maps={"t1_s": everywhere["t1_s"]}, amplitude=np.repeat(one.amplitude, N_VOXELS))


def followed(means: RegionMeans, scene: world.Scene, expected: list, regions: list[np.ndarray], factor: float = 1.0):
    """After all images."""
    means.begin(dict(scene.maps), regions)
    scanner = world.Scanner(scene)
    for block, here in zip(scene.described.schedule, expected, strict=True):
        info = means.absorb(here, scanner.play(block), NoiseEstimate(factor * scene.sigma, 1e4))
    return info


def width(summary) -> np.ndarray:
    return summary.upper - summary.lower


def test_the_mean_of_one_voxel_is_the_voxel(scan, reference, expected, monkeypatch):
    monkeypatch.setattr(region_means, "EXTRA", (0.0,))
    scene = world.from_priors(scan, 1, (4, 1))
    here = {"t1_s": scene.values["t1_s"]}
    scene = replace(scene, maps=here)
    alone = followed(RegionMeans(reference, resolution.FINE), scene, expected, [np.zeros(1, int)])
    voxelwise = Reference(scan, ["t1_s"])
    scanner = world.Scanner(scene)
    signals = [scanner.play(block) for block in scan.schedule]
    voxelwise.begin(here, signals[0])
    for index, (signal, block) in enumerate(zip(signals, scan.schedule, strict=True)):
        info = voxelwise.absorb(voxelwise.play(block, first=index == 0), signal, NoiseEstimate(scene.sigma, 1e4))
    np.testing.assert_allclose(alone.summary.map, info.summary.map, rtol=1e-4)
    np.testing.assert_allclose(width(alone.summary), width(info.summary), rtol=1e-3)
    np.testing.assert_allclose(alone.nrmse, info.nrmse, rtol=1e-3)


def test_means_are_narrower_than_voxels_and_hold_the_truth(scan, reference, expected):
    means = RegionMeans(reference)
    whole, voxels = [np.arange(N_VOXELS)], list(np.arange(4)[:, None])
    held, narrower = [], []
    for number in range(16):
        scene = alike(scan, number)
        info = followed(means, scene, expected, whole).summary
        held.append((info.lower[0] <= scene.truth[0]) & (scene.truth[0] <= info.upper[0]))
        narrower.append(width(info)[0] / np.median(width(followed(means, scene, expected, voxels).summary), axis=0))
    assert means.n_independent == [1.0] * 4
    assert np.mean(held) > 0.85  # 32 intervals of 95 %: fewer than 27 by chance once in ten thousand
    assert np.all(np.median(narrower, axis=0) < 0.7)


@pytest.mark.parametrize("extra", [region_means.EXTRA, (1e-4,)])
def test_what_voxels_share_does_not_average_out(scan, reference, expected, monkeypatch, extra):
    """Next to no noise a mean of forty voxels is not known better than one of four: neither by the model's error nor by what was not measured."""
    monkeypatch.setattr(region_means, "EXTRA", extra)
    scene = replace(alike(scan, 2), sigma=1e-2)
    few, many = width(followed(RegionMeans(reference), scene, expected, [np.arange(4), np.arange(N_VOXELS)]).summary)
    np.testing.assert_allclose(few, many, rtol=0.02)


def test_a_mean_has_the_mean_of_the_maps(scan, reference, expected):
    means, scene, regions = RegionMeans(reference), alike(scan, 6), [np.arange(N_VOXELS)]
    level = {"t1_s": np.full(N_VOXELS, 2.9)}
    varied = {"t1_s": np.linspace(2.6, 3.2, N_VOXELS)}
    first = {"t1_s": np.full(N_VOXELS, 2.6)}
    by_level, by_varied, by_first = (followed(means, replace(scene, maps=maps), expected, regions).summary for maps in (level, varied, first))
    np.testing.assert_allclose(by_varied.lower, by_level.lower, rtol=1e-4)
    assert np.any(np.abs(by_first.lower - by_level.lower) > 1e-2 * width(by_level))


def test_half_as_many_voxels_are_independent(scan, reference, expected):
    means = RegionMeans(reference)
    means.begin({"t1_s": np.full(N_VOXELS, 2.9)}, [np.arange(N_VOXELS), np.arange(1)])
    assert means.n_independent == [20.0, 1.0]


def test_narrow_means_do_not_depend_on_the_lattice():
    """After a whole scan a mean's ridge is narrower than the lattice's steps. (Mixed before they are described, widths were off by up to half.)"""
    scan = PUBLISHED.model_copy(update={"matrix": None})
    drawn = world.from_priors(scan, 12, (13, 0))
    scene, found = replace(drawn, sigma=drawn.sigma / np.sqrt(160)), []
    reference = Reference(scan, [])
    played = [reference.play(block, first=index == 0) for index, block in enumerate(scan.schedule)]
    for n_points in (region_means.N_POINTS, (111, 111)):
        means = RegionMeans(reference, n_points)
        found.append(followed(means, replace(scene, maps={}), played, list(np.arange(12)[:, None])).summary)
    coarse, fine = found
    np.testing.assert_allclose(width(coarse), width(fine), rtol=0.2)
    assert np.all(np.abs(coarse.lower - fine.lower) < 0.35 * width(fine))  # with the voxels' lattice 0.45


def test_a_mean_that_the_model_does_not_explain_is_wide(scan, reference, expected):
    means, rng = RegionMeans(reference), np.random.default_rng(0)

    def widths(number: int, error: float) -> np.ndarray:
        scene = alike(scan, number)
        means.begin(dict(scene.maps), [np.arange(N_VOXELS)])
        scanner = world.Scanner(scene)
        for block, here in zip(scan.schedule, expected, strict=True):
            wrong_by_all = 1 + error * rng.standard_normal()
            info = means.absorb(here, wrong_by_all * scanner.play(block), NoiseEstimate(scene.sigma, 1e4))
        return width(info.summary)[0]

    ratios = [widths(number, 0.01) / widths(number, 0.0) for number in range(8)]
    assert np.all(np.median(ratios, axis=0) > 1.25)


def test_a_region_among_many_is_as_alone(scan, reference, expected):
    """Regions may share voxels; those of more than one block of the reference are described block by block."""
    means, scene = RegionMeans(reference), alike(scan, 3)
    regions = [np.arange(N_VOXELS), *np.arange(20)[:, None], np.arange(10, 30)]
    together = followed(means, scene, expected, regions)
    for number in (0, 7, 21):
        alone = followed(means, scene, expected, [regions[number]])
        np.testing.assert_array_equal(together.summary.lower[number], alone.summary.lower[0])
        np.testing.assert_array_equal(together.nrmse[number], alone.nrmse[0])
    means.close()
