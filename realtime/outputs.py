"""What a scan leaves behind: decisions.jsonl (as it goes), summary.json, maps and report.html."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from scansteer.core.errors import ScansteerError
from scansteer.realtime import report
from scansteer.realtime.images import Geometry
from scansteer.realtime.maps import is_ours, write_volume
from scansteer.realtime.messages import Decision
from scansteer.realtime.retrospective import Comparison, TooFewImages


class DecisionLog:
    """decisions.jsonl, one line per decision, each in the file as soon as it is made; use as a context manager.

    Those of an earlier replay go with the first one: a replay that is refused leaves them alone.

    Attributes
    ----------
    decisions
        What was written.
    """

    def __init__(self, path: Path) -> None:
        self.decisions: list[Decision] = []
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: TextIO = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ScansteerError(f"Cannot write {path}: {error.strerror}.") from error

    def append(self, decision: Decision) -> None:
        """
        Raises
        ------
        ScansteerError
            The file cannot be written (a full disk, say).
        """
        try:
            if not self.decisions:
                self._file.truncate(0)
            self._file.write(decision.model_dump_json() + "\n")
            self._file.flush()
        except OSError as error:
            raise ScansteerError(f"Cannot write {self._path}: {error.strerror}.") from error
        self.decisions.append(decision)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> DecisionLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_outputs(
    out: Path,
    decisions: Sequence[Decision],
    geometry: Geometry | None,
    maps: Mapping[str, np.ndarray],
    summary: Mapping[str, Any],
    maps_at: Mapping[int, Mapping[str, np.ndarray]] | None = None,
    look_back: Callable[[], Comparison | TooFewImages | None] = lambda: None,
) -> None:
    """Write everything but decisions.jsonl into a folder.

    Parameters
    ----------
    out
        The folder; made if it does not exist.
    decisions
        All of them, in order.
    geometry
        That of the images; none if no image came, and then no maps are written.
    maps
        File name without suffix (`fs_map`, `fs_lower`, .., `nrmse`) -> values, shape (z, y, x), NaN outside the region.
    summary
        What summary.json says; `scan` and `versions` go into every map as well.
    maps_at
        Maps as they stood after so many images, into maps_NNN.
    look_back
        Sees the finished scan once more, for the report; asked when all else is written.

    Raises
    ------
    ScansteerError
        A file cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        _forget_earlier(out)
        for n_images, at_that_time in (maps_at or {}).items():
            write_maps(out / f"maps_{n_images:03d}", at_that_time, geometry, summary, n_images)
        write_maps(out / "maps", maps, geometry, summary, decisions[-1].n_images if decisions else 0)
        (out / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        (out / "report.html").write_text(report.render(decisions, maps, summary, look_back()), encoding="utf-8")
    except OSError as error:
        raise ScansteerError(f"Cannot write {error.filename or out}: {error.strerror}.") from error


def _forget_earlier(out: Path) -> None:
    """Maps of an earlier replay into this folder, which the new one need not have; what others have put there stays."""
    for file in out.glob("maps*/*.nii.gz"):
        if _FOLDERS.fullmatch(file.parent.name) and is_ours(file):
            file.unlink()


_FOLDERS = re.compile(r"maps(_\d{3,})?")


def write_maps(
    folder: Path, maps: Mapping[str, np.ndarray], geometry: Geometry | None, summary: Mapping[str, Any], n_images: int
) -> None:
    """Write one NIfTI file per map, with the scan, the versions and the number of images in its header."""
    if geometry is None or not maps:
        return
    folder.mkdir(parents=True, exist_ok=True)
    provenance = {"scan": summary.get("scan"), "n_images": n_images, "versions": summary.get("versions", {})}
    for name, values in maps.items():
        write_volume(folder / f"{name}.nii.gz", values, geometry, name, provenance)
