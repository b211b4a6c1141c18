"""How fine a lattice posteriors need, beside least squares with the truth known."""

import numpy as np
import pytest

from scansteer.core import lattice, resolution

N = lattice.N_NODES
EVEN = np.sqrt(lattice.node_values(0.0, 1.0))  # the nodes in the even coordinate
U, V = (each.reshape(-1) for each in np.meshgrid(EVEN, EVEN, indexing="ij"))
RATES = np.linspace(0.5, 3, 8)


def images(spread: float = 0.0) -> list[np.ndarray]:
    """Signal, and one nuisance that acts like the first parameter in every other image."""
    return [np.stack([1 - 0.4 * U * np.exp(-rate * V), spread * U * (i % 2)]) for i, rate in enumerate(RATES)]


def by_least_squares(u: float, v: float, spread: float, sd: float) -> float:
    """The same at one place, by finite differences and the inverse of the whole information matrix."""

    def signal(u: float, v: float, a: float, x: float) -> np.ndarray:
        return a * (1 - 0.4 * u * np.exp(-RATES * v) + x * spread * u * (np.arange(len(RATES)) % 2))

    at, step = np.array([u, v, 1.0, 0.0]), 1e-5
    jacobian = np.stack([(signal(*(at + step * e)) - signal(*(at - step * e))) / (2 * step) for e in np.eye(4)], axis=1) / sd
    covariance = np.linalg.inv(jacobian.T @ jacobian + np.diag([0, 0, 0, 1.0]))[:2, :2]
    return float(np.sqrt(np.linalg.eigvalsh(covariance)[0]))


@pytest.mark.parametrize("spread", [0.0, 0.05])
def test_the_narrower_standard_deviation_is_that_of_least_squares(spread: float) -> None:
    sd = 0.01
    got = resolution.narrower_sd(images(spread), sd**2)
    for node in (5 * N + 3, 10 * N + 10, 18 * N + 6):
        assert got[node] == pytest.approx(by_least_squares(U[node], V[node], spread, sd), rel=1e-4)


def test_a_nuisance_makes_posteriors_broader() -> None:
    assert np.all(resolution.narrower_sd(images(0.05), 1e-6) >= resolution.narrower_sd(images(), 1e-6) * (1 - 1e-9))


def test_where_the_model_is_not_trusted_the_lattice_is_coarse() -> None:
    precise = [1 - 0.4 * (np.stack([U + rate * V]) + 0.1 * rate**2 * U * V) for rate in RATES]
    assert resolution.n_points(precise, discrepancy=0.0) == resolution.FINE
    assert resolution.n_points(precise, discrepancy=0.1) == resolution.COARSE


def test_images_that_say_nothing_do_not_fail() -> None:
    blank = [np.ones((1, N * N))] * 3
    np.testing.assert_allclose(resolution.narrower_sd(blank, 1e-6), 1.0)
    assert resolution.n_points(blank, 0.0) == resolution.COARSE


def test_slopes_are_those_of_the_polynomial() -> None:
    np.testing.assert_allclose(lattice.slopes() @ np.sin(3 * EVEN), 3 * np.cos(3 * EVEN), atol=1e-9)
