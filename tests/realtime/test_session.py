"""The session on a small digital phantom: six images, everything known."""

from __future__ import annotations

import time

import numpy as np
import pytest

from scansteer.core import lack_of_fit, stopping
from scansteer.core.errors import InputError
from scansteer.protocols.larg_phantom import PUBLISHED
from scansteer.protocols.scan import Auxiliary, Noise, Scan, Stop
from scansteer.realtime.images import Frame, Geometry
from scansteer.realtime.messages import Decision, Pulse
from scansteer.realtime.region_report import Reporter
from scansteer.realtime.roi import Region
from scansteer.realtime.session import Session, rule_of
from scansteer.realtime.worker import Setup
from scansteer.simulators.phantom import Magnet, three_vials

N = 8


@pytest.fixture(scope="module")
def scan() -> Scan:
    return PUBLISHED.model_copy(
        update={
            "matrix": None,
            "schedule": tuple(PUBLISHED.schedule[i] for i in (17, 0, 2, 10, 5, 7, 3, 18)),
            "auxiliaries": {
                "t1_s": Auxiliary(lower=2.5, upper=3.3, map_error_relative=0.03),
                "t2_s": Auxiliary(lower=0.6, upper=1.2, map_error_relative=0.05),
            },
        }
    )


@pytest.fixture(scope="module")
def frames(scan: Scan) -> list[Frame]:
    phantom = three_vials(scan)
    magnet = Magnet(phantom, scan, seed=1)
    return [Frame(magnet.play(block), phantom.geometry, repetition=i) for i, block in enumerate(scan.schedule)]


def mask(scan: Scan) -> Frame:
    phantom = three_vials(scan)
    return Frame(phantom.labels.astype(float), phantom.geometry, role="mask")


def session(scan: Scan, **kwargs) -> Session:
    return Session(Setup("test", scan, region=mask(scan), region_names=("a", "b", "c"), **kwargs))


def play(one: Session, frames: list[Frame], pulse: Pulse | None = None) -> list[Decision]:
    return [one.absorb(frame, received_at=time.perf_counter(), pulse=pulse) for frame in frames]


def timeless(decision: Decision) -> dict:
    return decision.model_dump(exclude={"latency_ms", "margin_ms"})


@pytest.fixture(scope="module")
def played(scan: Scan, frames: list[Frame], compilations: list[str]) -> tuple[Session, list[Decision], int]:
    """A whole scan, and how often something was compiled after the session was ready."""
    one = session(scan)
    before = len(compilations)
    decisions = play(one, frames)
    return one, decisions, len(compilations) - before


def test_every_decision_says_what_the_means_say(played, scan):
    """Three vials of one tissue each: at the end their means' intervals hold what is in them, and are narrower than their voxels'."""
    truth = three_vials(scan)
    for decision in played[1]:
        assert all(region.mean_signal is not None for region in decision.regions)
    for number, region in enumerate(played[1][-1].regions, 1):
        assert region.mean_signal.n_independent == pytest.approx(max(1.0, scan.noise.effective_voxel_fraction * region.n_voxels))
        for name, of_mean in region.mean_signal.parameters.items():
            value = float(truth.values[name][number - 1])
            assert of_mean.ci_lower < value < of_mean.ci_upper
            assert of_mean.ci_halfwidth_relative < region.parameters[name].ci_halfwidth_relative


def test_nothing_is_compiled_after_ready(played, compilations):
    assert compilations  # there is something to count
    assert played[2] == 0, compilations[-played[2] :]


def test_every_decision_carries_its_regions_and_counts(played, scan):
    _, decisions, _ = played
    assert [decision.n_images for decision in decisions] == list(range(1, N + 1))
    for decision in decisions:
        assert [region.name for region in decision.regions] == ["a", "b", "c"]
        assert decision.n_planned == N
        assert decision.valid_until_repetition == decision.repetition + 1
        for region in decision.regions:
            assert set(region.parameters) == {"fs", "ksw"}
            assert 0 <= region.fraction_converged <= 1
    assert decisions[0].regions[0].cr_shrinkage is None
    last, before = decisions[-1].regions[0], decisions[-2].regions[0]
    assert last.cr_shrinkage == pytest.approx(last.cr_area_median / before.cr_area_median)


def test_truth_of_each_vial_lies_in_its_intervals_at_the_end(played, scan):
    one, _, _ = played
    phantom, maps = three_vials(scan), one.maps()
    for name in ("fs", "ksw"):
        inside = (phantom.truth(name) >= maps[f"{name}_lower"]) & (phantom.truth(name) <= maps[f"{name}_upper"])
        assert np.mean(inside[phantom.labels > 0]) > 0.85
    assert np.all(np.isfinite(maps["nrmse"][phantom.labels > 0]))
    assert np.all(np.isnan(maps["nrmse"][phantom.labels == 0]))


def test_replaying_the_first_images_gives_the_same_decisions_bit_for_bit(played, scan, frames):
    again = play(session(scan), frames[:5])
    assert [timeless(decision) for decision in again] == [timeless(decision) for decision in played[1][:5]]


def test_a_missing_image_leaves_the_pulse_in_the_history(scan, frames):
    one = session(scan)
    play(one, frames[:3])
    one.absorb_missing(3)
    decision = play(one, frames[4:5])[0]
    assert (decision.n_images, decision.repetition) == (4, 4)
    assert decision.lack_of_fit.passed


def test_the_pulse_really_played_is_what_counts(scan):
    """Images of another schedule, described by the pulses that were played, fit; described by the schedule they do not."""
    blocks = [scan.schedule[i] for i in (3, 5, 1, 0, 7, 2, 4, 6)]
    phantom = three_vials(scan)
    magnet = Magnet(phantom, scan, seed=2)
    played = [Frame(magnet.play(block), phantom.geometry, repetition=i) for i, block in enumerate(blocks)]
    told = session(scan)
    for frame, block in zip(played, blocks, strict=True):
        told.absorb(frame, received_at=0.0, pulse=Pulse(**block.model_dump()))
    untold = session(scan)
    play(untold, played)
    assert told.summary().nrmse_median < 0.5 * untold.summary().nrmse_median


@pytest.mark.parametrize("pixels", [np.nan, 0.0])
def test_unusable_images_are_refused_and_change_nothing(scan, frames, pixels):
    one = session(scan)
    play(one, frames[:2])
    bad = Frame(np.full_like(frames[2].pixels, pixels), frames[2].geometry, repetition=2)
    with pytest.raises(InputError, match="repetition 2"):
        one.absorb(bad, received_at=0.0)
    one.absorb(frames[2], received_at=0.0)
    assert one.summary().n_images == 3


def test_an_image_of_another_geometry_is_refused(scan, frames):
    one = session(scan)
    play(one, frames[:1])
    other = Frame(frames[1].pixels[:, :-1], Geometry((frames[1].geometry.matrix[0], frames[1].geometry.matrix[1] - 1, 1)), repetition=1)
    with pytest.raises(InputError, match="matrix"):
        one.absorb(other, received_at=0.0)


def test_an_image_out_of_order_is_refused(scan, frames):
    one = session(scan)
    play(one, frames[:2])
    with pytest.raises(InputError, match="order"):
        one.absorb(frames[0], received_at=0.0)


def test_measured_maps_narrow_the_intervals(scan, frames, played):
    phantom = three_vials(scan)
    maps = {
        role: Frame(1e3 * np.nan_to_num(phantom.truth(name), nan=0.0), phantom.geometry, role=role)
        for role, name in (("t1", "t1_s"), ("t2", "t2_s"))
    }
    one = session(scan, auxiliaries=maps)
    decision = play(one, frames)[-1]
    areas, wider = ([region.cr_area_median for region in d.regions] for d in (decision, played[1][-1]))
    assert np.all(np.array(areas) < np.array(wider))


def test_a_noisier_scan_says_so(scan, frames, played):
    loud = scan.model_copy(update={"noise": Noise(sigma=200.0)})
    decision = play(session(loud), frames)[-1]
    assert decision.regions[0].cr_area_median > 2 * played[1][-1].regions[0].cr_area_median


def test_images_that_should_not_count_leave_the_posterior_alone_and_are_said(scan, frames, played):
    """A duplicate, a dummy and a rescaled image in the middle of a scan; every one was played."""
    one = session(scan)
    play(one, frames[:5])
    wrong = [
        (Frame(frames[1].pixels, frames[1].geometry, repetition=5), "duplicate"),
        (Frame(frames[6].pixels, frames[6].geometry, repetition=6, is_dummy=True), "dummy"),
        (Frame(1.5 * frames[7].pixels, frames[7].geometry, repetition=7), "times what was expected"),
    ]
    before = one.maps()["fs_map"]
    for number, (frame, said) in enumerate(wrong, start=5):
        decision = one.absorb(frame, received_at=0.0)
        assert (decision.n_images, decision.sequence_number, decision.repetition) == (5, number, number)
        assert (decision.action, decision.cause) == ("continue", "veto")
        assert said in decision.reason
        assert decision.warnings == (decision.reason,)
    np.testing.assert_array_equal(one.maps()["fs_map"], before)
    assert one.summary().n_images == 5


def test_no_image_of_a_clean_scan_is_left_out_and_its_predictions_hold(played):
    _, decisions, _ = played
    assert [decision.warnings for decision in decisions] == [()] * N
    assert all(decision.lack_of_fit.passed for decision in decisions)
    assert decisions[-1].lack_of_fit.prediction == pytest.approx(1.0, abs=0.8)  # mean of six chi-squared that voxels may share
    assert all(region.fraction_moved == 0 for decision in decisions for region in decision.regions)


def test_one_image_of_another_pulse_forbids_a_stop_until_it_is_excluded(scan):
    phantom = three_vials(scan)
    magnet = Magnet(phantom, scan, seed=3)
    played = [scan.schedule[3 if number == 4 else number] for number in range(N)]  # and nobody says so
    spoilt = [Frame(magnet.play(block), phantom.geometry, repetition=number) for number, block in enumerate(played)]
    decisions = play(session(scan), spoilt)
    assert [decision.lack_of_fit.passed for decision in decisions] == [True] * 4 + [False] * (N - 4)
    assert decisions[-1].cause == "veto"
    assert "does not fit since image 5" in decisions[-1].reason
    without = session(scan)
    play(without, spoilt[:4])
    without.absorb_missing(4)
    assert all(decision.lack_of_fit.passed for decision in play(without, spoilt[5:]))


def test_a_region_that_does_not_fit_by_itself_forbids_a_stop(scan, frames):
    """One of three vials reads the image of another pulse: the median voxel does not."""
    phantom = three_vials(scan)
    wrong = Magnet(phantom, scan, seed=5).play(scan.schedule[3])
    mixed = np.where(phantom.labels == 3, wrong, frames[2].pixels)
    decisions = play(session(scan), [*frames[:2], Frame(mixed, phantom.geometry, repetition=2), *frames[3:]])
    assert (decisions[-1].lack_of_fit.region, decisions[-1].cause) == ("c", "veto")
    assert "region 'c' by itself" in decisions[-1].reason
    assert decisions[-1].regions[2].fraction_unexplained > 0.5
    assert max(region.fraction_unexplained for region in decisions[-1].regions[:2]) < 0.05


def test_decisions_say_what_going_on_is_worth(played):
    _, decisions, _ = played
    for decision in decisions:
        assert decision.gains.best >= (0 if decision.next_pulse is None else decision.next_pulse.expected_gain)
        assert decision.gains.remaining >= 0.9 * decision.gains.scheduled
    assert decisions[0].gains.remaining > decisions[0].gains.scheduled > 0
    assert (decisions[-1].gains.scheduled, decisions[-1].gains.remaining) == (0, 0)
    assert decisions[-1].gains.best > 0
    first, last = (decision.regions[0].parameters for decision in (decisions[0], decisions[-1]))
    assert all(each.fraction_not_identifiable == 1 for each in first.values())  # one image tells nothing
    assert all(each.fraction_not_identifiable == 0 for each in last.values())


def test_the_rule_knows_the_prior(scan):
    priors = dict(zip(scan.parameter_names, ("beta", "uniform"), strict=True))
    parameters = {name: each.model_copy(update={"prior": priors[name]}) for name, each in scan.parameters.items()}
    rule = rule_of(scan.model_copy(update={"parameters": parameters}))
    assert rule.prior_limit == (stopping.BETA_PRIOR_LIMIT, stopping.PRIOR_LIMIT)
    assert rule.prior_sd == tuple(each.prior_sd for each in parameters.values())


def test_voxels_that_moved_are_left_out_of_what_is_said_of_their_region(scan, played):
    one, decisions, _ = played
    at = np.arange(40)
    few, many, none = (np.isin(np.arange(len(one._info.nrmse)), at[:n]) for n in (4, 20, 0))
    reporter = Reporter(scan.parameter_names, rule_of(scan)._replace(halfwidth_relative=(50.0, 50.0)))
    mean = [decisions[-1].regions[0].mean_signal]

    def report(moved, unexplained):
        return reporter.report([Region("a", at)], [at], one._info, moved, unexplained, mean)[0]

    plain, without, halved, strange = report(none, none), report(few, none), report(many, none), report(none, few)
    assert [each.fraction_moved for each in (plain, without, halved)] == [0, 0.1, 0.5]
    estimates = one._info.summary.map[:40, 0]
    name = scan.parameter_names[0]
    assert without.parameters[name].median == pytest.approx(np.median(estimates[4:]))
    assert halved.parameters[name].median == plain.parameters[name].median == pytest.approx(np.median(estimates))
    assert (plain.fraction_converged, without.fraction_converged, halved.fraction_converged) == (1, 1, 0.5)
    assert (strange.fraction_unexplained, strange.fraction_converged) == (0.1, 0.9)
    assert all(each.n_voxels == 40 for each in (plain, without, halved))


def test_a_stop_is_refused_where_what_was_not_measured_lies_beyond_its_range(scan, frames):
    """T1 is 2.9 s; the scan that is described allows for up to 2.5 s."""
    easy = {name: parameter.model_copy(update={"target_halfwidth_relative": 50.0}) for name, parameter in scan.parameters.items()}
    narrow = {**scan.auxiliaries, "t1_s": Auxiliary(lower=2.2, upper=2.5)}
    stop = Stop(n_min=6, fraction_converged=0.5)
    decisions = play(session(scan.model_copy(update={"parameters": easy, "auxiliaries": narrow, "stop": stop})), frames)
    refused = [decision for decision in decisions if decision.lack_of_fit.outside]
    assert len(refused) >= 2
    for decision in refused:
        assert (decision.lack_of_fit.outside, decision.lack_of_fit.passed, decision.cause) == ("t1_s", False, "veto")
        assert "t1_s lies beyond the range that the scan states" in decision.reason


def test_a_stop_waits_while_what_was_not_measured_may_lie_beyond_its_range(scan, frames, monkeypatch):
    easy = {name: parameter.model_copy(update={"target_halfwidth_relative": 50.0}) for name, parameter in scan.parameters.items()}
    unmapped = {**scan.auxiliaries, "t1_s": Auxiliary(lower=2.6, upper=3.2)}
    described = scan.model_copy(update={"parameters": easy, "auxiliaries": unmapped, "stop": Stop(n_min=6, fraction_converged=0.5)})
    assert play(session(described), frames)[-1].would_stop_at is not None
    monkeypatch.setattr(lack_of_fit, "NEAR_BEYOND", -100.0)  # whatever the images tell of is in doubt
    decisions = play(session(described), frames)
    assert decisions[-1].would_stop_at is None
    waiting = [decision for decision in decisions if "may lie beyond the range" in decision.reason]
    assert len(waiting) >= 2
    assert all((decision.cause, decision.lack_of_fit.passed, decision.lack_of_fit.outside) == ("veto", True, None) for decision in waiting)


def test_a_futile_scan_is_not_stopped_either(scan, frames):
    """The targets are never met; that the rest of the schedule brings little is no reason to stop on a model that does not hold."""
    narrow = {**scan.auxiliaries, "t1_s": Auxiliary(lower=2.2, upper=2.5)}
    never = {name: parameter.model_copy(update={"target_halfwidth_relative": 1e-6}) for name, parameter in scan.parameters.items()}
    stop = Stop(n_min=3, plateau_nat=100.0, confirmations=1)
    decisions = play(session(scan.model_copy(update={"parameters": never, "auxiliaries": narrow, "stop": stop})), frames)
    assert decisions[-1].lack_of_fit.outside == "t1_s"
    assert decisions[-1].cause == "veto"
    true = play(session(scan.model_copy(update={"parameters": never, "stop": stop})), frames)
    assert (true[-1].lack_of_fit.outside, true[-1].cause) == (None, "plateau")


def test_a_dummy_as_the_first_image_is_refused(scan, frames):
    one = session(scan)
    with pytest.raises(InputError, match="dummy"):
        one.absorb(Frame(frames[0].pixels, frames[0].geometry, repetition=0, is_dummy=True), received_at=0.0)
    one.absorb_missing(0)
    assert play(one, frames[1:2])[0].n_images == 1


def test_a_stop_waits_for_the_operator_where_the_scan_says_so(scan, frames):
    easy = {name: parameter.model_copy(update={"target_halfwidth_relative": 50.0}) for name, parameter in scan.parameters.items()}
    asking = scan.model_copy(update={"parameters": easy, "stop": Stop(n_min=3, operator_confirmation=True, fraction_converged=0.5)})
    one = session(asking)
    *before, proposed = play(one, frames[:5])
    assert [decision.cause for decision in before] == ["target", "target", "confirming", "operator"]  # two images leave what the prior says
    is_probe = [decision.next_pulse.expected_gain == 0 for decision in (*before, proposed)]
    assert is_probe == [False, False, True, True, False]  # from when the targets are met until a stop has been proposed
    assert (proposed.action, proposed.cause, proposed.would_stop_at) == ("continue", "operator", 4)
    confirmed = one.confirm_stop()
    assert (confirmed.action, confirmed.sequence_number, confirmed.next_pulse) == ("stop", 5, None)
    with pytest.raises(InputError, match="no stop to confirm"):
        one.confirm_stop()
    after = play(one, frames[5:6])[0]
    assert (after.action, after.sequence_number) == ("stop", 6)


def test_a_region_without_signal_is_said_and_its_mean_has_no_estimate(scan, frames):
    phantom = three_vials(scan)
    labels = phantom.labels.astype(float)
    labels[0, 0, :2] = 4.0
    dark = [Frame(np.where(labels == 4, 0.0, frame.pixels), frame.geometry, repetition=frame.repetition) for frame in frames]
    region = Frame(labels, phantom.geometry, role="mask")
    decisions = play(Session(Setup("test", scan, region=region, region_names=("a", "b", "c", "air"))), dark)
    assert any("Region 'air' holds no signal" in warning for warning in decisions[0].warnings)
    mean = decisions[-1].regions[3].mean_signal
    assert mean.nrmse is None
    assert all(each.estimate is None and each.ci_lower is None for each in mean.parameters.values())
    assert all(decision.regions[3].fraction_converged == 0 for decision in decisions)
    assert all(decision.action == "continue" for decision in decisions)
    assert all(each.estimate is not None for each in decisions[-1].regions[0].mean_signal.parameters.values())
