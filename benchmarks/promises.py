"""Do intervals and stops keep their promise? On the two published scans, and in closed loops whose truth is known.

    python benchmarks/promises.py real  [SCAN ...]                 replays; the scans lie in the folder SCANSTEER_DATA (default ../shared/data)
    python benchmarks/promises.py loops SCAN [RUNS] [WORLD ...]    single voxels drawn from the priors, scanned adaptively until they may stop
    python benchmarks/promises.py anatomy SCAN [RUNS]              the same of fixed tissues: white and grey matter, CSF, a lesion
    python benchmarks/promises.py steering SCAN [DRAWS] [SEED] [KIND]   scenes of six voxels to the published schedule's last area: what steering
                                                                   saves; KIND: digital (default), brain, solution or assortment
    python benchmarks/promises.py priors SCAN [SCENES]             scenes of 64 voxels drawn from the priors, under the pulses of other steered scans
    python benchmarks/promises.py quadrature SCAN                  64 voxels of a real scan, beside every range cut in two slices
    python benchmarks/promises.py resolution SCAN [PERMILLE]       64 voxels drawn from the priors, noise in M0/1000: beside a lattice of 112 x 112
    python benchmarks/promises.py means SCAN [SCENES]              regions drawn from the priors: do the intervals of their means hold the truth?
    python benchmarks/promises.py widths SCAN                      the voxels of `quadrature`: what each unmeasured range costs in width

Errors of a real scan are against its own last image. For "moves as it says", z = (theta_n - theta_30) / sqrt(V_n - V_30) should have an rms
of 1; V is that of a normal with the width of the 95 % interval. Voxels whose V shrank by less than a twentieth since n have no z, and are counted.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
from rich.progress import Progress

from scansteer.core.noise import NoiseEstimate
from scansteer.protocols.prospect import Prospect
from scansteer.protocols.scan import Range, Scan, load
from scansteer.realtime.images import Frame
from scansteer.realtime.messages import Decision
from scansteer.realtime.recording import Recording, read
from scansteer.realtime.reference import Reference
from scansteer.realtime.region_means import RegionMeans
from scansteer.realtime.session import Session
from scansteer.realtime.sources import open_source
from scansteer.realtime.worker import Setup
from scansteer.simulators import closed_loop, schedules, study, world
from scansteer.simulators.closed_loop import Trace
from scansteer.simulators.follower import Follower

DATA = Path(os.environ.get("SCANSTEER_DATA", Path(__file__).parents[2] / "shared" / "data"))
FILES = {"larg-phantom-9.4T": "larg_phantom_9T4", "larg-phantom-9.4T-wide": "larg_phantom_9T4", "mt-mouse-7T-30": "mouse_mt_7T"}
VIALS = ((24, 18), (25, 44), (44, 30))
"""Centres (row, column) in the phantom."""
VIAL_RADIUS_SQUARED = 130
QUADRATURE_AT = 3, 8, 18, 30
"""Numbers of images at which `quadrature` and `resolution` look."""
WIDTHS_AT = 18, 30
"""The same of `widths`."""
N_QUADRATURE = 64
"""Voxels of `quadrature` and `widths`."""
MEANS_AT = 3, 5, 8, 12, 18, 30
"""Numbers of images at which `means` looks."""
N_RESOLUTION, N_FINER = 64, 112
"""Voxels of `resolution`, and its finer lattice's points along each side."""
BEHIND_A_MEAN = 160
"""Independent voxels behind each mean there: as many as in a vial."""
WRONG_BY = 0.0, 0.0025, 0.006
"""Errors of the model there [fraction of M0]: none, as in the vials, and more."""
N_STEERED, LONGEST = 8, 14
"""Scans whose pulses `priors` uses, and how many images of them."""


class Replayed(NamedTuple):
    """A scan replayed over its publishers' mask; in the order of the scan's parameters."""

    decisions: list[Decision]
    estimate: np.ndarray
    """(image, parameter, voxel), as the others."""
    halfwidth: np.ndarray
    parts: dict[str, np.ndarray]
    """Vials of the phantom, or the whole mask: which voxels."""
    ready_s: float


def replayed(scan: Scan, file: str) -> Replayed:
    """Every image, by the reference posterior."""
    mask = np.load(DATA / f"{file}.truth.npz")["mask"]
    with open_source(DATA / f"{file}.h5") as source:
        auxiliaries = {stored.frame.role: stored.frame for stored in source.auxiliaries()}
        frames = [stored.frame for stored in source.images()]
    region = Frame(mask[None].astype(float), frames[0].geometry, role="mask")
    session = Session(Setup("promises", scan, region=region, auxiliaries=auxiliaries))
    decisions, estimate, halfwidth = [], [], []
    for frame in frames:
        decisions.append(session.absorb(frame, received_at=0.0))
        maps = {name: values[0][mask] for name, values in session.maps().items()}
        estimate.append([maps[f"{name}_map"] for name in scan.parameter_names])
        halfwidth.append([(maps[f"{name}_upper"] - maps[f"{name}_lower"]) / 2 for name in scan.parameter_names])
    session.close()
    return Replayed(decisions, np.array(estimate), np.array(halfwidth), _parts(mask, file), session.ready_s)


def _parts(mask: np.ndarray, file: str) -> dict[str, np.ndarray]:
    if "phantom" not in file:
        return {"all": np.ones(np.count_nonzero(mask), bool)}
    rows, columns = np.nonzero(mask)
    vials = [(rows - row) ** 2 + (columns - column) ** 2 < VIAL_RADIUS_SQUARED for row, column in VIALS]
    return {f"vial {number}": vial for number, vial in enumerate(vials, 1)}


def real(name: str) -> None:
    """Print what one scan's replay says."""
    scan = load(name)
    got = replayed(scan, FILES[name])
    n_images = len(got.decisions)
    error = np.abs(got.estimate - got.estimate[-1])
    within = np.mean(error[2:-1] <= got.halfwidth[2:-1], axis=2)
    relative = got.halfwidth / got.estimate
    refused = [decision.n_images for decision in got.decisions if not decision.lack_of_fit.passed]
    print(f"\n## {name}: {got.estimate.shape[2]} voxels, ready in {got.ready_s:.0f} s\n")
    print(f"lack of fit at n = {_listed(refused)}; would stop at {got.decisions[-1].would_stop_at}")
    for axis, parameter in enumerate(scan.parameter_names):
        worst = int(np.argmin(within[:, axis]))
        print(f"\n{parameter}: within the half-width {within[:, axis].mean():.1%} of (voxel, n = 3 .. {n_images - 1}), worst n = {worst + 3}: "
              f"{within[worst, axis]:.1%}; per n: {' '.join(f'{share:.2f}' for share in within[:, axis])}")  # fmt: skip
        for n in (18, n_images):
            shown = ", ".join(f"{part} {np.median(relative[n - 1, axis, voxels]):.1%}" for part, voxels in got.parts.items())
            print(f"  half-width at n = {n}: median {np.median(relative[n - 1, axis]):.1%} ({shown})")
        for part, voxels in got.parts.items():
            print(f"  moves as it says, {part}: {_movement(got.estimate[:, axis, voxels], got.halfwidth[:, axis, voxels])}")
    if (stopped := got.decisions[-1].would_stop_at) is not None:
        targets = np.array([each.target_halfwidth_relative for each in scan.parameters.values()])[:, None]
        kept = np.mean(error[stopped - 1] <= targets * got.estimate[-1], axis=1)
        print(f"\nerror at the stop within the target: {', '.join(f'{share:.1%}' for share in kept)} of voxels")


def _movement(estimate: np.ndarray, halfwidth: np.ndarray) -> str:
    """The rms of z over voxels and images 5 .. 25; both (image, voxel)."""
    variance = (halfwidth / 1.96) ** 2
    gone = variance[4:25] - variance[-1]
    shrunk = gone > 0.05 * variance[4:25]
    z = ((estimate[4:25] - estimate[-1]) / np.sqrt(np.where(shrunk, gone, 1.0)))[shrunk]
    return f"z rms {np.sqrt(np.mean(z**2)):.2f} (without the outermost hundredth {_trimmed(z):.2f}), no z {np.mean(~shrunk):.1%}"


def _trimmed(z: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.sort(z**2)[: max(1, int(0.99 * len(z)))])))


def _listed(numbers: list[int]) -> str:
    """1, 2, 3, 7 -> "1-3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in runs) or "none"


def loops(name: str, runs: int = 200, *worlds: str) -> None:
    """Print one line per world."""
    scan = load(name)
    if unknown := set(worlds) - set(world.WORLDS):
        sys.exit(f"No world is called {', '.join(sorted(unknown))}; there are {', '.join(world.WORLDS)}.")
    with Progress(disable=True) as progress, ThreadPoolExecutor(1) as pool:
        mapped = world.mapped_auxiliaries(scan)
        shared = study.Study(scan, Prospect(scan), Follower(scan, mapped), seed=0)
        print(f"\n## {name}: {runs} runs per world\n")
        for each in worlds or world.WORLDS:
            begun = time.process_time()
            found = study.of_world(study.stops(shared, each, runs, pool, progress), len(scan.schedule))
            print(f"{each}: {_said(found)} ({time.process_time() - begun:.0f} s of CPU)", flush=True)


def anatomy(name: str, runs: int = 100) -> None:
    """Print one line per tissue."""
    scan = load(name)
    shared = study.Study(scan, Prospect(scan), Follower(scan, world.mapped_auxiliaries(scan)), seed=0)
    print(f"\n## {name}: {runs} runs per tissue\n")
    for tissue in world.BRAIN:
        traces = [study.until_stop(shared, world.of_tissue(scan, tissue, (15, number))) for number in range(runs)]
        print(f"{tissue}: {_said(study.of_world(traces, len(scan.schedule)))}", flush=True)


def _said(found: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:.3g}" for key, value in found.items() if value is not None and key != "runs")


def priors(name: str, scenes: int = 24) -> None:
    """Print how many truths the 50 and 95 % regions hold where pulses were not chosen for the voxel: what the marginalisation alone is worth."""
    scan = load(name)
    follower, prospect, schedule = Follower(scan, world.mapped_auxiliaries(scan)), Prospect(scan), schedules.published(scan)
    steered = [world.single(scan, (7, number)) for number in range(N_STEERED)]
    choices = [closed_loop.Adaptive(follower, prospect, scene) for scene in steered]
    played = [
        closed_loop.run(scene, follower, prospect, schedule, choice, until_stop=True).blocks[:LONGEST]
        for scene, choice in zip(steered, choices, strict=True)
    ]
    inside: dict[int, list[np.ndarray]] = {}
    for number in range(scenes):
        blocks, scene = played[number % N_STEERED], world.from_priors(scan, 64, (11, number))
        scene = replace(scene, amplitude=np.full_like(scene.amplitude, scene.amplitude[0]))  # a block's voxels are of like brightness
        trace = closed_loop.run(scene, follower, prospect, blocks, closed_loop.Fixed())
        for n in range(3, len(blocks) + 1):
            inside.setdefault(n, []).append(trace.credibility[n - 1])
    print(f"\n## {name}: {scenes} scenes of 64 voxels\n")
    for n, each in inside.items():
        found = np.concatenate(each)
        print(f"n = {n}: {np.mean(found <= 0.5):.1%} and {np.mean(found <= 0.95):.1%} of {len(found)}")


def means(name: str, scenes: int = 16) -> None:
    """Print how many truths the 95 % intervals of region means hold, where the model is exact and where it is wrong by a little.

    Sixteen regions of a scene share carry-over, first state and offset.
    """
    scan, mapped = load(name), world.mapped_auxiliaries(load(name))
    reference = Reference(scan, mapped)
    of_regions = RegionMeans(reference)
    expected = [reference.play(block, first=index == 0) for index, block in enumerate(scan.schedule[: max(MEANS_AT)])]
    print(f"\n## {name}: {16 * scenes} region means of {BEHIND_A_MEAN} independent voxels each\n")
    for error in WRONG_BY:
        held: dict[int, list[np.ndarray]] = {n: [] for n in MEANS_AT}
        for number in range(scenes):
            drawn = world.from_priors(scan, 16, (13, number))
            scene = replace(drawn, sigma=drawn.sigma / np.sqrt(BEHIND_A_MEAN))
            scanner, rng = world.Scanner(scene), np.random.default_rng((13, number))
            of_regions.begin(dict(scene.maps), list(np.arange(16)[:, None]))
            for n, (block, here) in enumerate(zip(scan.schedule, expected, strict=False), 1):
                signal = scanner.play(block) + error * scene.amplitude * rng.normal(size=16)
                found = of_regions.absorb(here, signal, NoiseEstimate(scene.sigma, 1e4)).summary
                if n in held:
                    held[n].append((scene.truth >= found.lower) & (scene.truth <= found.upper))
        for n, each in held.items():
            f, k = np.concatenate(each).mean(axis=0)
            print(f"wrong by {error:.2%} of M0, n = {n}: f {f:.1%}, k {k:.1%} of {16 * scenes}", flush=True)


def quadrature(name: str) -> None:
    """Print how far the posterior moves where every unmeasured nuisance's range is cut in two, and each combination of halves is one of a mixture."""
    scan, recording, signals, maps = _measured(name)
    plain = Reference(scan, list(recording.maps))
    finer = Reference(scan, list(recording.maps), plain.prior.box.n_points, n_slices=2)
    for each in (plain, finer):
        each.begin(maps, signals[0])
    n_combinations = 2 ** sum(axis.name not in maps for axis in plain.model.axes)
    print(f"\n## {name}: one beside {n_combinations} combinations of halves\n")
    for n, (signal, noise, block) in enumerate(zip(signals, recording.noise, scan.schedule, strict=True), 1):
        ours, theirs = (each.absorb(each.play(block, first=n == 1), signal, noise).summary for each in (plain, finer))
        if n not in QUADRATURE_AT:
            continue
        for axis, parameter in enumerate(scan.parameter_names):
            sd = np.sqrt(theirs.covariance[:, axis, axis])
            moved, wider = (ours.mean[:, axis] - theirs.mean[:, axis]) / sd, np.sqrt(ours.covariance[:, axis, axis]) / sd
            spread = "-".join(f"{each:.2f}" for each in np.percentile(wider, (5, 95)))
            print(f"n = {n}, {parameter}: mean moved by {np.median(moved):+.2f} sd (rms {np.sqrt(np.mean(moved**2)):.2f}), "
                  f"sd {np.median(wider):.2f} of the finer one's ({spread})", flush=True)  # fmt: skip


def resolution(name: str, permille: int = 5) -> None:
    """Print how far the posterior moves where the lattice has more than twice as many points along each side."""
    scan = load(name)
    scene = world.from_priors(scan, N_RESOLUTION, (17,))
    scene = replace(scene, sigma=1e-3 * permille * float(np.mean(scene.amplitude)))
    plain, finer = (Reference(scan, list(scene.maps), n_points) for n_points in (None, (N_FINER, N_FINER)))
    scanner, noise = world.Scanner(scene), NoiseEstimate(scene.sigma, 200.0)
    print(f"\n## {name}: noise of {permille / 1000:.1%} of M0, {plain.prior.box.n_points} points\n")
    for n, block in enumerate(scan.schedule, 1):
        signal = scanner.play(block)
        for each in (plain, finer) if n == 1 else ():
            each.begin(dict(scene.maps), signal)
        ours, theirs = (each.absorb(each.play(block, first=n == 1), signal, noise).summary for each in (plain, finer))
        if n in QUADRATURE_AT:
            sds = [np.sqrt(np.diagonal(each.covariance, axis1=1, axis2=2)) for each in (ours, theirs)]
            off = {"mean": (ours.mean - theirs.mean) / sds[1], "sd": np.log(sds[0] / sds[1]), "area": np.log(ours.cr_area / theirs.cr_area)}
            found = (f"{what} rms {np.sqrt(np.mean(x**2)):.3f}, worst {np.max(np.abs(x)):.3f}" for what, x in off.items())
            print(f"n = {n}: {'; '.join(found)}", flush=True)


def widths(name: str) -> None:
    """Print the half-widths as described, and with each unmeasured range, and the discrepancy, known to be at its centre."""
    scan, recording, signals, maps = _measured(name)
    ranges = [axis.name for axis in Reference(scan, list(recording.maps)).model.axes if axis.name not in maps]
    print(f"\n## {name}: relative half-widths at {WIDTHS_AT} images\n")
    for known in [(), *((each,) for each in (*ranges, "offset", "discrepancy")), ("b0_ppm", "b1_relative")]:
        described = _narrowed(scan, known)
        reference = Reference(described, list(recording.maps))
        reference.begin(maps, signals[0])
        for n, (signal, noise, block) in enumerate(zip(signals, recording.noise, scan.schedule, strict=True), 1):
            found = reference.absorb(reference.play(block, first=n == 1), signal, noise).summary
            if n in WIDTHS_AT:
                half = np.median((found.upper - found.lower) / 2 / found.map, axis=0)
                said = ", ".join(f"{parameter} {each:.3f}" for parameter, each in zip(scan.parameter_names, half, strict=True))
                print(f"{' and '.join(known) or 'nothing'} known, n = {n}: {said}", flush=True)


def _measured(name: str) -> tuple[Scan, Recording, np.ndarray, dict[str, np.ndarray]]:
    """Some voxels of the publishers' mask: signals (image, voxel), maps."""
    if name not in FILES:
        raise SystemExit(f"no measured scan belongs to {name}; there are those of {', '.join(FILES)}")
    scan = load(name)
    mask = np.load(DATA / f"{FILES[name]}.truth.npz")["mask"]
    with tempfile.TemporaryDirectory() as folder:
        roi = Path(folder) / "mask.nii.gz"
        nibabel.save(nibabel.Nifti1Image(mask.T[:, :, None].astype(np.uint8), np.eye(4)), roi)  # pyright: ignore[reportPrivateImportUsage]
        recording, _ = read(DATA / f"{FILES[name]}.h5", scan, roi, {})
    chosen = np.random.default_rng(0).choice(recording.signals.shape[1], N_QUADRATURE, replace=False)
    return scan, recording, recording.signals[:, chosen], {each: values[chosen] for each, values in recording.maps.items()}


def _narrowed(scan: Scan, known: Sequence[str]) -> Scan:
    """The scan with some of its ranges a hundredth as wide, about their centres; a known discrepancy is none."""
    described = scan.model_dump()

    def narrow(holder: dict, name: str) -> None:
        middle, half = 0.5 * (holder[name]["lower"] + holder[name]["upper"]), 0.005 * (holder[name]["upper"] - holder[name]["lower"])
        holder[name] |= {"lower": middle - half, "upper": middle + half}

    for name in known:
        if name == "discrepancy":
            described["noise"]["discrepancy"] = 0.0
        elif name == "first_mz":
            narrow(described["first_state"], "mz")
        elif name in ("carry_over", "offset"):
            if isinstance(getattr(scan.readout, name), Range):
                narrow(described["readout"], name)
        else:
            narrow(described["auxiliaries"], name)
    return Scan.model_validate(described)


def steering(name: str, draws: int = 500, seed: int = 0, kind: str = "digital") -> None:
    """Print who needs how many images and seconds."""
    scan, make = load(name), getattr(world, kind)
    begun = time.process_time()
    with Progress(disable=True) as progress, ThreadPoolExecutor(2) as pool:
        shared = study.Study(scan, Prospect(scan), Follower(scan, world.mapped_auxiliaries(scan)), seed)
        before = study.beforehand(shared, schedules.N_RESTARTS, pool, progress)
        scenes = (make(scan, study.N_VOXELS, (seed, number)) for number in range(draws))
        both = list(pool.map(partial(_steered_or_not, shared, before), scenes))
    found = study.compared({each: [traces[each] for traces in both] for each in both[0]}, seed)
    print(f"\n## {name}: {draws} scenes ({kind}), seed {seed} ({time.process_time() - begun:.0f} s of CPU)\n")
    print(f"optimised over a course of {before.horizon:g} images; steering begins with", *before.begin, sep="\n")
    for each, what in found.items():
        for key, value in what.items() if isinstance(what, dict) else [("", what)]:
            print(each, key, _rounded(value), flush=True)


def _steered_or_not(shared: study.Study, before: study.Beforehand, scene: world.Scene) -> dict[str, Trace]:
    """The published schedule in full, the others until they know as much."""
    target, published = study.to_target(shared, scene)
    scanned = partial(study.until_target, shared, scene, target)
    return {
        "published": published,
        "optimised": scanned(before.optimised, len(before.optimised)),
        "adaptive": scanned(before.steered, len(before.begin)),
        **{f"d_optimal_{horizon:g}": scanned(schedule, len(schedule)) for horizon, schedule in before.d_optimal.items()},
    }


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return round(value, 3) if isinstance(value, float) else value


if __name__ == "__main__":
    what, *rest = sys.argv[1:] or ["real"]
    if what in (by_name := {each.__name__: each for each in (loops, anatomy, steering, priors, quadrature, resolution, widths, means)}):
        by_name[what](rest[0], *(int(each) if each.isdigit() else each for each in rest[1:]))  # type: ignore[arg-type]
    else:
        for scan_name in rest or FILES:
            real(scan_name)
