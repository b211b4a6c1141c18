"""Schedules written as Pulseq files mean what the scan means."""

import numpy as np
import pytest

from scansteer.core.errors import InputError
from scansteer.protocols import pulseq, pulseq_write
from scansteer.protocols.builtin import BUILTIN
from scansteer.protocols.pulseq_cest import CestModel, simulate
from scansteer.protocols.scan import Readout, Scan, Train
from scansteer.realtime.simulate import simulate_scan


def shortened(name, **changes):
    scan = BUILTIN[name]
    whole = Readout(flip_deg=90.0, carry_over=1.0)
    return Scan.model_validate(scan.model_dump() | {"readout": whole, "schedule": scan.schedule[:3]} | changes)


def as_model(scan):
    """The scan's central tissue as a pulseq-cest model that carries its magnetisation on."""
    values = {name: span.centre for name, span in (*scan.parameters.items(), *scan.auxiliaries.items())}
    resolve = lambda value: values[value] if isinstance(value, str) else value  # noqa: E731
    pools = {
        pool.name: {"f": resolve(pool.f), "k": resolve(pool.k_per_s), "t1": pool.t1_s or values["t1_s"], "t2": pool.t2_s, "dw": pool.offset_ppm}
        for pool in scan.pools
    }
    semisolid = pools.pop("semisolid", None)
    model = {"water_pool": {"f": 1.0, "t1": values["t1_s"], "t2": values["t2_s"]}, "cest_pool": pools, "b0": scan.field_t}
    model |= {"mt_pool": semisolid | {"lineshape": "Lorentzian"}} if semisolid else {}
    return CestModel.model_validate(model | {"gamma": 267.5153, "reset_init_mag": False, "max_pulse_samples": 10_000})


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("larg-phantom-9.4T", {}),
        ("mt-human-3T", {}),
        ("mt-human-3T", {"train": Train(n_pulses=4, duty_cycle=0.8, shape="gauss"), "limits": BUILTIN["mt-mouse-7T"].limits}),
    ],
    ids=["cw", "spin-lock", "gauss"],
)
def test_a_written_schedule_plays_the_scan(name, changes, tmp_path):
    scan = shortened(name, **changes)
    pulseq_write.write_schedule(scan, tmp_path / "scan.seq")
    sequence = pulseq.load(tmp_path / "scan.seq")
    assert sequence.offsets_ppm() == [block.offset_ppm for block in scan.schedule]
    played = simulate(sequence, as_model(scan))["mz_water"]
    # the file's spoilers and tips take 5 ms and 26 x 1 ms that the scan does not know of
    np.testing.assert_allclose(played, simulate_scan(scan, {})["mz_water"], atol=3e-3)


def test_a_single_suggested_pulse_is_written(tmp_path):
    scan = BUILTIN["mt-mouse-7T"]
    pulseq_write.write_pulse(scan, scan.schedule[1], tmp_path / "pulse.seq")
    sequence = pulseq.load(tmp_path / "pulse.seq")
    (pulse,) = [block.pulse for block in sequence.blocks if block.pulse]
    assert pulse.length_s == pytest.approx(2.5)
    assert pulse.amplitude_hz[0] == pytest.approx(2 * 42.5764, rel=1e-4)
    assert pulse.frequency_hz == pytest.approx(8 * 298.03, rel=1e-4)


@pytest.mark.parametrize("changes", [{"b1_ut": 60.0}, {"offset_ppm": 3.5}, {"t_sat_s": 20.0}, {"t_rec_s": 0.1}])
def test_pulses_beyond_the_limits_are_not_written(changes, tmp_path):
    scan = BUILTIN["mt-mouse-7T"]
    with pytest.raises(InputError, match="outside what scan 'mt-mouse-7T' allows") as error:
        pulseq_write.write_pulse(scan, scan.schedule[1].model_copy(update=changes), tmp_path / "pulse.seq")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "pulse.seq").exists()


def test_a_folder_that_is_not_there_is_named(tmp_path):
    scan = BUILTIN["mt-mouse-7T"]
    with pytest.raises(InputError, match=r"Cannot write sequence .*nowhere"):
        pulseq_write.write_pulse(scan, scan.schedule[1], tmp_path / "nowhere" / "pulse.seq")


def test_tips_of_a_spin_lock_on_resonance_keep_to_the_amplitude_that_the_limits_allow(tmp_path):
    near = BUILTIN["amide-human-3T"]
    block = near.schedule[1].model_copy(update={"offset_ppm": 0.0})
    pulseq_write.write_pulse(near, block, tmp_path / "pulse.seq")
    pulses = [block.pulse for block in pulseq.load(tmp_path / "pulse.seq").blocks if block.pulse]
    assert len(pulses) == 3 * 13
    assert max(pulse.amplitude_hz.max() for pulse in pulses) <= near.limits.b1_max_ut * 42.5764
    # a quarter turn
    assert pulses[0].amplitude_hz[0] * pulses[0].length_s == pytest.approx(0.25, rel=1e-4)


def test_without_pypulseq_the_way_out_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "pypulseq", None)
    with pytest.raises(InputError, match=r"scansteer\[pulseq\]"):
        pulseq_write.write_schedule(BUILTIN["mt-mouse-7T"], tmp_path / "scan.seq")
