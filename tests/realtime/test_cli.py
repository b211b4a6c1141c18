"""The command line: every mistake gets one sentence and its exit code, never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import h5py
import ismrmrd
import nibabel
import numpy as np
import pytest

from scansteer.protocols.larg_phantom import PUBLISHED
from scansteer.protocols.scan import Auxiliary, Range, Scan, Stop, to_yaml
from scansteer.realtime import cli
from scansteer.realtime.config import ServeConfig
from scansteer.realtime.connection import ServiceSilentError
from scansteer.realtime.images import Geometry
from scansteer.realtime.outputs import write_maps
from scansteer.realtime.server import Server
from scansteer.realtime.session import Session
from scansteer.realtime.sessions import StoredSession
from scansteer.simulators.phantom import Magnet, three_vials

N = 4


@pytest.fixture(scope="module")
def scan() -> Scan:
    return PUBLISHED.model_copy(
        update={
            "name": "small",
            "matrix": (24, 20, 1),
            "schedule": tuple(PUBLISHED.schedule[i] for i in (17, 0, 2, 10)),
            "auxiliaries": {name: Auxiliary(lower=value, upper=value) for name, value in (("t1_s", 2.8), ("t2_s", 0.9))},
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, scan) -> Path:
    """A scan file and its description; spoilt variants are made from it."""
    path = tmp_path_factory.mktemp("cli")
    (path / "small.yaml").write_text(to_yaml(scan))
    phantom = three_vials(scan)
    magnet = Magnet(phantom, scan, seed=1)
    write_mrd(path / "good.h5", [magnet.play(block) for block in scan.schedule])
    return path


def write_mrd(path: Path, images: list[np.ndarray], field_t: float = 9.4) -> None:
    with ismrmrd.Dataset(str(path), "dataset") as data:
        header = ismrmrd.xsd.ismrmrdHeader(
            experimentalConditions=ismrmrd.xsd.experimentalConditionsType(H1resonanceFrequency_Hz=int(field_t * 42.5764e6)),
            acquisitionSystemInformation=ismrmrd.xsd.acquisitionSystemInformationType(systemFieldStrength_T=field_t),
        )
        data.write_xml_header(header.toXML())
        for repetition, pixels in enumerate(images):
            image = ismrmrd.Image.from_array(pixels.astype(np.float32), transpose=False)
            image.setHead(image.getHead())
            image.repetition = repetition
            data.append_image("image_0", image)


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["scansteer", *map(str, arguments)])
    try:
        cli.main()
        code = 0
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def images_of(folder: Path) -> list[np.ndarray]:
    with h5py.File(folder / "good.h5") as file:
        return list(np.array(file["dataset/image_0/data"])[:, 0])


def test_replay_leaves_decisions_maps_summary_and_report(monkeypatch, capsys, folder, tmp_path):
    (tmp_path / "decisions.jsonl").write_text("of an earlier replay")
    write_maps(tmp_path / "maps_003", {"fs_map": np.ones((1, 24, 20))}, Geometry((20, 24, 1)), {}, 3)
    (tmp_path / "maps_003" / "t1_map.nii.gz").write_bytes(b"the user's own")
    ours = nibabel.load(tmp_path / "maps_003" / "fs_map.nii.gz")
    nibabel.save(nibabel.Nifti1Image(2 * ours.get_fdata(dtype=np.float32), ours.affine, ours.header), tmp_path / "maps_003" / "fs_map_twice.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.ones((2, 2, 2), np.float32), np.eye(4)), tmp_path / "maps_003" / "b1_map.nii.gz")
    code, _, _ = run(monkeypatch, capsys, "replay", folder / "good.h5", "--scan", folder / "small.yaml", "--out", tmp_path, "--maps-at", "2")
    assert code == 0
    decisions = [json.loads(line) for line in (tmp_path / "decisions.jsonl").read_text().splitlines()]
    assert [decision["n_images"] for decision in decisions] == [1, 2, 3, 4]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {"scan", "n_images", "would_stop_at", "nrmse_median", "latency_ms", "ready_s", "versions"} <= set(summary)
    said = {warning for decision in decisions for warning in decision["warnings"]}
    assert any("direction cosines" in warning for warning in said)
    assert said <= set(summary["warnings"])
    assert {file.name for file in (tmp_path / "maps_003").iterdir()} == {"t1_map.nii.gz", "b1_map.nii.gz", "fs_map_twice.nii.gz"}
    for place in ("maps", "maps_002"):
        image = nibabel.load(tmp_path / place / "fs_map.nii.gz")
        assert image.shape[:2] == (24, 20)
    assert "<html" in (tmp_path / "report.html").read_text()


def test_a_replay_that_is_refused_leaves_the_earlier_one_alone(monkeypatch, capsys, folder, tmp_path):
    (tmp_path / "decisions.jsonl").write_text("of an earlier replay")
    asked = "replay", folder / "good.h5", "--scan", folder / "small.yaml", "--out", tmp_path
    for wrong in (("--maps-at", "9"), ("--encoder", folder / "good.h5"), ("--connect", "tcp://127.0.0.1:9")):
        code, _, _ = run(monkeypatch, capsys, *asked, *wrong)
        assert code in (1, 2)
        assert (tmp_path / "decisions.jsonl").read_text() == "of an earlier replay"


def test_first_images_of_a_replay_are_those_of_the_whole(monkeypatch, capsys, folder, tmp_path):
    for out, more in (("all", ()), ("two", ("--images", "2"))):
        assert run(monkeypatch, capsys, "replay", folder / "good.h5", "--scan", folder / "small.yaml", "--out", tmp_path / out, *more)[0] == 0
    whole, part = ([json.loads(line) for line in (tmp_path / out / "decisions.jsonl").read_text().splitlines()] for out in ("all", "two"))
    for decision in whole + part:
        for key in ("session_id", "latency_ms", "margin_ms"):
            decision.pop(key)
    assert part == whole[:2]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("replay", "good.h5", "--scan", "nowhere", "--out", "out"), "Unknown scan 'nowhere'"),
        (("replay", "none.h5", "--scan", "small.yaml", "--out", "out"), "none.h5"),
        (("replay", "small.yaml", "--scan", "small.yaml", "--out", "out"), "not an MRD file"),
        (("replay", "good.h5", "--scan", "mt-mouse-7T-30", "--out", "out"), "7 T"),
        (("replay", "good.h5", "--scan", "small.yaml", "--out", "out", "--maps-at", "x"), "--maps-at"),
        (("replay", "good.h5", "--scan", "small.yaml", "--out", "out", "--maps-at", "2,9"), "after 9 images; 4 are replayed"),
        (("replay", "good.h5", "--scan", "small.yaml", "--out", "out", "--map", "t9=a.nii.gz"), "t9"),
        (("replay", "good.h5", "--scan", "small.yaml", "--out", "out", "--map", "t1"), "NAME=VALUE"),
        (("replay", "good.h5", "--scan", "small.yaml", "--out", "out", "--roi", "none.nii.gz"), "none.nii.gz"),
        (("replay", "good.h5", "--scan", "wrong.yaml", "--out", "out"), "unknown field 'flip'"),
        (("replay", "good.h5", "--scan", "small.yaml"), "out"),
        (("evaluate", "--scan", "small.yaml", "--out", "out", "--roi", "none.nii.gz"), "belong to a measured scan"),
        (("scans", "show", "nothing"), "nothing"),
        (("scans", "show"), "--schema"),
        (("simulate", "--scan", "small.yaml", "--seq", "x.seq"), "either"),
        (("serve", "--config", "none.yaml"), "none.yaml"),
        (("frobnicate",), "frobnicate"),
    ],
)
def test_wrong_use_ends_with_one_sentence_and_exit_code_2(monkeypatch, capsys, folder, arguments, sentence):
    monkeypatch.chdir(folder)
    (folder / "wrong.yaml").write_text((folder / "small.yaml").read_text() + "flip: 60\n")
    code, _, err = run(monkeypatch, capsys, *arguments)
    last = err.strip().splitlines()[-1]
    assert code == 2
    assert sentence in last
    assert "Traceback" not in err


def test_a_scan_of_another_length_is_refused(monkeypatch, capsys, folder, tmp_path):
    write_mrd(tmp_path / "short.h5", images_of(folder)[:3])
    code, _, err = run(monkeypatch, capsys, "replay", tmp_path / "short.h5", "--scan", folder / "small.yaml", "--out", tmp_path / "out")
    assert code == 2
    assert "3" in err
    assert "4" in err


@pytest.mark.parametrize("value", [np.nan, 0.0])
def test_an_unusable_image_costs_only_itself(monkeypatch, capsys, folder, tmp_path, value):
    images = images_of(folder)
    images[2] = np.full_like(images[2], value)
    write_mrd(tmp_path / "spoilt.h5", images)
    code, _, err = run(monkeypatch, capsys, "replay", tmp_path / "spoilt.h5", "--scan", folder / "small.yaml", "--out", tmp_path / "out")
    assert code == 1
    assert "repetition 2" in err.strip().splitlines()[-1]
    decisions = [json.loads(line) for line in (tmp_path / "out" / "decisions.jsonl").read_text().splitlines()]
    assert [decision["repetition"] for decision in decisions] == [0, 1, 3]
    assert (tmp_path / "out" / "maps" / "fs_map.nii.gz").is_file()


def test_scan_files_make_the_round_trip(monkeypatch, capsys, tmp_path):
    path = tmp_path / "mine.yaml"
    assert run(monkeypatch, capsys, "scans", "export", "mt-mouse-7T-30", path)[0] == 0
    code, out, _ = run(monkeypatch, capsys, "scans", "check", path)
    assert code == 0
    assert "30 images" in out
    assert "Warning" not in out
    assert json.loads(run(monkeypatch, capsys, "scans", "show", "--schema")[1])["title"] == "Scan"
    assert "larg-phantom-9.4T" in run(monkeypatch, capsys, "scans", "list")[1]


def test_a_schedule_beyond_its_own_limits_is_usable_and_said(monkeypatch, capsys, scan, tmp_path):
    path, tight = tmp_path / "mine.yaml", scan.limits.model_copy(update={"offset_ppm": Range(lower=3.5, upper=5)})
    path.write_text(to_yaml(scan.model_copy(update={"limits": tight, "stop": Stop(n_min=4)})))
    code, out, error = run(monkeypatch, capsys, "scans", "check", path)
    assert (code, error) == (0, "")
    assert "4 images" in out.splitlines()[0]
    (warning,) = out.splitlines()[1:]
    place = "offset_ppm = 3 ppm, outside limits.offset_ppm = 3.5 .. 5 ppm"
    for said in ("Warning: ", "repetition 0 ", place, "4 repetitions", "change the schedule or the limit"):
        assert said in warning


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        ({"n_min": 5}, "stop.n_min = 5, while the schedule has 4 images"),
        ({"n_min": 3, "confirmations": 5}, "stop.confirmations = 5, while the schedule has 4 images"),
        ({"n_min": 4, "confirmations": 4}, None),  # images before the fourth count as confirmations
    ],
)
def test_a_stop_that_no_image_of_the_schedule_can_bring_is_said(monkeypatch, capsys, scan, tmp_path, stop, said):
    path = tmp_path / "mine.yaml"
    path.write_text(to_yaml(scan.model_copy(update={"stop": Stop(**stop)})))
    code, out, error = run(monkeypatch, capsys, "scans", "check", path)
    assert (code, error) == (0, "")
    warnings = out.splitlines()[1:]
    assert len(warnings) == (said is not None)
    assert all(line.startswith("Warning: no stop is possible: ") and said in line for line in warnings)


def test_limits_without_a_pulse_to_suggest_are_said(monkeypatch, capsys, scan, tmp_path):
    path, nothing = tmp_path / "mine.yaml", Range(lower=0, upper=0)
    limits = scan.limits.model_copy(update={"t_sat_s": nothing, "t_rec_s": nothing})
    path.write_text(to_yaml(scan.model_copy(update={"limits": limits, "stop": Stop(n_min=4)})))
    code, out, error = run(monkeypatch, capsys, "scans", "check", path)
    assert (code, error) == (0, "")
    assert out.splitlines()[-1].startswith("Warning: the limits leave no pulse at all that lasts any time: look at their t_sat_s")


def test_an_interruption_is_said_and_is_no_success(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_scan", interrupted)
    monkeypatch.setattr(sys, "argv", ["scansteer", "bench", "--scan", "mt-mouse-7T-30"])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    assert leaving.value.code == 130
    assert "Interrupted." in capsys.readouterr().err


def test_no_command_shows_the_commands_and_says_nothing_else(monkeypatch, capsys):
    code, out, error = run(monkeypatch, capsys)
    assert code == 2
    assert "replay" in out
    assert error == ""


def test_sessions_are_listed_with_their_whole_names_however_narrow_the_terminal(monkeypatch, capsys, tmp_path):
    name = "0123456789abcdef" * 2
    stored = StoredSession(name, "larg-phantom-9.4T-wide", n_images=1, n_decisions=1, n_bytes=313150, closed=True, modified=0.0, damaged=False)
    monkeypatch.setattr("scansteer.realtime.sessions.list_sessions", lambda folder: [stored])
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.chdir(tmp_path)
    out = run(monkeypatch, capsys, "sessions", "list")[1]
    assert name in out
    assert "scansteer-sessions" in out


def test_a_replay_that_the_service_fails_leaves_no_connection(monkeypatch, capsys, folder, tmp_path):
    left = []

    class Silent:
        def __init__(self, endpoint):
            self.endpoint = endpoint

        def __enter__(self):
            return self

        def __exit__(self, *_):
            left.append(self.endpoint)

        def disconnect(self):
            left.append(self.endpoint)

        def open(self, *_, **__):
            raise ServiceSilentError("There is no connection.")

    monkeypatch.setattr("scansteer.realtime.replay.Client", Silent)
    place = "tcp://127.0.0.1:1"
    options = ("replay", folder / "good.h5", "--scan", folder / "small.yaml", "--out", tmp_path, "--connect", place)
    code, _, error = run(monkeypatch, capsys, *options)
    assert (code, left) == (1, [place])
    assert "no connection" in error


def test_replay_through_a_service_gives_the_same_answers(monkeypatch, capsys, folder, tmp_path):
    config = ServeConfig(endpoint="tcp://127.0.0.1:*", publish_endpoint="tcp://127.0.0.1:*", data_dir=tmp_path / "sessions")
    server = Server(config, Session)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        common = ("replay", folder / "good.h5", "--scan", folder / "small.yaml", "--out")
        assert run(monkeypatch, capsys, *common, tmp_path / "remote", "--connect", server.endpoint)[0] == 0
    finally:
        server.stop()
        thread.join(30)
        server.close()
    assert run(monkeypatch, capsys, *common, tmp_path / "here")[0] == 0
    remote, here = (nibabel.load(tmp_path / out / "maps" / "fs_map.nii.gz").get_fdata() for out in ("remote", "here"))
    np.testing.assert_array_equal(remote, here)


def test_the_installed_command_starts(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "scansteer.realtime.cli", "scans", "list"], capture_output=True, text=True, timeout=120, env={**os.environ}
    )
    assert done.returncode == 0
    assert "larg-phantom-9.4T" in done.stdout
