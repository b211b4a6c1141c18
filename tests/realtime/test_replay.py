"""Replays: which engine answers, and what is refused before anything is compiled."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import ismrmrd
import nibabel
import numpy as np
import pytest

from scansteer.core.errors import InputError, ScansteerError
from scansteer.protocols.builtin import BUILTIN
from scansteer.protocols.scan import Auxiliary, Range
from scansteer.realtime import encoded, encoder_file
from scansteer.realtime.client import Client
from scansteer.realtime.images import decode_frame, image_message
from scansteer.realtime.replay import Options, Remote, UnusableError, replay_file, session_maker
from scansteer.realtime.session import Session
from scansteer.realtime.sources import StoredImage
from scansteer.realtime.worker import Setup
from scansteer.simulators.phantom import Magnet, three_vials

MOUSE, PHANTOM = BUILTIN["mt-mouse-7T-30"], BUILTIN["larg-phantom-9.4T"]
SMALL = PHANTOM.model_copy(
    update={
        "name": "small",
        "matrix": (20, 20, 1),
        "schedule": tuple(PHANTOM.schedule[i] for i in (17, 0, 2, 10, 3)),
        "auxiliaries": {name: Auxiliary(lower=value, upper=value) for name, value in (("t1_s", 2.8), ("t2_s", 0.9))},
    }
)


class Made:
    """Stands in for an engine: remembers what it was made from."""

    said: str | None = None

    def __init__(self, scan, mapped, trained=None) -> None:
        self.trained = trained
        if trained is not None:
            encoder_file.check(trained, scan, tuple(mapped))


@pytest.fixture
def engines(monkeypatch):
    monkeypatch.setattr(encoded, "Encoded", Made)
    monkeypatch.setattr(encoded, "Reference", Made)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """The mouse's, as a file."""
    found = encoder_file.shipped(MOUSE)
    assert found is not None
    path = tmp_path_factory.mktemp("weights") / "mouse.encoder"
    encoder_file.save(path, found)
    return path


def test_the_shipped_encoder_answers_unless_told_otherwise(engines, weights):
    maps = ["t1_s", "t2_s"]
    assert encoded.engine_maker(None)(MOUSE, maps).trained.scan == MOUSE.name
    assert encoded.engine_maker("none")(MOUSE, maps).trained is None
    assert encoded.engine_maker(str(weights))(MOUSE, maps).trained.scan == MOUSE.name


def test_a_shipped_encoder_that_does_not_fit_leaves_the_reference_and_says_so(engines):
    made = encoded.engine_maker(None)(MOUSE, [])
    assert made.trained is None
    assert "this session has no maps" in made.said
    without = encoded.engine_maker(None)(MOUSE.model_copy(update={"name": "ours"}), [])
    assert (without.trained, without.said) == (None, None)


def test_weights_of_another_scan_are_refused_when_they_were_asked_for(engines, weights):
    with pytest.raises(InputError, match="belongs to scan 'mt-mouse-7T-30', whose field_t"):
        encoded.engine_maker(str(weights))(PHANTOM, [])


def test_a_file_that_is_no_encoder_is_refused_before_a_service_starts(tmp_path):
    (tmp_path / "text.encoder").write_text("weights")
    with pytest.raises(InputError, match=r"text\.encoder is not an encoder"):
        session_maker(encoder=str(tmp_path / "text.encoder"))


def test_an_encoder_file_is_not_for_somebody_elses_service(tmp_path):
    with pytest.raises(InputError, match="with --connect"):
        replay_file(tmp_path / "scan.h5", MOUSE, tmp_path, Options(connect="tcp://127.0.0.1:1", encoder="mine.encoder"))


def test_a_replayed_mouse_is_answered_by_its_encoder_and_audited(real_scans, tmp_path, monkeypatch, compilations):
    compiled: list[int] = []

    def absorb(self: Session, *args, absorb=Session.absorb, **kwargs):
        before = len(compilations)
        decision = absorb(self, *args, **kwargs)
        compiled.append(len(compilations) - before)
        return decision

    monkeypatch.setattr(Session, "absorb", absorb)
    replay_file(real_scans / "mouse_mt_7T.h5", MOUSE, tmp_path, Options(images=3))
    assert compiled == [0, 0, 0]
    decisions = [json.loads(line) for line in (tmp_path / "decisions.jsonl").read_text().splitlines()]
    assert [decision["posterior_source"] for decision in decisions] == ["encoder"] * 3
    for decision in decisions:
        assert decision["audit"]["n_voxels"] == encoded.N_AUDITED
        assert max(decision["audit"]["m1_median"], decision["audit"]["m2_median"]) < encoded.MEDIAN_BOUND
    lower, upper, drawn = (nibabel.load(tmp_path / "maps" / f"fss_{kind}.nii.gz").get_fdata() for kind in ("lower", "upper", "draw"))
    inside = np.isfinite(lower)
    assert np.mean((drawn[inside] >= lower[inside]) & (drawn[inside] <= upper[inside])) == pytest.approx(0.95, abs=0.03)  # 1 500 voxels


@pytest.mark.long
def test_a_replay_without_encoder_is_the_references(real_scans, tmp_path):
    replay_file(real_scans / "mouse_mt_7T.h5", MOUSE, tmp_path, Options(images=2, encoder="none"))
    decisions = [json.loads(line) for line in (tmp_path / "decisions.jsonl").read_text().splitlines()]
    assert [(decision["posterior_source"], decision["audit"]) for decision in decisions] == [("reference", None)] * 2


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    magnet = Magnet(three_vials(SMALL), SMALL, seed=1)
    return [magnet.play(block) for block in SMALL.schedule]


def write(path: Path, images: dict[int, np.ndarray]) -> Path:
    with ismrmrd.Dataset(str(path), "dataset") as data:
        for repetition, pixels in images.items():
            data.append_image("image_0", ismrmrd.Image.from_array(pixels.astype(np.float32), transpose=False, repetition=repetition))
    return path


def replayed(path: Path, out: Path, **options) -> tuple[list[dict], list[str]]:
    """Decisions without what differs from run to run, and the summary's warnings."""
    replay_file(path, SMALL, out, Options(encoder="none", **options))
    return outcome(out)


def outcome(out: Path) -> tuple[list[dict], list[str]]:
    decisions = [json.loads(line) for line in (out / "decisions.jsonl").read_text().splitlines()]
    for decision in decisions:
        for key in ("session_id", "latency_ms", "margin_ms"):
            decision.pop(key)
    return decisions, json.loads((out / "summary.json").read_text())["warnings"]


def test_images_are_counted_where_repetitions_are_missing(images, tmp_path):
    path = write(tmp_path / "gap.h5", {n: images[n] for n in (0, 2, 4)})
    with pytest.raises(InputError, match=r"it lacks repetitions 1, 3 in between: --images 3 replays .* simulates"):
        replayed(path, tmp_path / "refused")
    whole, said = replayed(path, tmp_path / "whole", images=3)
    assert [decision["repetition"] for decision in whole] == [0, 2, 4]
    assert any("no image of repetitions 1, 3: what the schedule plays there is simulated" in warning for warning in said)
    part, said = replayed(path, tmp_path / "part", images=2)
    assert part == whole[:2]
    assert any("no image of repetition 1:" in warning for warning in said)


def test_first_images_that_cannot_be_used_cost_only_themselves(images, tmp_path):
    """Not a number, and constant: the region is found in the third; they are played all the same, as if they had been lost."""
    spoilt = dict(enumerate([np.full_like(images[0], np.nan), np.full_like(images[1], 100.0), *images[2:]]))
    with pytest.raises(ScansteerError, match="repetition 0 has 400 NaN") as refused, warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        replayed(write(tmp_path / "spoilt.h5", spoilt), tmp_path / "out")
    assert not isinstance(refused.value, InputError)
    decisions, said = outcome(tmp_path / "out")
    assert any("repetition 0 has 400 NaN" in warning for warning in said)
    assert any("repetition 1 is not used: The first image has no foreground" in warning for warning in said)
    without, _ = replayed(write(tmp_path / "without.h5", {n: images[n] for n in (2, 3, 4)}), tmp_path / "lost", images=3)
    assert decisions == without
    assert [decision["repetition"] for decision in decisions] == [2, 3, 4]


def test_a_file_without_one_usable_image_is_refused_by_name(images, tmp_path):
    path = write(tmp_path / "empty.h5", {n: 0 * each for n, each in enumerate(images)})
    with pytest.raises(InputError, match=r"empty\.h5: none of 5 images can be used; the first: .*repetition 0 is zero everywhere"):
        replayed(path, tmp_path / "out")
    assert not (tmp_path / "out" / "summary.json").exists()


def test_limits_that_leave_no_pulse_leave_the_replay_without_advice(images, tmp_path, monkeypatch):
    nothing = Range(lower=0, upper=0)
    limits = SMALL.limits.model_copy(update={"t_sat_s": nothing, "t_rec_s": nothing})
    monkeypatch.setattr(f"{__name__}.SMALL", SMALL.model_copy(update={"limits": limits}))
    decisions, _ = replayed(write(tmp_path / "scan.h5", dict(enumerate(images))), tmp_path / "out")
    assert [decision["next_pulse"] for decision in decisions] == [None] * 5


def test_a_service_is_told_of_missing_repetitions_and_tells_of_unusable_images(images, service):
    """Neither is waited for: that would take a minute each."""

    def stored(repetition: int, pixels: np.ndarray) -> StoredImage:
        message = image_message(pixels.astype(np.float32), repetition=repetition)
        return StoredImage(message, decode_frame(message))

    with Client(service.endpoint) as client:
        remote = Remote(Setup("gap", SMALL), client)
        with pytest.raises(UnusableError, match="repetition 1 has pixels that are not finite"):
            remote.decide(stored(1, np.nan * images[1]))
        assert [remote.decide(stored(n, images[n])).repetition for n in (2, 4)] == [2, 4]
