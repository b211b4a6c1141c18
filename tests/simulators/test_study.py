"""A closed-loop study in the small: the whole of it runs, and its parts do what the figures rest on."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from rich.progress import Progress

from scansteer.core import lack_of_fit, lattice, predictive, resolution
from scansteer.core.noise import NoiseEstimate
from scansteer.core.region import ANYTIME_LEVEL
from scansteer.protocols import limits
from scansteer.protocols.larg_phantom import PUBLISHED
from scansteer.protocols.prospect import Prospect
from scansteer.protocols.scan import Auxiliary, FirstState, Readout, Stop
from scansteer.realtime.reference import Reference
from scansteer.simulators import closed_loop, schedules, study, world
from scansteer.simulators.closed_loop import Trace
from scansteer.simulators.follower import Follower

SCAN = PUBLISHED.model_copy(
    update={
        "auxiliaries": {**PUBLISHED.auxiliaries, "t2_s": Auxiliary(lower=0.8, upper=0.8)},
        "schedule": PUBLISHED.schedule[8:16],
        "stop": Stop(),
    }
)
CARRYING = Readout(flip_deg=60.0, carry_over=0.5)


@pytest.fixture(scope="module")
def prospect():
    return Prospect(SCAN)


@pytest.fixture(scope="module")
def follower():
    return Follower(SCAN, ())


@pytest.mark.long
def test_a_study_compares_schedules_and_worlds(tmp_path, monkeypatch):
    monkeypatch.setattr(schedules, "N_EXCHANGES", 1)
    monkeypatch.setattr(schedules, "HORIZONS", (4.0, 3.0))
    monkeypatch.setattr(study, "N_TRIALS", 2)
    monkeypatch.setattr(study, "N_RESTARTS_ORACLE", 1)
    study.run_study(SCAN, 1, tmp_path / "study.json", worlds=("as described",), n_restarts=1)
    result = json.loads((tmp_path / "study.json").read_text())
    assert set(result["schedules"]) == {"published", "random", "optimised", "adaptive", "oracle"}
    for each in result["schedules"].values():
        assert 1 <= each["images_to_target"] <= len(SCAN.schedule) + 1
        assert each["f_error"] >= 0 <= each["k_error"]
    assert result["schedules"]["published"]["reached"] == 1
    assert set(result["worlds"]) == {"as described"}
    assert result["worlds"]["as described"]["runs"] == 1
    assert 0 <= result["anytime_ever_miss"] <= 1
    assert (tmp_path / "study.png").stat().st_size > 10_000


def a_trace(areas, errors, stopped_at=None, credibility=0.5, vetoed=False):
    """Of one voxel with a truth of (1, 1), image by image."""
    n = len(areas)
    return Trace(
        blocks=[SCAN.schedule[0]] * n,
        area=np.array(areas, float)[:, None],
        estimate=1 + np.array(errors, float)[:, None, None] * np.ones((1, 1, 2)),
        inside=np.ones((n, 1, 2), bool),
        credibility=np.full((n, 1), credibility),
        log_ratio=np.zeros((n, 1)),
        advice=[None] * n,
        vetoed=[vetoed] * n,
        stopped_at=stopped_at,
        truth=np.ones((1, 2)),
    )


def test_images_to_target_are_counted_from_one_and_are_all_where_it_is_never_reached():
    trace = a_trace([8, 4, 2, 1], [0.4, 0.3, 0.2, 0.1])
    assert study._reached(trace, 3.0) == study.Reached(3, 12.0, (pytest.approx(0.2), pytest.approx(0.2)), True)
    assert study._reached(trace, 0.5) == study.Reached(4, 16.0, (pytest.approx(0.1), pytest.approx(0.1)), False)


def test_ratios_compare_like_with_like():
    """Adaptive needs half of what optimised does on every phantom: then so says every bootstrap sample."""
    few, many = ([study.Reached(n, 4.0 * n, (0, 0), True) for n in counts] for counts in ((2, 4, 8), (4, 8, 16)))
    assert study._ratio({"adaptive": few, "optimised": many}, "images", 0, "optimised") == {"ratio": 0.5, "upper_95": 0.5}


def test_schedules_are_compared_where_each_knows_as_much_as_the_published_one_at_its_end():
    published, optimised, adaptive = a_trace([8, 4, 2, 1], [0] * 4, stopped_at=3), a_trace([4, 2, 1], [0] * 3), a_trace([2, 0.5], [0] * 2)
    found = study.compared({"published": [published] * 3, "optimised": [optimised] * 3, "adaptive": [adaptive] * 3}, 0)
    assert [found["schedules"][name]["images_to_target"] for name in ("published", "optimised", "adaptive")] == [4, 3, 2]
    assert found["adaptive_over_optimised"]["images"]["ratio"] == pytest.approx(2 / 3)
    assert found["adaptive_over_published"]["seconds"]["upper_95"] == pytest.approx(2 / 4)
    assert (found["design_gain_images"], found["stop_gain_images"]) == (2, 1)


def test_a_world_is_judged_by_what_lies_outside_when_it_stops():
    traces = [a_trace([1] * 4, [0] * 4, stopped_at=3), a_trace([1] * 4, [0] * 4, stopped_at=4, credibility=0.99), a_trace([1] * 4, [0] * 4)]
    judged = study.of_world([*traces, a_trace([1] * 4, [0] * 4, vetoed=True)], 10)
    assert judged["stopped"] == 0.5
    assert judged["coverage_at_stop"] == 0.5
    assert judged["stopped_with_truth_outside"] == 0.25
    assert judged["vetoed"] == 0.25
    assert judged["images_at_stop"] == 3.5
    assert study.of_world([traces[2]], 10)["coverage_at_stop"] is None


def test_what_is_settled_beforehand_is_the_best_of_what_was_tried(prospect, follower, monkeypatch):
    """Of the schedules the one that comes down soonest, and of the beginnings that with which steering does; on phantoms of their own."""
    soon, late = [SCAN.schedule[index] for index in (0, 2)]
    unsaturated = schedules.unsaturated(SCAN).model_copy(update={"t_sat_s": 0.5})
    tried = []

    def until_target(_study, scene, _target, schedule, n_given):
        tried.append((scene.seed[1], *schedule[:n_given]))
        as_it_is, good_beginning = n_given == len(schedule), (n_given, schedule[:2]) == (2, [soon, late])
        n = {soon: 2, late: 5, unsaturated: 4}[schedule[0]] if as_it_is else 3 - 2 * good_beginning
        return a_trace([8.0] * n + [1.0], [0] * (n + 1))

    made = {8.0: [[late] * 4], 5.0: [[unsaturated, *[late] * 3], [soon, *[late] * 3]]}
    monkeypatch.setattr(study, "N_TRIALS", 3)
    monkeypatch.setattr(study, "_optimised", lambda *_: made)
    monkeypatch.setattr(study, "to_target", lambda *_: (2.0, None))
    monkeypatch.setattr(study, "until_target", until_target)
    with Progress(disable=True) as progress, ThreadPoolExecutor(1) as pool:
        found = study.beforehand(study.Study(SCAN, prospect, follower, 0), 1, pool, progress)
    assert found == study.Beforehand([soon, *[late] * 3], 5.0, [soon, late], {8.0: made[8.0][0], 5.0: made[5.0][0]})
    assert found._replace(begin=[unsaturated]).steered == [unsaturated, *[late] * 3]
    assert {seed for seed, *_ in tried} == {30_000, 30_001, 30_002}
    assert {tuple(begin) for _, *begin in tried if len(begin) < 4} == {(unsaturated,), (late,), (soon,), (soon, late), (soon, late, late)}


def test_vials_of_one_solution_are_alike_and_phantoms_are_not():
    width = np.array([side.upper - side.lower for side in SCAN.parameters.values()])
    scenes = [world.solution(SCAN, 12, (8, number)) for number in range(40)]
    assert all(np.all(np.ptp(scene.truth / width, axis=0) <= 0.2) for scene in scenes)
    centres = np.array([scene.truth.mean(axis=0) / width for scene in scenes])
    assert np.all(np.ptp(centres, axis=0) > 0.6)
    assert np.all(np.ptp(world.assortment(SCAN, 40, (8, 1)).truth / width, axis=0) > 0.6)


def test_a_study_foresees_what_a_session_does(follower):
    """Hence the same lattice."""
    ours, theirs = (resolution.narrower_sd(each._foreseen(), 1e-6) for each in (follower, Reference(SCAN, [])))
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)


def test_what_the_scanner_reads_is_what_the_follower_expects(follower):
    """Without noise, and with the nuisance at its centre, the posterior gathers about the truth."""
    scene = world.digital(SCAN, 1, (3, 1))
    scene = world.replace(scene, values={**scene.values, "t1_s": np.array([SCAN.auxiliaries["t1_s"].centre])}, sigma=1e-9)
    noise, scanner, followed = NoiseEstimate(world.NOISE * world.BRIGHTEST, 200), world.Scanner(scene), follower.begin({}, 1)
    for block in [schedules.unsaturated(SCAN), *SCAN.schedule]:
        followed, info = follower.absorb(followed, block, scanner.play(block), noise)
    half = (info.summary.upper - info.summary.lower) / 2
    assert np.all(np.abs(info.summary.map - scene.truth) < 0.25 * half)
    place = follower.place(followed, info, scene.truth)
    assert place.credibility[0] < 0.2
    assert place.log_ratio[0] > np.log(ANYTIME_LEVEL)


def test_a_place_far_from_the_posterior_lies_outside_of_all_regions(follower):
    scene = world.digital(SCAN, 1, (3, 2))
    noise, scanner, followed = NoiseEstimate(scene.sigma, 200), world.Scanner(scene), follower.begin({}, 1)
    for block in [schedules.unsaturated(SCAN), *SCAN.schedule]:
        followed, info = follower.absorb(followed, block, scanner.play(block), noise)
    summary = info.summary
    off = summary.mean + 4 * np.sqrt(np.stack([summary.covariance[:, 0, 0], summary.covariance[:, 1, 1]], axis=1))
    place = follower.place(followed, info, off)
    assert place.credibility[0] > 0.99
    assert place.log_ratio[0] < np.log(ANYTIME_LEVEL)


def test_optimised_schedules_beat_random_ones_and_keep_limits_and_quota(prospect):
    draws = schedules.draws_at(prospect, np.random.default_rng(0).uniform(0.2, 0.8, (8, 2)), [{}] * 8, world.NOISE)
    made, other = schedules.optimise(prospect, draws, 24, np.random.default_rng(1), n_restarts=2)
    others = [schedules.random(prospect, 24, np.random.default_rng(seed)) for seed in range(3)]
    ours, next_best, *theirs = (schedules._objective(prospect, draws, schedule, 16.0) for schedule in (made, other, *others))
    assert ours < next_best < min(theirs) - 0.5
    for schedule in (made, other, *others):
        assert len(schedule) == 24
        assert limits.check_schedule(SCAN.model_copy(update={"schedule": tuple(schedule)})) == []
        assert schedules._keeps_limits(prospect, schedule)


def test_a_loop_stops_where_its_voxel_has_converged_and_suggests_until_then(prospect, follower):
    scene = world.digital(SCAN, 1, (3, 3))
    approved = schedules.published(SCAN)
    trace = closed_loop.run(scene, follower, prospect, approved, closed_loop.Adaptive(follower, prospect, scene), until_stop=True)
    assert trace.stopped_at == len(trace.blocks) < len(approved)
    assert all(advice.block is not None for advice in trace.advice)
    assert trace.blocks[0] == approved[0]
    assert trace.blocks[1:] == [advice.block for advice in trace.advice[:-1]]
    assert trace.ends_s[-1] == pytest.approx(sum(block.duration_s for block in trace.blocks) - trace.blocks[0].t_rec_s)


def test_a_recovery_that_is_not_played_takes_no_time(prospect, follower):
    """The first image's: the first state is that after it."""
    scene, schedule = world.digital(SCAN, 1, (3, 3)), schedules.published(SCAN)[:2]
    waiting = [schedule[0].model_copy(update={"t_rec_s": 9.0}), schedule[1]]
    ends = [closed_loop.run(scene, follower, prospect, each, closed_loop.Fixed()).ends_s for each in (schedule, waiting)]
    np.testing.assert_allclose(ends, [[3.0, 7.0]] * 2)


def test_a_loop_leaves_as_many_images_as_they_are_as_is_asked(prospect, follower):
    scene, schedule = world.digital(SCAN, 1, (3, 3)), schedules.published(SCAN)
    choice = closed_loop.Adaptive(follower, prospect, scene)
    trace = closed_loop.run(scene, follower, prospect, schedule, choice, n_given=3)
    assert trace.blocks[:3] == schedule[:3]
    assert trace.blocks[3:] == [advice.block for advice in trace.advice[2:-1]]


def test_a_loop_goes_on_while_what_was_not_measured_may_lie_beyond_its_range(prospect, follower, monkeypatch):
    monkeypatch.setattr(lack_of_fit, "NEAR_BEYOND", -100.0)  # whatever the images tell of is in doubt
    monkeypatch.setattr(follower, "told", lambda _beyond: {"b0_ppm": 0.0})
    scene = world.digital(SCAN, 1, (3, 3))
    approved = schedules.published(SCAN)
    trace = closed_loop.run(scene, follower, prospect, approved, closed_loop.Adaptive(follower, prospect, scene), until_stop=True)
    assert (trace.stopped_at, len(trace.blocks), any(trace.vetoed)) == (None, len(approved), False)


def test_a_loop_ends_where_it_knows_as_much_as_is_asked(prospect, follower):
    scene = world.digital(SCAN, 2, (3, 4))
    full = closed_loop.run(scene, follower, prospect, schedules.published(SCAN), closed_loop.Fixed())
    areas = np.median(full.area, axis=1)
    short = closed_loop.run(scene, follower, prospect, schedules.published(SCAN), closed_loop.Fixed(), until_area=float(areas[4]))
    n = int(np.flatnonzero(areas <= areas[4])[0]) + 1
    assert len(short.blocks) == n < len(full.blocks)
    assert np.array_equal(short.area, full.area[:n])


@pytest.mark.parametrize("name", [name for name in world.WORLDS if name != "as described"])
def test_a_world_that_is_not_as_described_reads_otherwise(name):
    scene = world.replace(world.single(SCAN, (4, 1)), sigma=0.1)
    described, other = world.Scanner(scene), world.Scanner(world.WORLDS[name](scene))
    read = np.array([[scanner.play(block)[0] for block in SCAN.schedule] for scanner in (described, other)])
    # ten times the noise; after a fully saturated image nothing is left of the first state but what the first image shows
    least = 10 * scene.sigma if name != "rician noise" else 1e-9
    assert np.max(np.abs(read[0] - read[1])) > least


def test_the_first_block_played_skips_its_recovery_dummy_or_image():
    """The first state is that just before the first saturation of all; scanner, posterior and prospect agree on it, with dummies and without."""
    still = {name: Auxiliary(lower=span.centre, upper=span.centre) for name, span in SCAN.auxiliaries.items()}
    for n_dummies in (0, 2):
        first_state = FirstState(mz=0.4, n_dummies=n_dummies)
        scan = SCAN.model_copy(update={"auxiliaries": still, "first_state": first_state, "schedule": SCAN.schedule[:1], "readout": CARRYING})
        reference, prospect = Reference(scan, (), n_points=(8, 8)), Prospect(scan)
        played = reference.play(scan.schedule[0], first=True)[0], prospect.read(prospect.begin(), scan.schedule[0])[0, 0]
        reference.close()
        for read, n_nodes in zip(played, (lattice.N_NODES, predictive.N_POINTS), strict=True):
            f, k = (lattice.node_values(side.lower, side.upper, n_nodes)[7] for side in scan.parameters.values())
            scene = world.single(scan, (5, 1))
            scene = world.replace(scene, values={**scene.values, "fs": np.array([f]), "ksw": np.array([k])}, sigma=0.0)
            seen = world.Scanner(scene).play(scan.schedule[0])[0] / scene.amplitude[0]
            assert float(read.reshape(n_nodes, n_nodes)[7, 7]) == pytest.approx(seen, abs=1e-5)


def test_fixed_schedules_know_the_maps_and_the_prior_that_steering_does(prospect, follower):
    """A draw whose T1 is mapped says as much of f as one whose T1 is known to be at the centre of its range to within the map's error."""
    share = np.full((1, 2), 0.5)
    mapped = {"t1_s": follower.measured("t1_s", 0.5 * (SCAN.auxiliaries["t1_s"].lower + SCAN.auxiliaries["t1_s"].upper))}
    without, with_map = (schedules.draws_at(prospect, share, [maps], world.NOISE) for maps in ({}, mapped))
    areas = [schedules.expected_log_areas(prospect, each, SCAN.schedule)[-1] for each in (without, with_map)]
    assert areas[1] < areas[0]
    widths = [(side.upper - side.lower) / side.prior_sd for side in SCAN.parameters.values()]
    assert without.prior_precision == pytest.approx(tuple(np.square(widths)))


def test_where_nothing_is_mapped_relaxation_lies_beyond_its_ranges():
    wrong = world.maps_off(world.from_priors(SCAN, 12, (4,)))
    for name in ("t1_s", "t2_s"):
        span = SCAN.auxiliaries[name]
        values = np.unique(wrong.values[name].round(9))
        assert set(values) <= {round(0.9 * span.lower, 9), round(1.1 * span.upper, 9)}
        assert len(values) == 2
