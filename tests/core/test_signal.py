"""Longitudinal maps and signals: against events played one by one, against finite differences, in every shape."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import least_squares

from scansteer.core import bloch_mcconnell as bm
from scansteer.core import events, signal, two_pool
from scansteer.core.saturation import Saturation, Train
from scansteer.core.signal import GAMMA, Readout
from scansteer.core.spread import over_cores
from scansteer.core.tissue import Pool, Tissue

SPIN_LOCK = Train(n_pulses=5, duty_cycle=0.5, spin_lock=True)
TRAIN = Train(n_pulses=3, duty_cycle=0.8)


def make_tissue(cells=(3,), lineshape="bloch", t2=0.04):
    full = lambda low, high: jnp.linspace(low, high, int(np.prod(cells, dtype=int))).reshape(cells)  # noqa: E731
    pool = Pool(f=full(0.0, 4e-3), k=full(1500.0, 30.0), t1=full(2.8, 1.5), t2=full(t2, t2), offset_hz=full(1200.0, 1200.0), lineshape=lineshape)
    return Tissue(t1=full(3.0, 1.5), t2=full(1.0, 0.1), pools=(pool,), b0_hz=full(0.0, 20.0), b1=full(1.0, 0.9))


def make_saturation(b1_ut=3.0, offset_hz=1200.0, t_sat=2.0, t_rec=1.0):
    return Saturation(*(jnp.asarray(value) for value in (b1_ut * 1e-6, offset_hz, t_sat, t_rec)))


def make_readout(flip_deg=60.0, carry_over=None, **static):
    return Readout(jnp.deg2rad(flip_deg), jnp.asarray(0.03), None if carry_over is None else jnp.asarray(carry_over), **static)


def cell_of(tissue, cell):
    return jax.tree.map(lambda leaf: leaf[cell], tissue)


def longitudinal(affine, tissue):
    n = bm.n_transverse(tissue)
    return affine.matrix[2 * n :, 2 * n :], affine.shift[2 * n :]


saturation_map = jax.jit(signal.saturation_map, static_argnames="train")


@pytest.mark.parametrize("b1_ut", [0.0, 1e-4, 0.25, 6.0])
@pytest.mark.parametrize(("t2", "t_sat"), [(0.04, 3.0), (0.04, 0.3), (0.04, 0.0), (4e-5, 3.0)])
def test_continuous_wave_is_the_exact_exponential_whether_the_closed_form_applies_or_not(b1_ut, t2, t_sat):
    tissue, block = make_tissue(t2=t2), make_saturation(b1_ut, t_sat=t_sat, t_rec=0.0)
    found = saturation_map(tissue, block, train=Train())
    exact = bm.propagate(*bm.generator(tissue, GAMMA * block.b1 * tissue.b1, 2 * np.pi * block.offset_hz), block.t_sat)
    matrix, shift = longitudinal(exact, tissue)
    np.testing.assert_allclose(found.matrix, matrix, atol=1e-9)
    np.testing.assert_allclose(found.shift, shift, atol=1e-9)


def test_the_closed_form_is_used_where_it_should_be():
    tissue = make_tissue()
    x = two_pool.scaled(tissue, 1600.0 * tissue.b1, 2 * np.pi * 1200.0, 3.0)
    assert two_pool.longitudinal(x, (3 / tissue.t1, 3 / tissue.t1))[1]
    short = two_pool.scaled(tissue, 1600.0 * tissue.b1, 2 * np.pi * 1200.0, 0.01)
    assert not two_pool.longitudinal(short, (3 / tissue.t1, 3 / tissue.t1))[1]


def test_the_closed_form_is_exact_wherever_it_says_so():
    n, rng = 3000, np.random.default_rng(0)
    between = lambda low, high: 10 ** rng.uniform(low, high, (n, 1))  # noqa: E731
    some = rng.choice([0.0, 1.0, 1.0, 1.0], (n, 1))
    pool = Pool(between(-5, -0.5), between(0, 4), between(-0.5, 0.7), between(-5.3, -0.5), rng.uniform(-3000, 3000, (n, 1)))
    tissue = Tissue(between(-0.5, 0.7), between(-2, 0.3), (pool,), some * rng.uniform(-50, 50, (n, 1)), rng.uniform(0.5, 1.3, (n, 1)))

    def compare(tissue, w1, offset, duration):
        (pool,) = tissue.pools
        found, trusted = two_pool.longitudinal(
            two_pool.scaled(tissue, w1, offset, duration), (duration / tissue.t1, duration * pool.f / pool.t1)
        )
        matrix, shift = longitudinal(bm.propagate(*bm.generator(tissue, w1, offset), duration), tissue)
        return jnp.maximum(jnp.max(jnp.abs(found.matrix - matrix)), jnp.max(jnp.abs(found.shift - shift))), trusted

    pulses = some[::-1] * between(-2, 1.3) * 267.5, 2 * np.pi * rng.uniform(-5000, 5000, (n, 1)), between(-2, 0.7)
    error, trusted = jax.jit(jax.vmap(compare))(tissue, *pulses)
    assert np.mean(trusted) > 0.6
    assert np.max(error[trusted]) < 3e-9  # 2e-9 of the closed form, 1e-10 of fifteen doublings


def play(tissue, rows):
    """Events of (duration, amplitude [Hz], frequency [Hz], phase, spoil); Mz before and after."""
    table = np.array([[*row, 0, 0] for row in rows], float).T
    table[5, -1] = 1
    state = jax.jit(events.simulate)(tissue, events.make_events(*table), events.initial_state(tissue, 0.4))[0]
    return state[2 * bm.n_transverse(tissue) :]


def test_a_pulse_train_is_its_events_one_by_one():
    tissue, block = cell_of(make_tissue(), 1), make_saturation(t_sat=0.28, t_rec=0.5)
    hz = float(GAMMA * block.b1 / 2 / np.pi)
    pulse, pause = (0.08, hz, 1200.0, 0, 0), (0.02, 0, 0, 0, 0)
    expected = play(tissue, [(0.5, 0, 0, 0, 1), pulse, pause, pulse, pause, pulse])
    found = saturation_map(tissue, block, train=TRAIN)(0.4 * signal.equilibrium(tissue))
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_a_spin_lock_train_is_its_events_one_by_one():
    tissue, block = cell_of(make_tissue(), 1), make_saturation(t_sat=0.09, t_rec=0.5)
    hz = float(GAMMA * block.b1 / 2 / np.pi)
    angle, short = np.arctan2(hz, 1200.0), 1e-9
    tip, back = ((short, angle / (2 * np.pi * short), 0, phase, 0) for phase in (-np.pi / 2, np.pi / 2))
    lock = [tip, (0.01, hz, 1200.0, 0, 0), back]
    # RF of phase -90 degrees turns z towards +x
    expected = play(tissue, [(0.5, 0, 0, 0, 1), *([*lock, (0.01, 0, 0, 0, 0)] * 4), *lock])
    found = saturation_map(tissue, block, train=SPIN_LOCK)(0.4 * signal.equilibrium(tissue))
    np.testing.assert_allclose(found, expected, atol=1e-5)  # tips of a nanosecond at 200 MHz


def test_a_gaussian_pulse_has_the_stated_power_and_saturates_less_far_off():
    near, far = (
        saturation_map(make_tissue(), make_saturation(b1_ut=1.0, offset_hz=offset, t_sat=0.1), train=Train(shape="gauss")).shift[0]
        for offset in (100.0, 3000.0)
    )
    block = saturation_map(make_tissue(), make_saturation(b1_ut=1.0, offset_hz=3000.0, t_sat=0.1), train=Train()).shift[0]
    assert np.all(near < far)
    np.testing.assert_allclose(far, block, rtol=0.02)


@pytest.mark.parametrize("cells", [(), (1,), (700,), (2, 3)])
def test_any_shape_of_cells_gives_what_single_cells_give(cells):
    tissue, block = make_tissue(cells), make_saturation()
    found = saturation_map(tissue, block, train=Train())
    assert found.matrix.shape == (2, 2, *cells)
    last = (-1,) * len(cells)
    single = saturation_map(jax.tree.map(lambda leaf: leaf[last], tissue), block, train=Train())
    np.testing.assert_allclose(found.matrix[(..., *last)], single.matrix, atol=1e-10)


def test_signals_carry_the_magnetisation_from_image_to_image():
    tissue = make_tissue()
    blocks = [make_saturation(b1) for b1 in (1.0, 4.0)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    readout, initial = make_readout(flip_deg=60.0), signal.equilibrium(tissue)
    order = np.array([1, 0, 1])
    found = jax.jit(signal.signals, static_argnames="train")(tissue, stacked, train=Train(), readout=readout, initial=initial, index=order)
    mz, expected = initial, []
    for block in (blocks[1], blocks[0], blocks[1]):
        mz = saturation_map(tissue, block, train=Train())(mz)
        expected.append(mz[0])
        mz = mz * jnp.cos(readout.flip_angle * tissue.b1)
    np.testing.assert_allclose(found, jnp.stack(expected), atol=1e-12)


def test_a_given_carry_over_may_differ_from_cell_to_cell():
    share = jnp.array([-0.5, 0.0, 0.7])
    found = signal.readout_map(make_tissue(), make_readout(carry_over=share))
    np.testing.assert_allclose(found.leave(jnp.ones((2, 3))), jnp.stack([share, share]))


def test_a_snapshot_train_turns_water_and_lets_everything_recover_in_between():
    tissue = make_tissue()
    found = signal.readout_map(tissue, make_readout(15.0, n_shots=4, encoded_shot=2))
    mz = before = 0.3 * signal.equilibrium(tissue)
    for shot in range(4):
        if shot == 2:
            encoded = mz[0]
        mz = mz.at[0].multiply(jnp.cos(jnp.deg2rad(15.0) * tissue.b1))
        mz = bm.free_longitudinal(tissue, 0.03)(mz) if shot < 3 else mz
    np.testing.assert_allclose(found.leave(before), mz, atol=1e-12)
    np.testing.assert_allclose(found.signal(before), encoded, atol=1e-12)


def test_one_compilation_serves_every_pulse():
    count = 0

    @jax.jit
    def map_of(tissue, block):
        nonlocal count
        count += 1
        return signal.saturation_map(tissue, block, Train())

    for b1 in (0.0, 2.0, 5.0):
        map_of(make_tissue(), make_saturation(b1))
    assert count == 1


@pytest.mark.parametrize("n_cores", [1, 3, 50])
def test_spreading_over_cores_changes_nothing(n_cores):
    cells = {"a": jnp.arange(14.0).reshape(2, 7), "b": jnp.arange(7.0)}
    run = jax.jit(lambda cells, factor: (cells["a"] * factor, cells["b"] + 1))
    for one, other in zip(over_cores(run, cells, 3.0, n_cores=n_cores), run(cells, 3.0), strict=True):
        np.testing.assert_array_equal(one, other)


# T1, T2; f, k, T2 and offset of the pool; B0, B1; B1, offset, t_sat and t_rec of the pulse
VALUES = np.array([1.4, 0.08, 2e-3, 120.0, 0.02, 1190.0, 15.0, 0.95, 3e-6, 1210.0, 0.5, 0.8])


def by_closed_form(tissue, block):
    """Continuous wave; the branch that it is not trusted in is that of any other train."""
    (pool,) = tissue.pools
    x = two_pool.scaled(tissue, GAMMA * block.b1 * tissue.b1, 2 * np.pi * block.offset_hz, 3 * block.t_sat)
    return two_pool.longitudinal(x, (3 * block.t_sat / tissue.t1, 3 * block.t_sat * pool.f / pool.t1))[0]


def by_spin_lock(tissue, block):
    return signal.saturation_map(tissue, block, Train(n_pulses=2, duty_cycle=0.5, spin_lock=True))


@pytest.mark.parametrize("played", [by_closed_form, by_spin_lock])
def test_derivatives_are_finite_differences(played):
    def water(values):
        t1, t2, f, k, pool_t2, pool_offset, b0, b1, *pulse = values
        tissue = Tissue(t1, t2, (Pool(f, k, t1, pool_t2, pool_offset),), b0, b1)
        return played(tissue, Saturation(*pulse))(0.5 * signal.equilibrium(tissue))[0]

    run = jax.jit(water)
    step = 1e-5 * VALUES
    slopes = jax.jit(jax.grad(water))(VALUES)
    differences = np.array([(run(VALUES + h) - run(VALUES - h)) / (2 * h.sum()) for h in np.diag(step)])
    scaled = lambda slope: np.asarray(slope) * VALUES  # noqa: E731
    # central differences: 1e-10 of truncation per unit curvature, 1e-12 / 1e-5 of rounding; frequencies bend most
    np.testing.assert_allclose(scaled(slopes), scaled(differences), rtol=2e-4, atol=2e-6)


def test_derivatives_of_the_closed_form_are_finite_on_resonance_where_nothing_is_played():
    def water(w1, f):
        tissue = make_tissue((1,))
        tissue = Tissue(tissue.t1, tissue.t2, (eqx.tree_at(lambda pool: pool.f, tissue.pools[0], f[None]),), 0.0, 1.0)
        return two_pool.longitudinal(two_pool.scaled(tissue, w1, 0.0, 3.0), (1.0, f))[0].shift[0, 0]

    slopes = jax.jit(jax.grad(water, argnums=(0, 1)))(jnp.asarray(0.0), jnp.asarray(1e-3))
    assert np.isfinite(slopes).all()


def test_z_only_semisolid_nearly_equals_its_x_y_z_twin():
    block = make_saturation(2.0, offset_hz=3000.0)
    twin, z_only = (
        saturation_map(make_tissue(lineshape=kind, t2=4e-5), block, train=Train()).shift for kind in ("bloch", "lorentzian")
    )
    np.testing.assert_allclose(twin[0], z_only[0], atol=3e-3)


def voxel(t2_water, b0_hz=0.0, second_pool=False, dephases=True):
    """Water of long T2 beside a solute; a second pool without protons keeps the closed form away."""
    one = lambda value: np.broadcast_to(np.asarray(value, float), np.shape(b0_hz))  # noqa: E731
    pools = [Pool(one(1e-3), one(400.0), one(2.8), one(0.04), one(1200.0))]
    pools += [Pool(one(0.0), one(100.0), one(2.8), one(0.04), one(-700.0))] if second_pool else []
    return Tissue(one(2.5), one(t2_water), tuple(pools), one(b0_hz), one(1.0), dephases=dephases)


@pytest.mark.parametrize("second_pool", [False, True])
@pytest.mark.parametrize(("b1_ut", "t_sat"), [(4.3, 0.5), (4.3, 1.2), (6.0, 3.0)])
def test_a_voxel_reads_the_mean_of_its_spins(second_pool, b1_ut, t_sat):
    """Spins over 6 Hz of B0 under a smooth window, beside a voxel that dephases."""
    block = make_saturation(b1_ut, t_sat=t_sat, t_rec=0.0)
    shares = np.hanning(403)[1:-1] / np.hanning(403).sum()
    spins = voxel(1.4, np.linspace(-3, 3, 401), dephases=False)
    coherent = saturation_map(spins, block, train=Train())(signal.equilibrium(spins))[0]
    voxels = voxel(1.4, np.zeros(1), second_pool)
    found = saturation_map(voxels, block, train=Train())(signal.equilibrium(voxels))[0, 0]
    assert np.ptp(coherent) > 1e-3
    np.testing.assert_allclose(found, shares @ coherent, atol=3e-5)


@pytest.mark.parametrize("t2", [0.05, 0.3, 1.4])
@pytest.mark.parametrize(
    ("b1_ut", "offset_hz", "t_sat", "error"),
    [(2.0, 0.0, 0.5, 1e-8), (4.0, 60.0, 0.5, 1e-8), (1.0, 60.0, 0.3, 4e-4), (4.0, 300.0, 0.5, 5e-5), (4.0, -1200.0, 1.2, 1e-6)],
)
def test_a_voxel_is_the_same_whether_the_closed_form_applies_or_not(t2, b1_ut, offset_hz, t_sat, error):
    """Near water it is exactly so; else two ends stand for the turn, and the worse the more the field is tilted (by 35, 30, 8 degrees)."""
    block = make_saturation(b1_ut, offset_hz=offset_hz, t_sat=t_sat, t_rec=0.0)
    read = []
    for second_pool in (False, True):
        voxels = voxel(t2, np.linspace(-1, 1, 5), second_pool)
        read.append(saturation_map(voxels, block, train=Train())(signal.equilibrium(voxels))[0])
    np.testing.assert_allclose(*read, rtol=0, atol=error)


@pytest.mark.parametrize("offset_hz", [0.0, 60.0])
def test_near_water_a_voxel_is_a_spin(offset_hz):
    """There B0 hardly changes the effective field."""
    block = make_saturation(4.0, offset_hz=offset_hz, t_sat=0.5, t_rec=0.0)
    ours, theirs = (saturation_map(voxel(0.3, np.zeros(1), dephases=each), block, train=Train()).matrix for each in (True, False))
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("second_pool", [False, True])
def test_far_from_water_a_voxel_is_smooth_in_b0(second_pool):
    block = make_saturation(2.0, offset_hz=300.0, t_sat=0.5, t_rec=0.0)
    voxels = voxel(0.3, np.linspace(-1, 1, 41), second_pool)
    read = np.asarray(saturation_map(voxels, block, train=Train())(signal.equilibrium(voxels))[0])
    assert np.std(read - np.polyval(np.polyfit(np.arange(41), read, 2), np.arange(41))) < 1e-5


def test_at_a_solutes_own_offset_a_field_that_is_off_reads_as_faster_exchange():
    """0.1 ppm at 9.4 T, over amplitudes from 0.25 to 6 uT: a quarter of f goes unnoticed below the noise of a region's mean (0.06 % of M0).

    Exchange labels with w1^2 / (w1^2 + k (k + R2) + d^2 k / (k + R2)) (Zaiss and Bachert, Phys Med Biol 58 (2013) R221): d adds to k.
    """
    b1 = jnp.array([0.25, 1.75, 2.5, 3.0, 3.5, 3.75, 4.25, 4.75, 5.25, 6.0])
    block = Saturation(b1 * 1e-6, jnp.full(10, 1200.0), jnp.full(10, 3.0), jnp.zeros(10))

    @jax.jit
    def read(amplitude, f, k, b0_hz):
        cells = lambda value: jnp.full(10, value)  # noqa: E731
        pool = Pool(f=cells(f), k=cells(k), t1=cells(2.8), t2=cells(0.04), offset_hz=cells(1200.0))
        tissue = Tissue(t1=cells(2.0), t2=cells(1.0), pools=(pool,), b0_hz=cells(b0_hz), b1=cells(1.0))
        return amplitude * signal.saturation_map(tissue, block, Train())(0.8 * signal.equilibrium(tissue))[0]

    seen = read(1.0, 1.5e-3, 250.0, 40.0)
    found = least_squares(lambda p: np.asarray(read(p[0], 1e-3 * p[1], 100 * p[2], 0.0) - seen), (1.0, 1.5, 2.5), diff_step=1e-3)
    assert np.sqrt(np.mean(found.fun**2)) < 6e-4
    assert found.x[1] / 1.5 < 0.8
    assert found.x[2] / 2.5 > 1.3
