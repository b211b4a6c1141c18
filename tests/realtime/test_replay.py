"""Replays: which engine answers, and what is refused before anything is compiled."""

from __future__ import annotations

import json

import nibabel
import numpy as np
import pytest

from scansteer.core.errors import InputError
from scansteer.protocols.builtin import BUILTIN
from scansteer.realtime import encoded, encoder_file
from scansteer.realtime.replay import Options, replay_file, session_maker
from scansteer.realtime.session import Session

MOUSE, PHANTOM = BUILTIN["mt-mouse-7T-30"], BUILTIN["larg-phantom-9.4T"]


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
