"""Whole sequences against the reference arrays beside the scans (../shared/physics)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scansteer.core import bloch_mcconnell as bm
from scansteer.core import events
from scansteer.core.tissue import Pool, Tissue

WRITER_GAMMA = 42.5764  # Hz/uT, of the scripts that wrote the sequences
LARG, MOUSE = "larg_9T4", "mouse_mt_cfg7T"


def sequence_of(folder, scan):
    return np.load(folder / "events" / f"{scan}_events.npz")


def make_events(sequence, phase, spoil_after_adc=False):
    kind = sequence["kind"]
    rf = np.where(kind == 1, [sequence["amp_hz"], sequence["freq_hz"]], 0)
    spoil = (kind == 2) | ((kind == 3) & spoil_after_adc)
    # an acquisition comes before its spoiler: the spoiler is an event of its own
    if not spoil_after_adc:
        return events.make_events(sequence["dt_s"], *rf, np.where(kind == 1, phase, 0), spoil, kind == 3, np.zeros(kind.size, bool))
    rows = np.array([sequence["dt_s"], *rf, np.where(kind == 1, phase, 0), kind == 2, kind == 3, np.zeros(kind.size)], float)
    after = np.flatnonzero(kind == 3) + 1
    extra = np.zeros((7, after.size))
    extra[4] = 1
    return events.make_events(*np.insert(rows, after, extra, axis=1))


def integer_degree_phase(sequence):
    """Phase less the accumulated one, each increment cut to whole degrees: the rule of pulseq-cest."""
    accumulated, phases = 0.0, []
    for kind, duration, frequency, phase in zip(*(sequence[name] for name in ("kind", "dt_s", "freq_hz", "phase_rad")), strict=True):
        phases.append(phase - accumulated)
        if kind == 1:
            accumulated += np.deg2rad(np.fmod(int(duration * 360 * float(np.float32(frequency))), 360))  # Pulseq's own reader has floats
    return np.array(phases)


def play(arrays, sequence, lineshape=None):
    """(n, rows, images) of all parameter sets."""
    hz = float(arrays["gamma"] * arrays["b0"] / 2 / np.pi)

    def one(p):
        pools = (Pool(p["fs"], p["ksw"], p["t1s"], p["t2s"], p["dw"] * hz),) if "fs" in p else ()
        if lineshape:
            pools += (Pool(p["fm"], p["km"], p["t1m"], p["t2m"], p["dm"] * hz, lineshape=lineshape, cutoff_hz=hz),)
        tissue = Tissue(p["t1w"], p["t2w"], pools, jnp.asarray(-arrays["b0_inhom_ppm"] * hz), jnp.asarray(arrays["rel_b1"]))
        return events.simulate(tissue, sequence, events.initial_state(tissue))

    names = [name for name in arrays.files if arrays[name].ndim == 1]
    states = jax.jit(jax.vmap(one))({name: jnp.asarray(arrays[name]) for name in names})
    return np.moveaxis(np.asarray(states), 1, 2)


def water_signal(states, arrays):
    n = 1 + ("fs" in arrays.files)
    return np.hypot(states[:, 0], states[:, n])


@pytest.mark.parametrize(
    ("scan", "name"),
    [(LARG, "oracle"), (LARG, "b0inhom_p0p1_oracle"), (LARG, "relb1_0p9_oracle"), (MOUSE, "oracle")],
)
def test_unspoiled_sequences_meet_the_reference_with_all_their_magnetisation(physics_arrays, scan, name):
    arrays, sequence = np.load(physics_arrays / "mrf" / f"{scan}_{name}.npz"), sequence_of(physics_arrays, scan)
    states = play(arrays, make_events(sequence, sequence["phase_eff_rad"]))
    np.testing.assert_allclose(states, arrays["M_all_exactphase"], atol=1e-7)
    np.testing.assert_allclose(water_signal(states, arrays), arrays["signal_exactphase"], atol=1e-7)


@pytest.mark.parametrize("scan", [LARG, MOUSE])
@pytest.mark.parametrize("spoiled", [False, True])
def test_nominal_sequences_meet_the_reference_spoiled_and_not(physics_arrays, scan, spoiled):
    arrays, sequence = np.load(physics_arrays / "mrf" / f"{scan}_nominal_oracle.npz"), dict(sequence_of(physics_arrays, scan))
    nominal(sequence, arrays)
    accumulated = np.concatenate([[0], np.cumsum(2 * np.pi * sequence["freq_hz"] * sequence["dt_s"] * (sequence["kind"] == 1))[:-1]])
    states = play(arrays, make_events(sequence, sequence["phase_rad"] - accumulated, spoil_after_adc=spoiled))
    expected = arrays["signal_nominal_spoiled" if spoiled else "signal_nominal"]
    np.testing.assert_allclose(water_signal(states, arrays), expected, atol=1e-7)


def nominal(sequence, arrays):
    """Undo the rounding of the file: B1 in hundredths of a microtesla, offsets in tenths of a ppm, 60 degrees, at the writer's gamma."""
    saturates = (sequence["kind"] == 1) & (sequence["dt_s"] > 0.1)
    reads = (sequence["kind"] == 1) & ~saturates
    sequence["amp_hz"] = np.where(saturates, np.round(sequence["amp_hz"] / WRITER_GAMMA, 2) * WRITER_GAMMA, np.where(reads, 1 / 6 / 0.0021, 0))
    hz_per_ppm = WRITER_GAMMA * float(arrays["b0"])
    sequence["freq_hz"] = np.where(saturates, np.round(sequence["freq_hz"] / hz_per_ppm, 1) * hz_per_ppm, 0)


@pytest.mark.parametrize("scan", [LARG, MOUSE])
def test_integer_degree_phase_gives_what_the_peer_gives(physics_arrays, scan):
    arrays, sequence = np.load(physics_arrays / "mrf" / f"{scan}_opcm.npz"), sequence_of(physics_arrays, scan)
    states = play(arrays, make_events(sequence, integer_degree_phase(sequence)))
    np.testing.assert_allclose(water_signal(states, arrays), arrays["signal"], atol=1e-6)


@pytest.mark.parametrize("lineshape", ["Lorentzian", "SuperLorentzian"])
@pytest.mark.parametrize("amide", ["noCEST", "amide"])
def test_z_only_semisolids_give_what_the_peer_gives(physics_arrays, lineshape, amide):
    arrays, sequence = np.load(physics_arrays / "mrf" / f"{MOUSE}_zMT_{lineshape}_{amide}_opcm.npz"), sequence_of(physics_arrays, MOUSE)
    ours = {"Lorentzian": "lorentzian", "SuperLorentzian": "super-lorentzian"}[lineshape]
    states = play(arrays, make_events(sequence, integer_degree_phase(sequence)), ours)
    np.testing.assert_allclose(water_signal(states, arrays), arrays["signal"], atol=1e-6)


def test_reset_returns_to_the_first_state_and_spoiling_leaves_mz():
    scalar = jnp.asarray
    tissue = Tissue(scalar(1.0), scalar(0.1), (), scalar(0.0), scalar(1.0))
    # 90 degrees, acquire, reset, acquire; 90 degrees, spoil, acquire
    rows = [(1e-6, 2.5e5, 0, 0, 0, 1, 1), (0, 0, 0, 0, 0, 1, 0), (1e-6, 2.5e5, 0, 0, 1, 1, 0)]
    sequence = events.make_events(*np.array(rows, float).T)
    states = events.simulate(tissue, sequence, events.initial_state(tissue, 0.5))
    np.testing.assert_allclose(states, [[0, 0.5, 0], [0, 0, 0.5], [0, 0, 0]], atol=1e-5)
    assert bm.n_transverse(tissue) == 1
