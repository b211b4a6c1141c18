import numpy as np
import pytest

from scansteer.core import stopping
from scansteer.core.stopping import Region, Rule

RULE = Rule(halfwidth_relative=(0.2, 0.3), fraction_converged=0.9, n_min=4, confirmations=2)


def run(fractions, vetoes=()):
    state, verdicts = stopping.init(), []
    for n, fraction in enumerate(fractions, start=1):
        state, verdict = stopping.update(RULE, state, n, [Region("a", fraction, 1e6)], "no fit" if n in vetoes else None, 1.0)
        verdicts.append(verdict)
    return state, verdicts


def test_stop_needs_enough_images_and_confirmations():
    state, verdicts = run([1.0, 1.0, 1.0, 1.0, 1.0])
    assert [verdict.stop for verdict in verdicts] == [False, False, False, True, True]
    assert state.would_stop_at == 4


def test_a_setback_restarts_the_confirmations():
    _, verdicts = run([1, 1, 1, 0.5, 1, 1])
    assert [verdict.stop for verdict in verdicts] == [False] * 5 + [True]
    assert "50%" in verdicts[3].reason


def test_veto_prevents_a_stop_and_names_itself():
    state, verdicts = run([1.0] * 6, vetoes={5})
    assert not verdicts[4].stop
    assert verdicts[4].reason == "no fit"
    assert not verdicts[5].stop  # the confirmations start again
    assert state.would_stop_at == 4  # the first call is remembered


def test_the_slowest_region_decides():
    _, verdict = stopping.update(RULE, stopping.State(5, None), 9, [Region("a", 1.0, 1e6), Region("b", 0.2, 1e6)], None, 1.0)
    assert not verdict.stop
    assert "'b'" in verdict.reason


@pytest.mark.parametrize(
    ("halfwidth", "edge_mass", "sd", "expected"),
    [
        ((0.1, 0.1), (0.0, 0.0), (0.5, 0.5), True),
        ((0.3, 0.1), (0.0, 0.0), (0.5, 0.5), False),
        ((np.inf, 0.1), (0.0, 0.0), (0.5, 0.5), False),
        ((0.1, 0.1), (0.0, 0.03), (0.5, 0.5), False),
        ((0.1, 0.1), (0.01, 0.0), (0.5, 0.5), False),  # of a beta prior, with a limit of its own
        ((0.1, 0.1), (0.0, 0.0), (0.5, 1.7), False),  # of a prior's 2
    ],
)
def test_a_voxel_converges_when_both_targets_are_met_by_what_its_images_say(halfwidth, edge_mass, sd, expected):
    rule = RULE._replace(prior_sd=(1.0, 2.0), prior_limit=(stopping.BETA_PRIOR_LIMIT, stopping.PRIOR_LIMIT))
    covariance = np.diag(np.square(sd))[None]
    assert stopping.converged(rule, np.array([halfwidth]), np.array([edge_mass]), covariance)[0] == expected


def test_halfwidth_of_an_estimate_at_zero_is_infinite():
    width = stopping.relative_halfwidth(np.array([[0.0, 2.0]]), np.array([[0.0, 1.0]]), np.array([[1.0, 3.0]]))
    np.testing.assert_array_equal(width, [[np.inf, 0.5]])


def test_few_independent_voxels_need_a_larger_share():
    assert stopping.needed(RULE, Region("a", 0.0, 1e6)) == pytest.approx(0.9, abs=1e-3)
    assert stopping.needed(RULE, Region("a", 0.0, 100)) == pytest.approx(0.9384)
    assert stopping.needed(RULE, Region("a", 0.0, 2)) == 1.0


def test_a_plateau_ends_a_scan_whose_rest_would_bring_nothing():
    rule = RULE._replace(plateau=0.1)
    behind = [Region("a", 0.2, 1e6)]
    _, verdict = stopping.update(rule, stopping.State(1, None), 9, behind, None, 0.05)
    assert verdict.stop
    assert "plateau" in verdict.reason
    assert not stopping.update(rule, stopping.State(1, None), 9, behind, None, 0.5)[1].stop
    assert not stopping.update(rule, stopping.State(1, None), 9, behind, "no fit", 0.05)[1].stop


def test_every_verdict_names_its_cause():
    done, behind = [Region("a", 1.0, 1e6)], [Region("a", 0.1, 1e6)]
    plateau, asking = RULE._replace(plateau=0.1), RULE._replace(asks_operator=True)

    def cause(rule, streak, n, regions, veto=None, gain=1.0):
        return stopping.update(rule, stopping.State(streak, None), n, regions, veto, gain)[1].cause

    assert cause(RULE, 5, 9, done, veto="no fit") == "veto"
    assert cause(RULE, 5, 9, behind) == "target"
    assert cause(RULE, 5, 3, done) == "few-images"
    assert cause(RULE, 0, 9, done) == "confirming"
    assert cause(asking, 5, 9, done) == "operator"
    assert cause(RULE, 5, 9, done) == "converged"
    assert cause(plateau, 5, 9, behind, gain=0.05) == "plateau"


def test_a_stop_that_asks_the_operator_is_proposed_until_it_is_confirmed():
    rule, region = RULE._replace(asks_operator=True), [Region("a", 1.0, 1e6)]
    state, verdict = stopping.update(rule, stopping.State(1, None), 4, region, None, 1.0)
    assert (verdict.stop, verdict.cause) == (False, "operator")
    assert state.would_stop_at == 4
    state, verdict = stopping.update(rule, stopping.confirm(state), 5, region, None, 1.0)
    assert verdict.stop


def test_a_confirmation_is_void_once_something_speaks_against_the_stop():
    rule, region = RULE._replace(asks_operator=True), [Region("a", 1.0, 1e6)]
    state = stopping.confirm(stopping.State(3, 4))
    state, _ = stopping.update(rule, state, 5, region, "no fit", 1.0)
    for n in (6, 7, 8):
        state, verdict = stopping.update(rule, state, n, region, None, 1.0)
        assert not verdict.stop
