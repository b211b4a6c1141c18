"""Propagators against SciPy, and against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from scansteer.core import bloch_mcconnell as bm
from scansteer.core import rational_exponential as rational
from scansteer.core.lineshape import lorentzian, super_lorentzian
from scansteer.core.tissue import Pool, Tissue

CELLS = 3


def make_tissue(lineshapes=("bloch",), t2=(0.04, 1e-5, 0.005)):
    pools = tuple(
        Pool(
            f=jnp.array([0.0, 3e-3, 0.2]) / (1 + number),
            k=jnp.array([0.0, 1500.0, 40.0]) / (1 + number),
            t1=jnp.full(CELLS, 1.3),
            t2=jnp.full(CELLS, t2[number]),
            offset_hz=jnp.full(CELLS, 450.0 - 300 * number),
            lineshape=lineshape,
            cutoff_hz=128.0,
        )
        for number, lineshape in enumerate(lineshapes)
    )
    return Tissue(t1=jnp.array([2.5, 1.2, 1.8]), t2=jnp.array([1.0, 0.05, 0.08]), pools=pools, b0_hz=jnp.full(CELLS, 13.0), b1=jnp.ones(CELLS))


def exact(a, b, duration, cell):
    size = b.shape[0]
    augmented = np.zeros((size + 1, size + 1))
    augmented[:size, :size], augmented[:size, size] = a[..., cell], b[..., cell]
    result = scipy.linalg.expm(augmented * duration)
    return result[:size, :size], result[:size, size]


@pytest.mark.parametrize("lineshapes", [("bloch",), ("bloch", "bloch"), ("lorentzian",), ("bloch", "super-lorentzian")], ids=str)
@pytest.mark.parametrize("duration", [1e-3, 0.1])
def test_propagate_is_the_matrix_exponential_even_for_a_semisolid_of_10_us(lineshapes, duration):
    a, b = bm.generator(make_tissue(lineshapes), jnp.full(CELLS, 800.0), 2 * np.pi * 470.0, phase=0.3)
    result = jax.jit(bm.propagate)(a, b, duration)
    for cell in range(CELLS):
        matrix, shift = exact(np.asarray(a), np.asarray(b), duration, cell)
        # 15 doublings of a rounding error of 1e-16
        np.testing.assert_allclose(result.matrix[..., cell], matrix, atol=1e-10)
        np.testing.assert_allclose(result.shift[..., cell], shift, atol=1e-10)


@pytest.mark.parametrize("lineshapes", [(), ("bloch",), ("bloch", "lorentzian"), ("bloch", "bloch", "bloch")], ids=str)
def test_free_precession_in_closed_form_is_the_exponential(lineshapes):
    tissue = make_tissue(lineshapes)
    result = bm.free(tissue, 0.05, offset=90.0)
    expected = bm.propagate(*bm.generator(tissue, 0.0, 90.0), 0.05)
    np.testing.assert_allclose(result.matrix, expected.matrix, atol=1e-10)
    np.testing.assert_allclose(result.shift, expected.shift, atol=1e-10)


def test_free_precession_of_identical_pools_is_finite():
    same = Pool(*(jnp.array([value]) for value in (1.0, 0.0, 1.0, 0.1, 0.0)))
    tissue = Tissue(t1=jnp.array([1.0]), t2=jnp.array([0.1]), pools=(same,), b0_hz=jnp.array([0.0]), b1=jnp.array([1.0]))
    expected = bm.propagate(*bm.generator(tissue, 0.0, 0.0), 0.05)
    np.testing.assert_allclose(bm.free(tissue, 0.05).matrix, expected.matrix, atol=1e-10)


def test_equilibrium_stays_without_rf():
    tissue = make_tissue(("bloch", "lorentzian"))
    mz = bm.equilibrium(tissue)
    np.testing.assert_allclose(bm.free_longitudinal(tissue, 0.7)(mz), mz, atol=1e-12)


def test_recovery_forgets_after_a_long_time():
    tissue = make_tissue()
    np.testing.assert_allclose(bm.free_longitudinal(tissue, 100.0)(jnp.zeros((2, CELLS)))[:, 1], bm.equilibrium(tissue)[:, 1], atol=1e-12)


def test_rf_of_phase_zero_turns_mz_to_y():
    tissue = Tissue(*(jnp.array([1e6]),) * 2, pools=(), b0_hz=jnp.array([0.0]), b1=jnp.array([1.0]))
    state = bm.propagate(*bm.generator(tissue, jnp.array([np.pi / 2]), 0.0), 1.0)(jnp.array([[0.0], [0.0], [1.0]]))
    np.testing.assert_allclose(state[:, 0], [0, 1, 0], atol=1e-5)  # T1 and T2 are long, not infinite


def test_power_is_repetition():
    step = bm.propagate(*bm.generator(make_tissue(), 500.0, 1000.0), 0.01)
    state = jnp.ones((6, CELLS))
    by_hand = state
    for _ in range(13):
        by_hand = step(by_hand)
    np.testing.assert_allclose(bm.power(step, 13)(state), by_hand, rtol=1e-11)


def test_a_tip_turns_water_and_spares_what_is_too_short_lived():
    tissue = make_tissue(("bloch", "bloch"))
    tipped = bm.turn(tissue, jnp.full(CELLS, 0.3))(jnp.zeros((9, CELLS)).at[6:].set(1.0))
    np.testing.assert_allclose(tipped[:, 0], [np.sin(0.3), np.sin(0.3), 0, 0, 0, 0, np.cos(0.3), np.cos(0.3), 1.0], atol=1e-15)


def test_rational_exponential_is_exp_on_the_negative_axis_and_far_left():
    x = -np.logspace(-3, 5, 200)
    assert np.abs(rational.remainder(jnp.asarray(x + 0j))).max() < 2e-13
    left = rational.SAFE_REAL_PART - 1 + 1j * np.linspace(0, 500, 200)
    assert np.abs(rational.remainder(jnp.asarray(left))).max() < 3e-10


@pytest.mark.parametrize("offset_ppm", [0.0, 0.3, -0.9, 1.5, -6.0, 20.0])
@pytest.mark.parametrize("shape", ["Lorentzian", "SuperLorentzian"])
def test_lineshapes_are_those_of_bmctool(offset_ppm, shape):
    from bmctool.parameters.MTPool import MTPool
    from bmctool.simulation.BlochMcConnellSolver import BlochMcConnellSolver

    rad_per_ppm, t2 = 267.5153 * 3, 1.2e-5
    solver = BlochMcConnellSolver.__new__(BlochMcConnellSolver)
    solver.params = type("Parameters", (), {"mt_pool": MTPool(f=0.1, t1=1.0, t2=t2, k=30, dw=0.0, lineshape=shape)})()
    expected = solver.get_mt_shape_at_offset(offset_ppm * rad_per_ppm, rad_per_ppm)
    offset = jnp.asarray(offset_ppm * rad_per_ppm)
    ours = lorentzian(offset, t2) if shape == "Lorentzian" else super_lorentzian(offset, jnp.asarray(t2), jnp.asarray(rad_per_ppm))
    np.testing.assert_allclose(ours, expected, rtol=1e-12)
