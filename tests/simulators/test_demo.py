"""The demonstration, end to end over real sockets, on a scan that is ready quickly."""

import io
import json
from pathlib import Path

import numpy as np
from rich.console import Console

from scansteer.protocols.builtin import BUILTIN
from scansteer.protocols.scan import Scan
from scansteer.realtime.maps import read_volume
from scansteer.realtime.messages import Decision
from scansteer.simulators.demo import run_demo
from scansteer.simulators.phantom import three_vials


def small_scan() -> Scan:
    """The L-arginine scan with T1 and T2 known and few voxels."""
    described = BUILTIN["larg-phantom-9.4T"].model_dump()
    for name, value in (("t1_s", 2.9), ("t2_s", 0.9)):
        described["auxiliaries"][name] |= {"lower": value, "upper": value}
    return Scan.model_validate({**described, "name": "small", "matrix": (24, 20, 1)})


def test_the_demo_stops_early_finds_the_truth_and_says_where_the_report_is(tmp_path: Path) -> None:
    scan, said = small_scan(), io.StringIO()
    decisions = run_demo(tmp_path, Console(file=said, width=200), scan=scan, speed=1000.0)
    assert decisions[-1].action == "stop"
    assert [decision.n_images for decision in decisions] == list(range(1, len(decisions) + 1))
    lines = (tmp_path / "decisions.jsonl").read_text().splitlines()
    assert [Decision.model_validate_json(line) for line in lines] == decisions
    assert [region.name for region in decisions[-1].regions] == ["vial 1", "vial 2", "vial 3"]
    assert json.loads((tmp_path / "summary.json").read_text())["n_images"] == len(decisions)
    phantom = three_vials(scan)
    inside = phantom.labels > 0
    found = read_volume(tmp_path / "maps" / "fs_map.nii.gz", phantom.geometry)
    np.testing.assert_array_equal(np.isfinite(found), inside)
    for vial in (1, 2, 3):
        here = phantom.labels == vial
        np.testing.assert_allclose(np.median(found[here]), phantom.truth("fs")[here][0], rtol=0.1)  # half the stop's target
    text = said.getvalue()
    assert f"A stop was first called after image {len(decisions)} of 30: {30 - len(decisions)} images saved." in text
    assert str(tmp_path / "report.html") in text
    assert (tmp_path / "report.html").is_file()
