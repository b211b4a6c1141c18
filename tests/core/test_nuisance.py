import numpy as np
import pytest

from scansteer.core import nuisance, predictive
from scansteer.core.nuisance import SPREAD, Axis, Measured

T1 = Axis("t1_s", 1.0, 3.0, n_nodes=5, logarithmic=True)
B1 = Axis("b1_relative", 0.9, 1.1, n_nodes=3)


def at_nodes(axes, function):
    return function(*nuisance.tensor_nodes(axes).T)


def test_measured_nuisance_gives_value_and_scaled_derivative():
    weights = nuisance.columns([T1], {"t1_s": Measured(1.7, 0.05)})[0]
    mean, slope = weights @ at_nodes([T1], lambda t1: np.exp(-1 / t1))
    assert mean == pytest.approx(np.exp(-1 / 1.7), abs=1e-4)
    assert slope == pytest.approx(0.05 * np.exp(-1 / 1.7) / 1.7**2, rel=1e-2)


def test_unmeasured_nuisance_gives_centre_and_standard_deviation_of_a_linear_signal():
    mean, slope = nuisance.columns([B1], {})[0] @ at_nodes([B1], lambda b1: 3 + 5 * b1)
    assert mean == pytest.approx(8.0)
    assert slope == pytest.approx(SPREAD * 5 * 0.2 / np.sqrt(12))


def test_slices_keep_mean_and_variance_of_the_range():
    axis = B1._replace(n_slices=4)
    parts = nuisance.columns([axis], {}) @ at_nodes([axis], lambda b1: b1)
    assert parts.shape == (4, 2)
    assert parts[:, 0].mean() == pytest.approx(1.0)
    assert parts[:, 0].var() + (parts[:, 1] ** 2).mean() / SPREAD**2 == pytest.approx(0.2**2 / 12)


def test_a_curved_nuisance_gives_mean_and_variance_of_a_quadratic_signal():
    axis = Axis("b0_ppm", -0.1, 0.3, n_nodes=3, curved=True)
    rows = nuisance.columns([axis], {})[0] @ at_nodes([axis], lambda b0: 2 + b0 - 5 * (b0 - 0.1) ** 2)
    drawn = np.linspace(-0.1, 0.3, 100_001)
    signals = 2 + drawn - 5 * (drawn - 0.1) ** 2
    assert rows[0] == pytest.approx(signals.mean(), abs=1e-5)
    assert np.sum(rows[1:] ** 2) == pytest.approx(SPREAD**2 * signals.var(), rel=1e-3)


def test_a_curved_logarithmic_nuisance_gives_mean_and_variance_over_its_linear_range():
    axis = T1._replace(n_nodes=6, curved=True)
    drawn = np.linspace(axis.lower, axis.upper, 100_001)

    def signal(t1):
        return 1 + 0.4 * (t1 - 2) - 0.3 * (t1 - 2.2) ** 2

    rows = nuisance.columns([axis], {})[0] @ at_nodes([axis], signal)
    assert rows[0] == pytest.approx(signal(drawn).mean(), abs=2e-3)
    assert np.sum(rows[1:] ** 2) == pytest.approx(SPREAD**2 * signal(drawn).var(), rel=0.01)


def test_a_curved_nuisance_has_two_coefficients_unless_it_is_measured():
    axes = [B1, Axis("b0_ppm", -0.1, 0.1, curved=True), T1]
    for maps in ({}, {"b0_ppm": Measured(0.02, 0.01)}):
        weights = nuisance.columns(axes, maps)[0]
        names = nuisance.coefficients(axes, maps)
        assert len(weights) == 1 + len(names) == 5 - len(maps)
        by = dict(zip(names, weights[1:] @ at_nodes(axes, lambda b1, b0, t1: b1 + 3 * b0**2 + 0 * t1), strict=True))
        assert by["b1_relative"] == pytest.approx(SPREAD * 0.2 / np.sqrt(12))
        assert by["t1_s"] == pytest.approx(0, abs=1e-9)
        assert by["b0_ppm"] == pytest.approx(3 * 2 * 0.02 * 0.01 if maps else 0, abs=1e-9)


def test_axes_combine_in_the_order_of_the_tensor_nodes():
    axes = [T1, B1]
    weights = nuisance.columns(axes, {"t1_s": Measured(2.0, 0.1)})[0]
    mean, by_t1, by_b1 = weights @ at_nodes(axes, lambda t1, b1: np.log(t1) * b1)
    assert mean == pytest.approx(np.log(2.0))
    assert by_t1 == pytest.approx(0.1 / 2.0, rel=1e-6)
    assert by_b1 == pytest.approx(SPREAD * np.log(2.0) * 0.2 / np.sqrt(12))


def test_offset_is_one_more_column_that_reads_one():
    weights = nuisance.with_offset(nuisance.columns([B1], {}), 0.05, 0.02)[0]
    signals = np.append(at_nodes([B1], lambda b1: b1), 1.0)
    np.testing.assert_allclose(weights @ signals, [1.05, SPREAD * 0.2 / np.sqrt(12), 0.02])


def test_no_axes_leave_the_signal_alone():
    np.testing.assert_array_equal(nuisance.columns([], {}), np.ones((1, 1, 1)))


def test_the_star_of_nodes_gives_the_same_columns_as_the_tensor_grid():
    """For signals in which nuisances add up, slices and curvature included."""
    axes = (T1._replace(n_slices=2), Axis("b0_ppm", -0.1, 0.2, curved=True), B1)

    def signal(t1, b0, b1):
        return np.log(t1) + 3 * b0**2 + b0 + 0.5 * b1

    star = predictive.star((), axes)
    on_star = signal(*star.tissue.T)[star.place[1]]
    on_grid = signal(*nuisance.tensor_nodes(axes).T)
    np.testing.assert_allclose(predictive.columns(star, {}) @ on_star, nuisance.columns(axes, {}) @ on_grid, atol=1e-9)


CARRY = Axis("carry_over", -0.7, 0.1, n_nodes=3, times="t1_s")


def test_the_product_of_two_unmeasured_nuisances_is_one_more_coefficient():
    axes = [CARRY, T1._replace(curved=True)]
    assert nuisance.coefficients(axes, []) == ["carry_over", "t1_s", "t1_s squared", "carry_over times t1_s"]
    rng = np.random.default_rng(0)
    carry, t1 = rng.uniform(-0.7, 0.1, 100_000), rng.uniform(1.0, 3.0, 100_000)
    rows = nuisance.columns(axes, {})[0] @ at_nodes(axes, lambda c, t: (c + 0.3) * np.polyval([0.3, 1.0], t - 2.0))
    np.testing.assert_allclose(rows[4], SPREAD**2 * np.std((carry + 0.3) * 0.3 * (t1 - 2.0)), rtol=0.02)
    np.testing.assert_allclose(rows[1], SPREAD * np.std(carry + 0.3), rtol=0.01)


@pytest.mark.parametrize("mapped", ["carry_over", "t1_s"])
def test_a_product_needs_both_unmeasured_and_a_curved_partner(mapped):
    assert nuisance.products([CARRY, T1._replace(curved=True)], [mapped]) == []
    assert nuisance.products([CARRY, T1], []) == []


def test_the_star_of_nodes_follows_products_as_the_tensor_grid_does():
    chain = (CARRY, Axis("first_mz", 0.4, 1.0, n_nodes=3, times="t1_s"))
    tissue = (B1, T1._replace(curved=True))

    def signal(carry, mz, b1, t1):
        return (1 + carry + 2 * mz) * (np.log(t1) + 0.7) + b1

    star = predictive.star(chain, tissue)
    chain_at, tissue_at = star.place
    on_star = signal(*star.chain[chain_at].T, *star.tissue[tissue_at].T)
    on_grid = signal(*nuisance.tensor_nodes((*chain, *tissue)).T)
    np.testing.assert_allclose(predictive.columns(star, {}) @ on_star, nuisance.columns((*chain, *tissue), {}) @ on_grid, atol=1e-9)
    known = {"t1_s": Measured(1.4, 0.1)}
    assert len(predictive.columns(star, known)[0]) == len(nuisance.columns((*chain, *tissue), known)[0])


def test_what_is_measured_or_bends_too_much_tells_nothing_of_its_range():
    axes = [B1, Axis("b0_ppm", -0.1, 0.1, curved=True), T1._replace(curved=True), CARRY]
    names = [*nuisance.coefficients(axes, ["b1_relative"]), "offset"]
    values = {name: float(number) for number, name in enumerate(names)}
    assert nuisance.told(axes, ["b1_relative"], values) == {name: values[name] for name in ("b0_ppm", "carry_over", "offset")}
