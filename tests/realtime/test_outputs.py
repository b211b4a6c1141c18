"""Outputs: decisions line by line, summary, maps in their folders, and a report that stands alone."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import nibabel
import numpy as np
import pytest

from scansteer.core.errors import ScansteerError
from scansteer.realtime import report
from scansteer.realtime.images import Geometry
from scansteer.realtime.messages import Decision, LackOfFit, Latency, MeanParameterReport, MeanReport, ParameterReport, RegionReport, SuggestedPulse
from scansteer.realtime.outputs import DecisionLog, write_outputs

GEOMETRY = Geometry((6, 4, 1), (60.0, 40.0, 5.0))
SUMMARY = {
    "scan": "larg <test>",
    "n_images": 3,
    "would_stop_at": 2,
    "nrmse_median": 0.015,
    "latency_ms": {"p50": 12.0, "p99": 20.0},
    "ready_s": 3.0,
    "versions": {"scansteer": "0.1.0"},
}


def decision(n: int, stop_at: int | None = 2, undefined: bool = False, warnings: tuple[str, ...] = ()) -> Decision:
    value = None if undefined else 0.0015 / n
    parameter = ParameterReport(
        median=value, ci_lower=value, ci_upper=value, ci_halfwidth_relative=value, fraction_prior_limited=0.1
    )
    of_mean = MeanParameterReport(estimate=value, ci_lower=value, ci_upper=value, ci_halfwidth_relative=value, is_prior_limited=True)
    region = RegionReport(
        name="vial & co", n_voxels=10, parameters={"fs": parameter, "ksw": parameter}, cr_area_median=value, cr_area_p90=value,
        cr_shrinkage=None, anytime_area_median=None, fraction_converged=0.5,
        mean_signal=MeanReport(n_independent=7.6, parameters={"fs": of_mean, "ksw": of_mean}, cr_area=value, nrmse=value),
    )  # fmt: skip
    called = stop_at is not None and n >= stop_at
    return Decision(
        session_id="s", sequence_number=n - 1, repetition=n - 1, n_images=n, n_planned=5, action="stop" if called else "continue",
        reason=f"because {n} < 9", would_stop_at=stop_at if called else None, regions=(region,),
        next_pulse=SuggestedPulse(b1_ut=2.0, offset_ppm=3.0, t_sat_s=1.0, t_rec_s=2.0, expected_gain=0.1) if n == 1 else None,
        lack_of_fit=LackOfFit(statistic=1.0, passed=True), posterior_source="reference", audit=None, valid_until_repetition=n,
        latency_ms=Latency(receive=1.0, update=2.0, decide=3.0, total=6.0), margin_ms=None, warnings=warnings,
    )  # fmt: skip


def maps(value: float = 1.0) -> dict[str, np.ndarray]:
    names = [f"{parameter}_{kind}" for parameter in ("fs", "ksw") for kind in ("map", "lower", "upper")]
    values = value * np.arange(24.0).reshape(1, 4, 6)
    values[0, 0, 0] = np.nan
    return dict.fromkeys([*names, "nrmse"], values)


DECISIONS = [decision(1, warnings=("T1 <odd>",)), decision(2, warnings=("T1 <odd>",)), decision(3)]


class Checker(HTMLParser):
    """Collects what a page refers to, and whether its elements are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    return checker


def test_decisions_are_in_the_file_as_soon_as_they_are_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "decisions.jsonl"
    with DecisionLog(path) as log:
        for number, one in enumerate(DECISIONS, start=1):
            log.append(one)
            assert len(path.read_text().splitlines()) == number
    assert [Decision.model_validate_json(line) for line in path.read_text().splitlines()] == DECISIONS == log.decisions


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ScansteerError, match=r"Cannot write .*decisions\.jsonl"):
        DecisionLog(tmp_path / "file" / "decisions.jsonl")
    with pytest.raises(ScansteerError, match=r"Cannot write .*file"):
        write_outputs(tmp_path / "file", DECISIONS, GEOMETRY, maps(), SUMMARY)


def test_all_files_are_written_and_say_where_they_come_from(tmp_path: Path) -> None:
    write_outputs(tmp_path, DECISIONS, GEOMETRY, maps(), SUMMARY, {2: maps(0.5)})
    assert json.loads((tmp_path / "summary.json").read_text()) == SUMMARY
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == sorted(f"{name}.nii.gz" for name in maps())
    final, early = nibabel.load(tmp_path / "maps" / "fs_map.nii.gz"), nibabel.load(tmp_path / "maps_002" / "fs_map.nii.gz")
    np.testing.assert_array_equal(final.get_fdata()[:, :, 0], maps()["fs_map"][0].T)
    np.testing.assert_array_equal(early.get_fdata(), 0.5 * final.get_fdata())
    told = [json.loads(image.header.extensions[0].get_content().rstrip(b"\0")) for image in (final, early)]
    assert [one["n_images"] for one in told] == [3, 2]
    assert told[0]["scan"] == "larg <test>"
    assert told[0]["versions"] == {"scansteer": "0.1.0"}


def test_a_scan_without_images_leaves_a_report_too(tmp_path: Path) -> None:
    write_outputs(tmp_path, [], None, {}, {**SUMMARY, "latency_ms": None, "nrmse_median": None, "n_images": 0})
    assert "No image led to a decision" in checked((tmp_path / "report.html").read_text()).text
    assert not (tmp_path / "maps").exists()


@pytest.fixture(scope="module")
def page() -> str:
    return report.render(DECISIONS, maps(), SUMMARY)


def test_the_report_stands_alone_and_describes_its_pictures(page: str) -> None:
    found = checked(page)
    assert len(found.images) == 6
    assert all(image["src"].startswith("data:image/") and image["alt"] for image in found.images)
    assert not re.search(r"(src|href)=(?!\"data:)", page)


def test_the_report_says_what_matters_and_escapes_it(page: str) -> None:
    text = checked(page).text
    assert "A stop was first called after image 2 of 5: 3 images saved." in text
    assert "T1 <odd> (image 1)" in text
    assert text.count("T1 <odd>") == 1  # each warning once
    for expected in ("scansteer: larg <test>", "vial & co", "because 3 < 9", "2 uT, 3 ppm, 1 s after 2 s", "fs [%]", "1.50 %"):
        assert expected in text
    assert page.count("<tr class=stop>") == 2


def test_the_report_bears_undefined_values_and_missing_maps() -> None:
    text = checked(report.render([decision(1, stop_at=None, undefined=True)], {}, SUMMARY)).text
    assert "No stop was called in 1 of 5 images." in text
    assert "nan" not in text.lower()


def test_the_report_of_a_region_without_any_value_is_drawn() -> None:
    empty = {name: np.full((1, 4, 6), np.nan) for name in maps()}
    assert len(checked(report.render(DECISIONS, empty, SUMMARY)).images) == 6


def test_the_report_is_the_same_every_time(page: str) -> None:
    assert report.render(DECISIONS, maps(), SUMMARY) == page
