"""pulseq-cest models and sequences: the published results, BMCTool as an independent simulator, and bad input."""

import json
import warnings

import numpy as np
import pytest
import yaml

from scansteer.core.errors import InputError
from scansteer.protocols import pulseq, pulseq_cest
from scansteer.protocols.pulseq_cest import CestModel, load_model, simulate

TWO_POOLS = {
    "water_pool": {"f": 1.0, "t1": 1.5, "t2": 0.08},
    "cest_pool": {"amide": {"f": 1e-3, "t1": 1.2, "t2": 0.05, "k": 120.0, "dw": 3.5}},
    "b0": 3.0,
    "gamma": 267.5153,
    "b0_inhom": 0.0,
    "rel_b1": 0.9,
    "reset_init_mag": True,
    "scale": 0.8,
    "max_pulse_samples": 100,
}
SEVEN_POOLS = TWO_POOLS | {
    "mt_pool": {"f": 0.13, "t1": 1.0, "t2": 1e-5, "k": 30, "dw": -2.5, "lineshape": "SuperLorentzian"},
    "cest_pool": {
        name: {"f": f, "t1": 1.0, "t2": t2, "k": k, "dw": dw}
        for name, f, t2, k, dw in (
            ("amide", 9e-4, 0.1, 50, 3.5), ("guanidine", 9e-4, 0.1, 1000, 2.0), ("amine", 9e-4, 0.1, 5000, 3.0),
            ("hydroxyl", 9e-4, 0.1, 3500, 1.0), ("noe", 4.5e-3, 0.005, 20, -3.0),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("APTw_3T_000_2uT_1block_2s_braintumor", 1e-7),
        ("APTw_3T_003_2uT_8block_DC95_834ms_braintumor", 1e-7),
        ("MRF_CEST_3T_001_block_brain", 1e-7),
        ("MRF_CEST_3T_002_13SL_DC50_2500ms_LArginine", 1e-6),
        ("MRF_CEST_3T_003_13SL_DC50_2500ms_MT", 1e-6),
        ("WASABI_3T_001_3p7uT_1block_5ms", 1e-7),
    ],
)
def test_published_sequences_give_the_published_spectra(physics_arrays, name, tolerance):
    folder = physics_arrays / "pulseq"
    model, arrays = load_model(folder / "WM_3T_default_7pool_bmsim.yaml"), np.load(folder / f"{name}.npz")
    found = simulate(pulseq.load(folder / f"{name}.seq"), model)
    np.testing.assert_allclose(found["mz_water"], arrays["Mz_water"], atol=tolerance)
    np.testing.assert_allclose(found["mz_water"], arrays["Mz_ref_published"], atol=5e-5)
    np.testing.assert_allclose(found["offset_ppm"], arrays["offsets_ppm"])


@pytest.mark.parametrize("case", [1, 3, 4])
def test_the_simulation_challenge_is_met(physics_arrays, case):
    folder = physics_arrays / "pulseq"
    reference = json.loads((folder / "bmsim_reference.json").read_text())[f"case_{case}"]
    found = simulate(pulseq.load(folder / f"bmsim_case_{case}.seq"), load_model(folder / f"bmsim_case_{case}.yaml"))
    np.testing.assert_allclose(found["mz_water"][1:], reference["Mz"], atol=1e-7)


def write_sequence(path, make_pulse, offsets_ppm=(-300.0, 3.5, -3.5), n_pulses=3):
    """A train of coherent pulses for each offset, by pypulseq."""
    import pypulseq as pp

    system = pp.Opts(max_grad=40, grad_unit="mT/m", max_slew=130, slew_unit="T/m/s", rf_dead_time=0, rf_ringdown_time=0)
    sequence = pp.Sequence(system=system)
    sequence.set_definition("offsets_ppm", list(offsets_ppm))
    for offset in offsets_ppm:
        phase = 0.0
        for _ in range(n_pulses):
            pulse = make_pulse(pp, system, offset * 127.729)
            pulse.phase_offset = phase % (2 * np.pi)
            sequence.add_block(pulse)
            sequence.add_block(pp.make_delay(0.005))
            phase += 2 * np.pi * pulse.freq_offset * pulse.shape_dur
        sequence.add_block(pp.make_trapezoid(channel="z", system=system, amplitude=1e6, duration=6e-3))
        sequence.add_block(pp.make_adc(num_samples=1, duration=1e-3, system=system))
    sequence.write(str(path), v141_compat=True)
    return path


def block(pp, system, offset):
    return pp.make_block_pulse(flip_angle=2 * np.pi * 85 * 0.1, duration=0.1, freq_offset=offset, system=system, use="saturation")


def coarse_sinc(pp, system, offset):
    return pp.make_sinc_pulse(
        flip_angle=12.0, duration=0.02, freq_offset=offset, dwell=2e-4, time_bw_product=4, system=system, use="saturation", return_gz=False
    )


def fine_gauss(pp, system, offset):
    return pp.make_gauss_pulse(flip_angle=19.0, duration=0.02, freq_offset=offset, system=system, use="saturation", return_gz=False)


def adiabatic(pp, system, offset):
    pulse = pp.make_adiabatic_pulse("hypsec", duration=0.01, dwell=1e-4, system=system, use="inversion")
    pulse.freq_offset = offset
    return pulse


def by_bmctool(path, model, tmp_path):
    from bmctool.parameters import Parameters
    from bmctool.simulation.BMCSim import BMCSim

    (tmp_path / "model.yaml").write_text(yaml.safe_dump(model))
    parameters = Parameters.from_yaml(tmp_path / "model.yaml")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        simulation = BMCSim(parameters, str(path), verbose=False)
        simulation.run()
    return simulation.m_out[parameters.mz_loc]


@pytest.mark.parametrize(
    ("make_pulse", "n_pulses", "model", "tolerance"),
    [
        (block, 1, TWO_POOLS, 1e-9),
        (block, 3, TWO_POOLS, 1e-9),
        (coarse_sinc, 3, SEVEN_POOLS, 1e-8),
        (adiabatic, 1, TWO_POOLS, 1e-8),
        (fine_gauss, 1, TWO_POOLS, 1e-4),  # BMCTool lets the last of the held samples run over the end of the pulse
    ],
    ids=["cw", "train", "seven-pool shaped train", "adiabatic", "thinned"],
)
def test_bmctool_agrees(make_pulse, n_pulses, model, tolerance, tmp_path):
    path = write_sequence(tmp_path / "train.seq", make_pulse, n_pulses=n_pulses)
    found = simulate(pulseq.load(path), CestModel.model_validate(model))
    np.testing.assert_allclose(found["mz_water"], by_bmctool(path, model, tmp_path), atol=tolerance)


def test_thinning_keeps_the_length_and_every_nth_sample():
    values = np.linspace(0.1, 1.0, 1003)
    pulse = pulseq.Pulse(0.0, np.full(1003, 1e-6), values, values, 0.0, 0.0, 1e-6, ())
    duration, amplitude, _ = pulseq_cest.decimate(pulse, 100)
    assert duration.sum() == pytest.approx(1003e-6)
    np.testing.assert_allclose(amplitude, values[::11])
    assert pulseq_cest.decimate(pulse, 1003)[1].size == 1003


def test_thinning_starts_after_silence_and_counts_samples_not_steps():
    # 3 silent samples, then 40 alike and 40 alike: two steps of sound, 80 samples
    duration, amplitude = np.array([3e-6, 4e-5, 4e-5]), np.array([0.0, 1.0, 2.0])
    pulse = pulseq.Pulse(0.0, duration, amplitude, amplitude, 0.0, 0.0, 1e-6, ())
    np.testing.assert_allclose(pulseq_cest.decimate(pulse, 3), [[3e-6, 2.7e-5, 2.7e-5, 2.6e-5], [0, 1, 1, 2], [0, 1, 1, 2]])
    assert pulseq_cest.decimate(pulse, 80)[0] is duration


def test_a_block_pulse_after_silence_is_never_thinned():
    duration, amplitude = np.array([1.0, 2.0]), np.array([0.0, 100.0])
    pulse = pulseq.Pulse(0.0, duration, amplitude, amplitude, 0.0, 0.0, 1e-6, ())
    assert pulseq_cest.decimate(pulse, 100)[0] is duration


HARD = """[VERSION]
major 1
minor 4
revision 0
[DEFINITIONS]
[BLOCKS]
1 10 1 0 0 0 0 0
2 0 0 0 0 0 1 0
3 0 0 0 0 0 1 0
[RF]
1 2500 1 2 3 0 0 0
[ADC]
1 1 1000000 0 0 0
[SHAPES]
shape_id 1
num_samples 2
1
1
shape_id 2
num_samples 2
0
0
shape_id 3
num_samples 2
0
100
"""


def test_reset_and_scale_are_honoured_and_mxy_is_reported():
    model = CestModel.model_validate(TWO_POOLS | {"rel_b1": 1.0})
    found = simulate(pulseq.parse(HARD), model)
    assert found["offset_ppm"] is None
    np.testing.assert_allclose(found["mxy_abs"], [0.8, 0], atol=2e-3)
    np.testing.assert_allclose(found["mz_water"], [0, 0.8], atol=2e-3)
    carried = simulate(pulseq.parse(HARD), model.model_copy(update={"reset_init_mag": False}))
    np.testing.assert_allclose(carried["mz_water"], [0, 0], atol=2e-3)


def test_shapes_with_times_of_their_own_turn_by_the_area_under_straight_lines():
    trapezoid = HARD.replace("num_samples 2\n1\n1", "num_samples 4\n0\n1\n1\n0").replace("num_samples 2\n0\n0", "num_samples 4\n0\n0\n0\n0")
    trapezoid = trapezoid.replace("num_samples 2\n0\n100", "num_samples 4\n10\n30\n70\n100")
    lasting = {"water_pool": {"f": 1.0, "t1": 1e3, "t2": 1e3}, "b0": 3.0}
    found = simulate(pulseq.parse(trapezoid), CestModel.model_validate(lasting))
    angle = 2 * np.pi * 2500 * (20 / 2 + 40 + 30 / 2) * 1e-6
    np.testing.assert_allclose([found["mz_water"][0], found["mxy_abs"][0]], [np.cos(angle), np.sin(angle)], atol=1e-6)


def test_dead_time_and_ring_down_are_lived_through():
    # 100 us of RF in a block of 50 ms, 20 ms after its start
    model = CestModel.model_validate(TWO_POOLS | {"cest_pool": {}, "rel_b1": 1.0, "scale": 1.0})
    played = simulate(pulseq.parse(HARD.replace("1 10 1 0", "1 5000 1 0").replace("1 2 3 0 0 0", "1 2 3 20000 0 0")), model)
    t1, t2 = TWO_POOLS["water_pool"]["t1"], TWO_POOLS["water_pool"]["t2"]
    # relaxation during the pulse itself: 1e-3
    np.testing.assert_allclose(played["mz_water"][0], 1 - np.exp(-0.0299 / t1), atol=1e-3)
    np.testing.assert_allclose(played["mxy_abs"][0], np.exp(-0.0299 / t2), atol=1e-3)


def test_field_shift_moves_all_resonances_together():
    tissue = pulseq_cest.tissue(CestModel.model_validate(TWO_POOLS | {"b0_inhom": 0.1}))
    assert float(tissue.b0_hz) == pytest.approx(-0.1 * 3 * 267.5153 / 2 / np.pi)


def test_models_convert_to_the_pools_of_a_scan():
    pools = pulseq_cest.scan_pools(CestModel.model_validate(SEVEN_POOLS), ("fs", "ksw"), "amide")
    assert [pool.name for pool in pools] == ["amide", "guanidine", "amine", "hydroxyl", "noe", "mt"]
    assert (pools[0].f, pools[0].k_per_s, pools[0].offset_ppm) == ("fs", "ksw", 3.5)
    assert (pools[-1].kind, pools[-1].lineshape, pools[-1].f) == ("semisolid", "super-lorentzian", 0.13)
    with pytest.raises(InputError, match="no pool 'creatine'"):
        pulseq_cest.scan_pools(CestModel.model_validate(TWO_POOLS), ("fs", "ksw"), "creatine")


def without(*names):
    return {key: value for key, value in TWO_POOLS.items() if key not in names}


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (without("water_pool"), "water_pool"),
        (without("b0"), "b0"),
        (TWO_POOLS | {"b0": 0}, "b0"),
        (TWO_POOLS | {"water_pool": {"f": 1.0, "t1": 0, "t2": 0.1}}, "t1"),
        (TWO_POOLS | {"water_pool": {"f": 1.0, "t1": -1.0, "t2": 0.1}}, "t1"),
        (TWO_POOLS | {"water_pool": {"f": 0.5, "t1": 1.0, "t2": 0.1}}, "must be 1"),
        (TWO_POOLS | {"cest_pool": {"amide": {"f": 1e-3, "t1": 1, "t2": 1, "dw": 3}}}, r"amide\.k"),
        (TWO_POOLS | {"cest_pool": {"amide": {"f": 1e-3, "t1": 1, "t2": 1, "dw": 3, "k": 1, "kk": 2}}}, "kk"),
        (TWO_POOLS | {"mt_pool": {"f": 0.1, "t1": 1, "t2": 1e-5, "k": 30, "dw": 0, "lineshape": "Gauss"}}, "lineshape"),
        (TWO_POOLS | {"water_pool": {"f": 1.0, "r1": [1], "t2": 0.1}}, "r1 must be a positive number"),
        (TWO_POOLS | {"water_pool": {"f": 1.0, "t1": 1.0, "r2": 0}}, "r2 must be a positive number"),
        (TWO_POOLS | {"scale": 2}, "scale"),
        (TWO_POOLS | {"max_pulse_samples": 0}, "max_pulse_samples"),
        ([1, 2], "not a pulseq-cest model"),
    ],
)
def test_incomplete_models_are_refused_in_one_sentence(model, says, tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(model))
    with pytest.raises(InputError, match=says) as error:
        load_model(path)
    assert "\n" not in str(error.value)


def test_unreadable_models_are_refused_in_one_sentence(tmp_path):
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(InputError, match="not YAML"):
        load_model(tmp_path / "broken.yaml")
    with pytest.raises(InputError, match="Cannot read model"):
        load_model(tmp_path / "absent.yaml")


def test_absurd_pulses_and_silent_sequences_are_refused():
    model = CestModel.model_validate(TWO_POOLS)
    with pytest.raises(InputError, match="check the units"):
        simulate(pulseq.parse(HARD.replace("1 2500 1", "1 2500000 1")), model)
    with pytest.raises(InputError, match="no acquisition"):
        simulate(pulseq.parse(HARD.replace("0 0 0 1 0", "0 0 0 0 0")), model)


def test_what_would_not_fit_into_memory_is_refused_beforehand(monkeypatch):
    ramp = HARD.replace("num_samples 2\n1\n1", "num_samples 2\n0\n1")
    model = CestModel.model_validate(TWO_POOLS)
    monkeypatch.setattr(pulseq_cest, "MAX_MAPS_BYTES", 8 * 90 * 42)
    with pytest.raises(InputError, match="smaller max_pulse_samples"):
        simulate(pulseq.parse(ramp), model)
    monkeypatch.setattr(pulseq_cest, "MAX_EVENTS", 90)
    with pytest.raises(InputError, match="more than 90 steps"):
        simulate(pulseq.parse(ramp), model)
