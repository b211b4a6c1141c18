"""Closed-loop studies: how many images each way of choosing pulses needs, and whether a stop keeps its promise when the description is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from scansteer.core.errors import InputError, ScansteerError
from scansteer.core.region import ANYTIME_LEVEL
from scansteer.protocols.prospect import Prospect
from scansteer.protocols.scan import SaturationBlock, Scan
from scansteer.simulators import closed_loop, schedules, study_figure, world
from scansteer.simulators.closed_loop import Trace
from scansteer.simulators.follower import Follower
from scansteer.simulators.world import Scene

N_VOXELS = 6
"""Voxels of a phantom, scanned together with the same pulses."""
N_DRAWS = 48
"""Tissues that the optimised schedule is optimised for."""
N_TRIALS = 24
"""Phantoms on which the optimised schedule, and the image that steering begins with, are chosen beforehand."""
N_TRIED = 4
"""Of each horizon's optimised schedules, how many are tried there."""
N_EARLY = 4
"""Of each horizon's best schedule, the images that steering might begin with; of the best of all, one more than steering might leave as they are."""
N_RESTARTS_ORACLE = 1
N_BOOTSTRAP = 2000


class Study(NamedTuple):
    """What all runs of one study share."""

    scan: Scan
    prospect: Prospect
    follower: Follower
    seed: int


def run_study(
    scan: Scan,
    repeats: int,
    out: Path,
    *,
    seed: int = 0,
    worlds: Sequence[str] = tuple(world.WORLDS),
    n_restarts: int = schedules.N_RESTARTS,
    console: Console | None = None,
) -> dict[str, Any]:
    """Compare schedules on phantoms and test stops in worlds; writes `out` (JSON) and a figure beside it.

    Parameters
    ----------
    repeats
        Phantoms per schedule, and single-voxel closed loops per world.
    worlds
        Names in `world.WORLDS`.
    """
    console = console or Console()
    _check_writable(out)
    columns = (TextColumn("{task.description:<34}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        task = progress.add_task("simulate the candidates", total=1)
        study = Study(scan, Prospect(scan), Follower(scan, world.mapped_auxiliaries(scan)), seed)
        progress.advance(task)
        _said(progress, f"simulated {len(study.prospect.candidates)} candidates")
        before = beforehand(study, n_restarts, pool, progress)
        traces = _compare(study, repeats, before, pool, progress)
        loops = {name: stops(study, name, repeats, pool, progress) for name in worlds}
    result = _summary(study, repeats, before, traces, loops)
    try:
        out.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        study_figure.draw(result, _curves(traces), out.with_suffix(".png"))
    except OSError as error:
        raise ScansteerError(f"Cannot write {out}: {error}.") from error
    console.print(_sentence(result, out))
    return result


def _check_writable(out: Path) -> None:
    """Before minutes of work, not after."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise InputError(f"Cannot write {out}: {error.strerror}; give another file with --out.") from error


def _compare(study: Study, repeats: int, before: Beforehand, pool: ThreadPoolExecutor, progress: Progress) -> dict[str, list[Trace]]:
    """Every schedule on the same phantoms, noise included."""
    approved = schedules.published(study.scan)
    make: dict[str, Callable[[Scene, np.random.Generator], Sequence[SaturationBlock]]] = {
        "published": lambda scene, rng: approved,
        "random": lambda scene, rng: schedules.random(study.prospect, len(approved), rng),
        "optimised": lambda scene, rng: before.optimised,
        "adaptive": lambda scene, rng: before.steered,
        "oracle": lambda scene, rng: _oracle(study, scene, len(approved), before.horizon, rng),
    }

    def one(name: str, number: int) -> Trace:
        scene = world.digital(study.scan, N_VOXELS, (study.seed, number))
        schedule = make[name](scene, np.random.default_rng((study.seed, number, 3)))
        choice = closed_loop.Adaptive(study.follower, study.prospect, scene) if name == "adaptive" else closed_loop.Fixed()
        return closed_loop.run(scene, study.follower, study.prospect, schedule, choice, n_given=len(before.begin))

    return {name: _all(partial(one, name), range(repeats), f"phantoms, {name}", pool, progress) for name in make}


class Beforehand(NamedTuple):
    """What is settled before the first phantom is seen, from the scan's priors alone."""

    optimised: list[SaturationBlock]
    """The fixed schedule that comes down to the target soonest."""
    horizon: float
    """Over which it was optimised."""
    begin: list[SaturationBlock]
    """What steering begins with: one image, or a few."""
    d_optimal: dict[float, list[SaturationBlock]]
    """The best of each horizon by the objective alone, before any trial."""

    @property
    def steered(self) -> list[SaturationBlock]:
        """The schedule that steering departs from after its beginning."""
        return _begun(self.begin, self.optimised)


def beforehand(study: Study, n_restarts: int, pool: ThreadPoolExecutor, progress: Progress) -> Beforehand:
    """The best fixed schedule, and the best way to begin to steer: each by trial, on phantoms that are none of the study's.

    The schedule with the least images times seconds, neither counting for more; beside it, the beginning that saves most of what it saves least of.
    """
    by_horizon = _optimised(study, n_restarts, progress)
    made = [(horizon, schedule) for horizon, each in by_horizon.items() for schedule in each[:N_TRIED]]
    scenes = [world.solution(study.scan, N_VOXELS, (study.seed, 30_000 + number)) for number in range(N_TRIALS)]
    targets = [target for target, _ in pool.map(partial(to_target, study), scenes)]
    fixed = _tried(study, "try schedules", [(schedule, len(schedule)) for _, schedule in made], scenes, targets, pool, progress)
    best = int(np.argmin(np.prod(fixed, axis=1)))
    horizon, optimised = made[best]
    begins = _begins(study.prospect, optimised, [each[0] for each in by_horizon.values()])
    steered = _tried(study, "try beginnings", [(_begun(begin, optimised), len(begin)) for begin in begins], scenes, targets, pool, progress)
    begin = begins[int(np.argmin(np.max(steered / fixed[best], axis=1)))]
    return Beforehand(optimised, horizon, begin, {each: found[0] for each, found in by_horizon.items()})


def _begun(begin: list[SaturationBlock], schedule: list[SaturationBlock]) -> list[SaturationBlock]:
    return [*begin, *schedule[len(begin) :]]


def _begins(prospect: Prospect, best: list[SaturationBlock], made: Sequence[list[SaturationBlock]]) -> list[list[SaturationBlock]]:
    """Beginnings to try: the shortest unsaturated image, an early one of a good schedule, and the best schedule's own."""
    begun = prospect.begin()
    limits = prospect.scan.limits
    shortest = {} if begun.played else {"t_rec_s": limits.t_rec_s.lower}  # no recovery is played before it
    singles = [schedules.unsaturated(prospect.scan).model_copy(update={"t_sat_s": limits.t_sat_s.lower})]
    singles += [block for schedule in made for block in schedule[:N_EARLY]]
    alone = dict.fromkeys(block.model_copy(update=shortest) for block in singles)
    return [[block] for block in alone if prospect.may_follow(begun, block)] + [best[:n] for n in range(1, N_EARLY)]


def _tried(
    study: Study,
    label: str,
    ways: Sequence[tuple[list[SaturationBlock], int]],
    scenes: Sequence[Scene],
    targets: Sequence[float],
    pool: ThreadPoolExecutor,
    progress: Progress,
) -> Float[np.ndarray, "way 2"]:
    """Mean images and seconds to the targets of schedules of which so many images are played before they are steered."""
    task = progress.add_task(label, total=len(ways))

    def one(way: tuple[list[SaturationBlock], int]) -> np.ndarray:
        found = [_reached(until_target(study, *each, *way), each[1]) for each in zip(scenes, targets, strict=True)]
        progress.advance(task)
        return np.mean([(each.images, each.seconds) for each in found], axis=0)

    found = np.stack(list(pool.map(one, ways)))
    _said(progress, f"{label}: {len(ways)} done")
    return found


def to_target(study: Study, scene: Scene) -> tuple[float, Trace]:
    """The median area that (unsaturated image + published schedule) has at its end, and that scan."""
    trace = closed_loop.run(scene, study.follower, study.prospect, schedules.published(study.scan), closed_loop.Fixed())
    return float(np.median(trace.area[-1])), trace


def until_target(study: Study, scene: Scene, target: float, schedule: Sequence[SaturationBlock], n_given: int) -> Trace:
    """Scan until as much is known, and steer after so many images of the schedule."""
    choice = closed_loop.Adaptive(study.follower, study.prospect, scene) if n_given < len(schedule) else closed_loop.Fixed()
    return closed_loop.run(scene, study.follower, study.prospect, schedule, choice, n_given=n_given, until_area=target)


def _optimised(study: Study, n_restarts: int, progress: Progress) -> dict[float, list[list[SaturationBlock]]]:
    """By horizon the best schedules, the best one first, for tissues drawn from the scan's priors: all that steering knows beforehand."""
    task = progress.add_task("optimise schedules", total=n_restarts * len(schedules.HORIZONS))
    scenes = [world.from_priors(study.scan, N_VOXELS, (study.seed, 10_000 + number)) for number in range(-(-N_DRAWS // N_VOXELS))]
    draws = _draws(study, scenes)
    rng, n_images, advance = np.random.default_rng((study.seed, 40_000)), len(study.scan.schedule) + 1, partial(progress.advance, task)
    found = {horizon: schedules.optimise(study.prospect, draws, n_images, rng, n_restarts, horizon, advance) for horizon in schedules.HORIZONS}
    _said(progress, f"optimise schedules: {n_restarts} starts for each of {len(found)} courses done")
    return found


def _oracle(study: Study, scene: Scene, n_images: int, horizon: float, rng: np.random.Generator) -> list[SaturationBlock]:
    """Optimised for the true parameters, which nobody knows."""
    draws = _draws(study, [scene])
    return schedules.optimise(study.prospect, draws, n_images, rng, N_RESTARTS_ORACLE, horizon)[0]


def _draws(study: Study, scenes: Sequence[Scene]) -> schedules.Draws:
    """These scenes' voxels as draws, with all that is measured of them."""
    measured = study.follower.measured
    maps = [{name: measured(name, values[at]) for name, values in scene.maps.items()} for scene in scenes for at in range(scene.n_voxels)]
    return schedules.draws_at(study.prospect, np.concatenate([_shares(scene) for scene in scenes]), maps, _relative_noise(scenes))


def _shares(scene: Scene) -> np.ndarray:
    """Where the truth lies in the box: (voxel, 2)."""
    sides = scene.described.parameters.values()
    return np.stack([(true - side.lower) / (side.upper - side.lower) for true, side in zip(scene.truth.T, sides, strict=True)], axis=1)


def _relative_noise(scenes: Sequence[Scene]) -> float:
    return float(np.mean([scene.sigma / np.mean(scene.amplitude) for scene in scenes]))


def stops(study: Study, name: str, repeats: int, pool: ThreadPoolExecutor, progress: Progress) -> list[Trace]:
    """Single voxels drawn from the priors, scanned adaptively until they may stop."""

    def one(number: int) -> Trace:
        return until_stop(study, world.WORLDS[name](world.single(study.scan, (study.seed, 20_000 + number))))

    return _all(one, range(repeats), f"world: {name}", pool, progress)


def until_stop(study: Study, scene: Scene) -> Trace:
    """Scan a scene adaptively until it may stop."""
    choice = closed_loop.Adaptive(study.follower, study.prospect, scene)
    return closed_loop.run(scene, study.follower, study.prospect, schedules.published(study.scan), choice, until_stop=True)


def _all(one: Callable[[int], Trace], numbers: Iterable[int], label: str, pool: ThreadPoolExecutor, progress: Progress) -> list[Trace]:
    numbers = list(numbers)
    task: TaskID = progress.add_task(label, total=len(numbers))
    done = []
    for trace in pool.map(one, numbers):
        done.append(trace)
        progress.advance(task)
    _said(progress, f"{label}: {len(done)} done")
    return done


def _said(progress: Progress, sentence: str) -> None:
    """Where no bar can be drawn a line says how far it is."""
    if not progress.disable and not progress.console.is_terminal:
        progress.console.print(sentence)


class Reached(NamedTuple):
    """When a phantom's median area came down to its target, and how wrong it was then."""

    images: int
    seconds: float
    error: tuple[float, float]
    reached: bool


def _reached(trace: Trace, target: float) -> Reached:
    hits = np.flatnonzero(np.median(trace.area, axis=1) <= target)
    n = int(hits[0]) if len(hits) else len(trace.blocks) - 1
    f_error, k_error = np.median(trace.relative_error[n], axis=0)
    return Reached(n + 1, float(trace.ends_s[n]), (float(f_error), float(k_error)), bool(len(hits)))


def _summary(study: Study, repeats: int, before: Beforehand, traces: dict[str, list[Trace]], loops: dict[str, list[Trace]]) -> dict[str, Any]:
    as_described = loops.get("as described", [])
    return {
        "scan": study.scan.name,
        "repeats": repeats,
        "voxels_per_phantom": N_VOXELS,
        "seed": study.seed,
        "mapped": list(study.follower.mapped),
        "target": "median confidence-region area of (unsaturated image + published schedule) at its end, phantom by phantom",
        "optimised_schedule": [block.model_dump() for block in before.optimised],
        "steering_begins_with": [block.model_dump() for block in before.begin],
        **compared(traces, study.seed),
        "decisions_with_suggestion": _mean(advice.block is not None for trace in traces["adaptive"] for advice in trace.advice if advice),
        "worlds": {name: of_world(each, len(study.scan.schedule)) for name, each in loops.items()},
        "anytime_ever_miss": _mean(bool(np.any(trace.log_ratio < np.log(ANYTIME_LEVEL))) for trace in as_described),
    }


def compared(traces: dict[str, list[Trace]], seed: int) -> dict[str, Any]:
    """Who needs how many images and seconds to the area that `published` has at its end; traces of one place belong to the same phantom."""
    targets = [float(np.median(trace.area[-1])) for trace in traces["published"]]
    reached = {name: [_reached(trace, target) for trace, target in zip(each, targets, strict=True)] for name, each in traces.items()}
    ratios = {
        f"adaptive_over_{other}": {what: _ratio(reached, what, seed, other) for what in ("images", "seconds")}
        for other in traces
        if other not in ("adaptive", "random", "oracle")
    }
    return {
        "schedules": {name: _of_schedule(traces[name], each) for name, each in reached.items()},
        **ratios,
        "design_gain_images": _mean(one.images - other.images for one, other in zip(reached["published"], reached["adaptive"], strict=True)),
        "stop_gain_images": _mean(len(trace.blocks) - trace.stopped_at for trace in traces["published"] if trace.stopped_at),
    }


def _of_schedule(traces: Sequence[Trace], reached: Sequence[Reached]) -> dict[str, Any]:
    return {
        "images_to_target": _mean(each.images for each in reached),
        "seconds_to_target": _mean(each.seconds for each in reached),
        "f_error": _mean(each.error[0] for each in reached),
        "k_error": _mean(each.error[1] for each in reached),
        "reached": _mean(each.reached for each in reached),
        "coverage": _mean(float(np.mean(trace.credibility[each.images - 1] <= 0.95)) for trace, each in zip(traces, reached, strict=True)),
        "distinct_pulses": _mean(len(set(trace.blocks[: each.images])) for trace, each in zip(traces, reached, strict=True)),
    }


def of_world(traces: Sequence[Trace], n_planned: int) -> dict[str, Any]:
    stopped = [trace for trace in traces if trace.stopped_at is not None]
    inside = [bool(trace.credibility[trace.stopped_at - 1, 0] <= 0.95) for trace in stopped if trace.stopped_at]
    intervals = np.array([trace.inside[trace.stopped_at - 1, 0] for trace in stopped if trace.stopped_at]).reshape(-1, 2)
    return {
        "runs": len(traces),
        "stopped": _mean(trace.stopped_at is not None for trace in traces),
        "stopped_before_70_percent": _mean(trace.stopped_at is not None and trace.stopped_at < 0.7 * n_planned for trace in traces),
        "vetoed": _mean(any(trace.vetoed) for trace in traces),
        "coverage_at_stop": _mean(inside),
        "f_interval_coverage_at_stop": _mean(intervals[:, 0]),
        "k_interval_coverage_at_stop": _mean(intervals[:, 1]),
        "stopped_with_truth_outside": sum(not each for each in inside) / len(traces) if traces else None,
        "images_at_stop": _mean(trace.stopped_at for trace in stopped if trace.stopped_at),
    }


def _ratio(reached: dict[str, list[Reached]], what: str, seed: int, other: str) -> dict[str, float]:
    """Mean over mean, and the upper 95 % bound of a bootstrap over phantoms (pairs are kept)."""
    ours, theirs = (np.array([getattr(each, what) for each in reached[name]], float) for name in ("adaptive", other))
    picks = np.random.default_rng((seed, 40_001)).integers(len(ours), size=(N_BOOTSTRAP, len(ours)))
    bootstrapped = ours[picks].mean(axis=1) / theirs[picks].mean(axis=1)
    return {"ratio": float(ours.mean() / theirs.mean()), "upper_95": float(np.quantile(bootstrapped, 0.95))}


def _curves(traces: dict[str, list[Trace]]) -> dict[str, np.ndarray]:
    """Mean log area over phantoms (median over voxels) after each image."""
    return {name: np.mean([np.log(np.median(trace.area, axis=1)) for trace in each], axis=0) for name, each in traces.items()}


def _mean(values: Iterable[Any]) -> float | None:
    values = [float(value) for value in values]
    return float(np.mean(values)) if values else None


def _sentence(result: dict[str, Any], out: Path) -> str:
    needed = ", ".join(f"{name} {each['images_to_target']:.1f}" for name, each in result["schedules"].items())
    return f"Images to the published schedule's final confidence region: {needed}. Details in {out} and {out.with_suffix('.png')}."
