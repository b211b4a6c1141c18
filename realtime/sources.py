"""Stored scans: MRD files, HDF5 or message stream, as image messages in the order in which they were played.

Only headers and attributes are read when a file is opened; pixels are read one image at a time. A file that was cut off gives
what came before the cut and then fails by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from scansteer.core.errors import InputError, ScansteerError
from scansteer.protocols.scan import Scan
from scansteer.realtime.images import Frame, by, decode_frame, encode_frame
from scansteer.realtime.mrd_hdf5 import SIGNATURE, index_hdf5
from scansteer.realtime.mrd_stream import index_stream, looks_like_a_stream
from scansteer.realtime.stored import Entry, Index

_FIELD_TOLERANCE = 0.05  # a "3 T" magnet has 2.89 T
_TR_TOLERANCE = 0.01
_HZ_PER_T = 42.577e6


@dataclass(frozen=True)
class HeaderFacts:
    """What the ISMRMRD header of a file says; none where it says nothing."""

    field_t: float | None = None
    flip_deg: float | None = None
    tr_ms: float | None = None
    protocol: str | None = None


@dataclass(frozen=True)
class StoredImage:
    """The body of an image message, and what it decodes to."""

    message: bytes
    frame: Frame


class Source:
    """A stored scan, open for reading; use it as a context manager.

    Attributes
    ----------
    path
        The file.
    header
        What its ISMRMRD header says.
    warnings
        What was left out or assumed, one sentence each.
    """

    def __init__(self, path: Path, index: Index, close: Callable[[], None]) -> None:
        self.path = path
        self.warnings: list[str] = [f"{path}: {what} is lost with the end of the file." for what in index.lost]
        self.header = _header_facts(index.xml, self.warnings)
        self._close = close
        self._cut = index.cut
        self._maps = [entry for entry in index.entries if entry.role not in ("image", "other")]
        lost = [entry.place for entry in self._maps if not entry.is_whole]
        self.warnings += [f"{path}: {place} is lost with the end of the file." for place in lost]
        self._series, self._n_before = self._without_dummies(sorted(self._choose_series(index.entries), key=lambda entry: entry.key))
        if not self._series:
            cut = f" (it {index.cut})" if index.cut else ""
            raise InputError(f"{path} holds no images{cut}; an MRD file with one image per repetition is needed.")

    @property
    def n_images(self) -> int:
        """Repetitions of the image series, dummies apart, that the file holds or, when it was cut off, still lists."""
        return len(self.repetitions)

    @property
    def repetitions(self) -> tuple[int, ...]:
        """Their numbers, ascending, as `images` gives them."""
        return tuple(sorted({entry.key[0] - self._n_before for entry in self._series}))

    def missing(self, n_wanted: int | None = None) -> list[int]:
        """Repetitions of which the file has no image although it has one of a later repetition; n_wanted: among its first so many images."""
        wanted = self.repetitions[:n_wanted]
        return sorted(set(range(wanted[-1])) - {*wanted})

    @property
    def is_cut(self) -> bool:
        """Whether the file ends too early."""
        return self._cut is not None

    def auxiliaries(self) -> Iterator[StoredImage]:
        """Maps and masks stored beside the series (T1, T2, B0, B1, semisolid), in the units of the file.

        A map known only by the name of its group gets its role written into its message.
        """
        for entry in self._maps:
            stored = self._read_whole(entry)
            if stored is None:
                continue
            if stored.frame.role != entry.role:
                meta = {name: value for name, value in stored.frame.meta.items() if not name.endswith("DataRole")}
                frame = replace(stored.frame, role=entry.role, meta=meta)
                stored = StoredImage(encode_frame(frame), frame)
            yield stored

    def images(self) -> Iterator[StoredImage]:
        """The image series in the order of repetitions, without dummies: the image that comes first after them is of repetition 0.

        Raises
        ------
        ScansteerError
            After the last whole image of a file that was cut off: names the file, the place and the count.
        """
        count = 0
        for entry in self._series:
            stored = self._read_whole(entry)
            if stored is not None:
                yield self._renumbered(stored)
                count += 1
        if self.is_cut:
            raise ScansteerError(f"{self.path} {self._cut}: {count} images came before, the rest is lost.")

    def first(self) -> StoredImage | None:
        """The first whole image of the series; none if the file was cut off before it."""
        return next((self._renumbered(stored) for entry in self._series if (stored := self._read_whole(entry)) is not None), None)

    def close(self) -> None:
        self._close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, entry: Entry) -> StoredImage:
        try:
            message = entry.read()
            return StoredImage(message, decode_frame(message))
        except (InputError, OSError, RuntimeError) as error:
            raise ScansteerError(f"{self.path}: {entry.place} cannot be read: {error}") from error

    def _read_whole(self, entry: Entry) -> StoredImage | None:
        """An image; none if the end of the file took it."""
        try:
            return self._read(entry) if entry.is_whole else None
        except ScansteerError:
            if self.is_cut:
                return None
            raise

    def _without_dummies(self, series: list[Entry]) -> tuple[list[Entry], int]:
        """What is no dummy, and how many repetitions of dummies come before it."""
        kept = [entry for entry in series if not entry.is_dummy]
        if len(kept) < len(series):
            self.warnings.append(f"{self.path}: {len(series) - len(kept)} images are declared dummies and left out.")
        before = {entry.key[0] for entry in series if entry.is_dummy and kept and entry.key[0] < kept[0].key[0]}
        return kept, len(before)

    def _renumbered(self, stored: StoredImage) -> StoredImage:
        if not self._n_before:
            return stored
        frame = replace(stored.frame, repetition=stored.frame.repetition - self._n_before)
        return StoredImage(encode_frame(frame), frame)

    def _choose_series(self, entries: list[Entry]) -> list[Entry]:
        """The images of the first series, and of those that continue it; one that repeats its repetitions is left out."""
        chosen: list[Entry] = []
        for name in dict.fromkeys(entry.series for entry in entries):
            mine = [entry for entry in entries if entry.series == name and entry.role == "image"]
            if any(entry.series == name and entry.role == "other" for entry in entries):
                self.warnings.append(f"{self.path}: {name!r} has pictures that are neither data nor known maps, left out.")
            if {entry.key for entry in chosen} & {entry.key for entry in mine}:
                self.warnings.append(f"{self.path}: {name!r} repeats repetitions of {chosen[0].series!r} and is left out.")
            else:
                chosen += mine
        return chosen


def open_source(path: str | Path) -> Source:
    """Open a stored scan, HDF5 or MRD message stream by its first bytes.

    Raises
    ------
    InputError
        The file is missing, is not MRD, or holds no images.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from error
    if start.startswith(SIGNATURE):
        index, close = index_hdf5(path)
    elif start.startswith(b"yardl"):
        raise InputError(f"{path} is an MRD version 2 stream; convert it to version 1 (HDF5 or stream).")
    elif looks_like_a_stream(start):
        index, close = index_stream(path)
    else:
        raise InputError(f"{path} is not an MRD file: it starts neither like HDF5 nor like an MRD message stream.")
    try:
        return Source(path, index, close)
    except BaseException:
        close()
        raise


def check_against(source: Source, scan: Scan, n_wanted: int | None = None) -> list[str]:
    """Compare a stored scan with the description it is to be read with.

    Parameters
    ----------
    n_wanted
        How many of its images are to be used; a scan that was ended early may be as short as that.

    Returns
    -------
    Warnings, one sentence each: repetitions are missing in between (their pulses are simulated), flip angle or repetition time differ
    (the description rules), or the file says nothing.

    Raises
    ------
    InputError
        Field strength (by more than 5 %), matrix or number of images differ; a file that was cut off may have fewer images.
    """
    field_t, path, named = source.header.field_t, source.path, f"scan {scan.name!r}"
    if field_t is not None and abs(field_t - scan.field_t) > _FIELD_TOLERANCE * scan.field_t:
        raise InputError(f"{path} was acquired at {field_t:g} T, but {named} is for {scan.field_t:g} T; choose another --scan.")
    first = source.first()
    if first is not None and scan.matrix is not None and first.frame.geometry.matrix != scan.matrix:
        matrix = by(first.frame.geometry.matrix)
        raise InputError(f"{path} has a matrix of {matrix}, but {named} is for {by(scan.matrix)}; choose another --scan.")
    n_planned = len(scan.schedule)
    is_enough = source.is_cut or (n_wanted is not None and n_wanted <= source.n_images)
    if source.n_images != n_planned and not (is_enough and source.n_images < n_planned):
        raise InputError(
            f"{path} has images of {source.n_images} repetitions, but the schedule of {named} has {n_planned}; {_way_out(source, n_planned)}."
        )
    missing = source.missing(n_wanted)
    said = [f"{path} has no image of {_listed(missing)}: what the schedule plays there is simulated."] if missing else []
    return said + _soft_differences(source.header, scan)


def _way_out(source: Source, n_planned: int) -> str:
    """What to do about a file with another number of images than planned."""
    n, other = source.n_images, "choose another --scan or adapt its schedule"
    if n > n_planned:
        return other
    if missing := source.missing():
        return f"it lacks {_listed(missing)} in between: --images {n} replays the images that it has and simulates the pulses of the others"
    return f"{other}; a scan that was ended early is replayed with --images {n}"


def _listed(repetitions: list[int]) -> str:
    """Ascending numbers, neighbours as one range: repetitions 2 to 4, 9."""
    runs: list[list[int]] = []
    for number in repetitions:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    named = ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"repetition{'s' if len(repetitions) > 1 else ''} {named}"


def _soft_differences(header: HeaderFacts, scan: Scan) -> list[str]:
    warnings = []
    if header.field_t is None:
        warnings.append(f"The file does not say its field strength; {scan.field_t:g} T is assumed.")
    if header.flip_deg is not None and abs(header.flip_deg - scan.readout.flip_deg) > 0.5:
        used = scan.readout.flip_deg
        warnings.append(f"The file says a flip angle of {header.flip_deg:g} degrees; the scan's {used:g} are used.")
    readout_s = scan.readout.n_shots * scan.readout.shot_spacing_s
    planned_s = sorted({block.duration_s + readout_s for block in scan.schedule})
    if header.tr_ms is not None and all(abs(header.tr_ms / 1000 - tr_s) > _TR_TOLERANCE * tr_s for tr_s in planned_s):
        listed = f"{planned_s[0]:g}" if len(planned_s) == 1 else f"{planned_s[0]:g} to {planned_s[-1]:g}"
        warnings.append(f"The file says a repetition time of {header.tr_ms / 1000:g} s; the scan's {listed} s are used.")
    return warnings


def _header_facts(xml: bytes, warnings: list[str]) -> HeaderFacts:
    """Facts of an ISMRMRD header. Scanners write invalid ones: what cannot be understood counts as not said."""
    text = xml.split(b"\0", 1)[0].decode("utf-8", errors="replace").strip()
    if not text:
        warnings.append("The file has no ISMRMRD header: field strength, flip angle and repetition time are not checked.")
        return HeaderFacts()
    try:
        if "<!doctype" in text.lower():
            raise ElementTree.ParseError("it has a document type")
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        warnings.append(f"The ISMRMRD header of the file cannot be read ({error}) and is not checked.")
        return HeaderFacts()
    resonance_hz = _positive(root, "H1resonanceFrequency_Hz")
    field_t = _positive(root, "systemFieldStrength_T") or (resonance_hz / _HZ_PER_T if resonance_hz else None)
    return HeaderFacts(field_t, _positive(root, "flipAngle_deg"), _positive(root, "TR"), root.findtext(".//{*}protocolName"))


def _positive(root: ElementTree.Element, tag: str) -> float | None:
    """The first number under a tag, none unless it is finite and positive."""
    try:
        value = float(root.findtext(f".//{{*}}{tag}", ""))
    except ValueError:
        return None
    return value if np.isfinite(value) and value > 0 else None
