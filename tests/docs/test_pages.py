"""The pages say what the program does: commands exist, cheap ones are run, examples and tables hold."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import typer

from scansteer.protocols.candidates import what_is_lacking
from scansteer.protocols.limits import check_schedule
from scansteer.protocols.scan import Scan, from_yaml
from scansteer.realtime import cli
from scansteer.realtime.messages import Decision, RegionReport

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every scansteer command of the pages."""
    lines = [line.strip() for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]
    return sorted({line for line in lines if line.startswith("scansteer ")})


@pytest.mark.parametrize("line", commands())
def test_every_command_of_the_pages_is_understood(line: str) -> None:
    words = shlex.split(line.removesuffix("&"), comments=True)[1:]
    command, name = typer.main.get_command(cli.app), "scansteer"
    while hasattr(command, "commands"):
        name = words.pop(0)
        command = command.commands[name]  # type: ignore[attr-defined]
    command.make_context(name, words)


def test_the_commands_about_scans_run_in_the_order_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [line for line in blocks(ROOT / "docs" / "describe-your-scan.md", "sh")[0].splitlines() if line]
    assert len(lines) == 4
    for line in lines:
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        cli.main()
    said = capsys.readouterr().out
    assert "larg-phantom-9.4T" in said
    assert '"properties"' in said
    assert from_yaml((tmp_path / "my-scan.yaml").read_text()).name == "larg-phantom-9.4T"


def test_the_example_scan_is_valid_and_every_field_of_a_scan_is_told() -> None:
    page = ROOT / "docs" / "describe-your-scan.md"
    example = from_yaml(blocks(page, "yaml")[0])
    assert (len(example.schedule), example.stop.earliest) == (4, 3)
    assert not check_schedule(example)
    assert what_is_lacking(example) is None
    told = set(re.findall(r"^- \*\*(\w+)\*\*", page.read_text(), re.MULTILINE))
    assert told == set(Scan.model_fields) - {"schema_version", "name", "description", "field_t", "matrix"}


def test_every_field_of_a_decision_is_told() -> None:
    text = (ROOT / "docs" / "read-the-outputs.md").read_text()
    told = set(re.findall(r"`(\w+)`", text))
    assert {*Decision.model_fields, *RegionReport.model_fields} <= told


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readmes_first_screen_has_exactly_two_commands() -> None:
    screen = (ROOT / "README.md").read_text().split("\n## ")[0]
    shown = [line for block in re.findall(r"```sh\n(.*?)```", screen, re.DOTALL) for line in block.splitlines() if line]
    assert len(shown) == 2
    assert shown[0].endswith("scansteer demo")
    assert shown[1].endswith("pytest")


def test_constraints_name_versions_and_no_places() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9a-z.]+", line) for line in lines)


def test_summary_keys_are_told() -> None:
    text = (ROOT / "docs" / "read-the-outputs.md").read_text().split("## summary.json")[1].split("\n## ")[0]
    expected = ["scan", "n_images", "would_stop_at", "nrmse_median", "latency_ms", "ready_s", "versions"]
    assert all(f"`{key}`" in text for key in expected)
