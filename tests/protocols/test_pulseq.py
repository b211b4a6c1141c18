"""Reading of Pulseq files: every version, shapes packed and timed, and every way of being damaged."""

import math

import numpy as np
import pytest

from scansteer.core.errors import InputError
from scansteer.protocols import pulseq

BLOCK_1_3 = """# written by hand
[VERSION]
major 1
minor {minor}
revision 1

[DEFINITIONS]
offsets_ppm 3.5

[BLOCKS]
 1  1  0   0   0   0  0{ext}
 2  0  1   0   0   0  0{ext}
 3  0  0   0   0   1  0{ext}
 4  0  0   0   0   0  1{ext}

[RF]
1      85.1528 1 2 100 447.05 0.5

[TRAP]
 1  1.36244e+06 1000 4500 1000   0

[ADC]
1 1 1000000 0 0 0

[DELAYS]
1 3500000

[SHAPES]

shape_id 1
num_samples 2000030
1
0
0
1999997
-1
0
0
27

shape_id 2
num_samples 2000030
0
0
2000028
"""


def old(minor=3):
    return BLOCK_1_3.format(minor=minor, ext="" if minor == 2 else "  0")


@pytest.mark.parametrize("minor", [2, 3])
@pytest.mark.parametrize("end", ["\n", "", "\n\n"])
def test_a_block_pulse_of_seconds_is_one_step_with_or_without_a_final_blank_line(minor, end):
    wait, rf, spoiler, adc = pulseq.parse(old(minor).rstrip("\n") + end).blocks
    assert wait.duration_s == 3.5
    assert rf.pulse is not None
    np.testing.assert_allclose([rf.pulse.duration_s, rf.pulse.amplitude_hz], [[2.0], [85.1528]])
    assert (rf.pulse.delay_s, rf.pulse.frequency_hz, rf.pulse.phase_rad) == pytest.approx((1e-4, 447.05, 0.5))
    assert rf.duration_s == pytest.approx(2.00013)
    assert spoiler.spoils and spoiler.duration_s == pytest.approx(6.5e-3)
    assert adc.acquires


def test_offsets_are_given_only_where_there_is_one_per_acquisition():
    assert pulseq.parse(old()).offsets_ppm() == [3.5]
    assert pulseq.parse(old().replace("offsets_ppm 3.5", "offsets_ppm 3.5 4")).offsets_ppm() is None
    assert pulseq.parse(old().replace("offsets_ppm 3.5", "")).offsets_ppm() is None


def test_an_unsaturated_image_that_the_offsets_leave_out_comes_first():
    two = old().replace(" 4  0  0   0   0   0  1", " 4  0  0   0   0   0  1  0\n 5  0  0   0   0   0  1")
    assert pulseq.parse(two).offsets_ppm() is None
    assert pulseq.parse(two.replace("offsets_ppm", "run_m0_scan 1\noffsets_ppm")).offsets_ppm() == [None, 3.5]
    assert pulseq.parse(two.replace("offsets_ppm", "run_m0_scan 1\nM0_offset -300\noffsets_ppm")).offsets_ppm() == [-300, 3.5]
    assert pulseq.parse(two.replace("offsets_ppm", "run_m0_scan 0\noffsets_ppm")).offsets_ppm() is None


def test_extensions_and_signatures_are_passed_over():
    text = old() + "\n[EXTENSIONS]\n1 1 1 0\nextension LABELSET 1\n1 2 SLC\n\n[SIGNATURE]\nType md5\nHash 0\n"
    assert len(pulseq.parse(text).blocks) == 4


def timed(shapes, rf="1 100 1 2 3 100 0 0", duration=1000):
    return f"""[VERSION]
major 1
minor 4
revision 1

[DEFINITIONS]
BlockDurationRaster 1e-05
RadiofrequencyRasterTime 1e-06

[BLOCKS]
1 {duration} 1 0 0 0 0 0
2 10 0 0 0 0 1 0

[RF]
{rf}

[ADC]
1 1 1000000 0 0 0

[SHAPES]

{shapes}
"""


def shape(number, values, n_samples=None):
    return f"shape_id {number}\nnum_samples {n_samples or len(values)}\n" + "\n".join(map(str, values)) + "\n"


def read_pulse(shapes, **other):
    block = pulseq.parse(timed("\n".join(shapes), **other)).blocks[0]
    assert block.pulse is not None and block.duration_s == pytest.approx(0.01)
    return block.pulse


def test_a_block_pulse_with_a_time_shape_is_one_step():
    pulse = read_pulse([shape(1, [1, 1]), shape(2, [0, 0]), shape(3, [0, 9900])])
    np.testing.assert_allclose([pulse.duration_s, pulse.amplitude_hz], [[9.9e-3], [100.0]])
    assert pulse.delay_s == pytest.approx(1e-4)


def test_samples_at_the_centres_of_equal_intervals_are_held():
    pulse = read_pulse([shape(1, [0.25, 1, 0.5]), shape(2, [0, 0.5, 0.25]), shape(3, [50, 150, 250])])
    np.testing.assert_allclose(pulse.duration_s, [1e-4] * 3)
    np.testing.assert_allclose(pulse.amplitude_hz, [25, 100, 50])
    np.testing.assert_allclose(pulse.shape_phase_rad, [0, np.pi, np.pi / 2])


def test_samples_at_times_of_their_own_are_joined_by_straight_lines():
    pulse = read_pulse([shape(1, [0, 1, 1, 0]), shape(2, [0, 0, 0, 0]), shape(3, [0, 100, 300, 340])])
    assert pulse.duration_s.sum() == pytest.approx(3.4e-4)
    area = (pulse.duration_s * pulse.amplitude_hz).sum()
    assert area == pytest.approx(100 * (100 / 2 + 200 + 40 / 2) * 1e-6)


def test_shapes_that_would_not_gain_are_stored_unpacked_from_version_1_4_on():
    # 0.5 0.5 3 would unpack to five samples; as many numbers as samples means that they are the samples
    pulse = read_pulse([shape(1, [0.5, 0.5, 3]), shape(2, [0, 0, 0])], rf="1 100 1 2 0 100 0 0")
    np.testing.assert_allclose(pulse.amplitude_hz, [50, 300])
    np.testing.assert_allclose(pulse.duration_s, [2e-6, 1e-6])


def test_packed_ramps_are_ramps():
    pulse = read_pulse([shape(1, [0.1, 0.1, 8], 10), shape(2, [0, 0, 8], 10)], rf="1 100 1 2 0 100 0 0")
    np.testing.assert_allclose(pulse.amplitude_hz, 10 * np.arange(1, 11))


def test_silence_at_the_end_is_no_part_of_a_pulse_and_silence_before_is():
    pulse = read_pulse([shape(1, [0, 0, 0.5, 1, 0, 0, 0]), shape(2, [0] * 7)], rf="1 100 1 2 0 100 0 0")
    np.testing.assert_allclose(pulse.amplitude_hz, [0, 50, 100])
    np.testing.assert_allclose(pulse.duration_s, [2e-6, 1e-6, 1e-6])


def test_a_byte_order_mark_is_passed_over(tmp_path):
    (tmp_path / "marked.seq").write_text(old(), encoding="utf-8-sig")
    assert len(pulseq.load(tmp_path / "marked.seq").blocks) == 4


def test_a_file_beyond_all_measure_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(pulseq, "MAX_CHARACTERS", 100)
    (tmp_path / "long.seq").write_text(old())
    with pytest.raises(InputError, match="longer than the 100 characters"):
        pulseq.load(tmp_path / "long.seq")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (old().replace("minor 3", "minor 1"), r"version 1\.1"),
        (old().replace("minor 3", "minor 5"), r"version 1\.5"),
        ("hello", "not a Pulseq file"),
        ("", "not a Pulseq file"),
        (old().split("[BLOCKS]")[0], r"\[BLOCKS\] is missing"),
        (old().replace("minor 3", ""), "damaged"),
        (old().replace(" 2  0  1 ", " 2  0  7 "), "RF event 7"),
        (old().replace("num_samples 2000030\n1\n", "num_samples 2000031\n1\n"), "announces 2000031"),
        (old().rsplit("shape_id 2", 1)[0], "damaged"),
        (old().replace("1 2 100 447", "1 2 -100 447"), "delay of -100"),
        (old().replace("1 3500000", "1 -3500000"), "-3.5"),
        (old().replace("1 3500000", "1 nan"), "'nan' is not a finite number"),
        (old().replace("447.05", "inf"), "'inf' is not a finite number"),
        (old().replace("1000 4500 1000", "1000 -4500 1000"), "-4500 us is negative"),
        (old().replace(" 3  0  0 ", " 3  0  x "), "'x' is not a whole number"),
        (old().replace("1 2 100 447.05 0.5", "1 2 100"), "too few numbers"),
        (old().replace(" 3  0  0   0   0   1", " 3  0  0   0   0   6"), "number 6, which it does not hold"),
        (old().replace("1999997", "1e300"), r"unpacks to 1e\+300"),
        (old().replace("num_samples 2000030\n1\n", "num_samples 1000000000000\n1\n"), "expected 1 to"),
        (timed(shape(1, [0.1, 0.1, 5999998], 6000000) + shape(2, [0, 0, 5999998], 6000000), rf="1 9 1 2 0 0 0 0"), "6000000 different values"),
        (timed(shape(1, [0, 1, 0]) + shape(2, [0, 0, 0]) + shape(3, [0, 1e6, 1e13])), "lasts 1e\\+07 s"),
        (timed(shape(1, [1, 1]) + shape(2, [0, 0]) + shape(3, [7, 7, 4000], 4002)), "agree"),
        (old().replace("85.1528", "strong"), "damaged"),
        (timed(shape(1, [1, 1]) + shape(2, [0, 0]) + shape(3, [100, 50])), "must rise"),
        (timed(shape(1, [1, 1, 1]) + shape(2, [0, 0, 0]) + shape(3, [0, 50])), "agree"),
        (timed(shape(1, [1, 1])).replace("1e-06", "0"), "must be positive"),
    ],
)
def test_damaged_files_are_refused_in_one_sentence(text, says):
    with pytest.raises(InputError, match=says) as error:
        pulseq.parse(text, "bad.seq")
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_a_missing_file_is_named():
    with pytest.raises(InputError, match=r"nowhere\.seq"):
        pulseq.load("nowhere.seq")


def test_every_published_sequence_is_read_without_unpacking_its_blocks(physics_arrays):
    for path in (physics_arrays / "pulseq").glob("*.seq"):
        sequence = pulseq.load(path)
        assert all(block.pulse is None or block.pulse.duration_s.size == 1 for block in sequence.blocks), path.name
        assert sequence.offsets_ppm() is not None
        assert math.isclose(float(sequence.definitions["B0"]), 3.0)
