"""What the page about simulating a sequence shows, from model to scan to Pulseq file and back, works when typed in order."""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from scansteer.protocols import pulseq, pulseq_cest, scan
from scansteer.realtime import cli

TEXT = (Path(__file__).parents[2] / "docs" / "simulate-a-sequence.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_a_model_becomes_a_scan_becomes_a_sequence_that_is_simulated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model.yaml").write_text(blocks("yaml")[0])
    for code in blocks("python"):
        exec(code, {})
    mine = scan.load("my-amide-3T.yaml")
    assert [pool.name for pool in mine.pools] == ["amide", "noe", "mt"]
    assert pulseq.load("schedule.seq").n_acquired == len(mine.schedule)
    command = blocks("sh")[0].splitlines()[1].replace("FILE.seq", "pulse.seq").replace("FILE.yaml", "model.yaml")
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    cli.main()
    found = json.loads(Path("signals.json").read_text())
    assert found["offset_ppm"] == [3.5]
    assert 0 < found["mz_water"][0] < 1
    np.testing.assert_allclose(found["mxy_abs"], [0], atol=1e-12)


def test_the_model_of_the_page_states_the_defaults():
    (text,) = blocks("yaml")
    whole, least = (pulseq_cest.CestModel.model_validate(yaml.safe_load(each)) for each in (text, text.split("gamma:")[0]))
    assert least.model_copy(update={"gamma": whole.gamma}) == whole
    assert least.gamma == pytest.approx(whole.gamma)


@pytest.mark.parametrize("name", ["f", "k"])
def test_generic_names_are_those_of_the_command(name):
    assert f"{name}=" in blocks("sh")[0].splitlines()[0]
