"""What a reconstruction's messages mean: which scan its configuration chooses, and which of its images are used as what.

The rules are stated in docs/connect-gadgetron.md and docs/connect-fire-openrecon.md; each is a branch of `ImageRules.admit` or of
`choose`. Nothing here touches a socket, and every image passes through the gateway whatever is decided here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from xml.etree import ElementTree

import ismrmrd
from pydantic import ValidationError

from scansteer.core.errors import InputError
from scansteer.protocols.builtin import BUILTIN
from scansteer.protocols.scan import Scan, explain, load
from scansteer.realtime.config import GatewayConfig
from scansteer.realtime.images import HEADER_BYTES, is_dummy, parse_meta, role_of
from scansteer.realtime.messages import ImageRole

_NAMING = ("scan", "customconfig", "config", "config_file")
"""Parameters that may name the scan, the first that does so wins."""
_PEER_OPTIONS = {
    "maps_every", "send_maps", "echo", "set", "dynamic_index", "first_repetition", "n_slices", "dummies", "n_auxiliary",
}  # fmt: skip
_FIELD_TOLERANCE = 0.05  # a "3 T" magnet has 2.89 T
_MAX_MEANING_BYTES = 2**20


@dataclass
class Peer:
    """What a peer has said about itself before its images."""

    parameters: dict[str, str] = field(default_factory=dict)
    field_t: float | None = None
    n_slices: int | None = None
    header_is_readable: bool = True

    def take_config_file(self, name: str) -> None:
        self.parameters["config_file"] = name

    def take_config_text(self, text: str) -> None:
        """XML (a Gadgetron configuration subtree), JSON, or a bare name."""
        self.parameters |= _parameters(text)

    def take_text(self, text: str) -> None:
        """The JSON that FIRE and OpenRecon send after the header; its `parameters` have precedence over the configuration."""
        self.parameters |= _json_parameters(text)

    def take_header(self, text: str) -> None:
        """The ISMRMRD header: optional, sometimes invalid; what cannot be understood counts as not said."""
        root = _xml(text)
        self.header_is_readable = root is not None
        if root is None:
            return
        field_t = _number(root, ".//{*}systemFieldStrength_T")
        self.field_t = field_t if field_t is not None and field_t > 0 else None  # 0 is how a converter says that it does not know
        maximum = _number(root, ".//{*}encodingLimits/{*}slice/{*}maximum")
        if maximum is not None and 0 <= maximum < 1024:
            self.n_slices = int(maximum) + 1


class Choice(NamedTuple):
    """What a connection is going to do."""

    scan: Scan
    config: GatewayConfig
    n_slices: int
    remarks: tuple[str, ...] = ()
    """What was assumed where the peer said nothing that is understood, a sentence each."""


def choose(peer: Peer, config: GatewayConfig) -> Choice:
    """The scan and the options of a connection: what the peer names, else what the gateway was started with.

    A peer chooses among the built-in scans and the files `NAME.yaml` in `scans_dir`; it cannot name another file.

    Raises
    ------
    InputError
        No scan is named, an explicitly named one is unknown, an option has a wrong value, or the field strength is another.
    """
    options = {name: value for name, value in peer.parameters.items() if name in _PEER_OPTIONS and value.strip()}
    try:
        merged = GatewayConfig.model_validate({**config.model_dump(), **options})
    except ValidationError as error:
        raise InputError(f"The configuration sent with the images: {explain(error, 'realtime/config.py')}") from error
    scan = _choose_scan(peer.parameters, merged)
    if peer.field_t is not None and abs(peer.field_t - scan.field_t) > _FIELD_TOLERANCE * scan.field_t:
        raise InputError(
            f"The images come from {peer.field_t:g} T, but scan {scan.name!r} is for {scan.field_t:g} T; choose another."
        )
    return Choice(scan, merged, merged.n_slices or peer.n_slices or 1, _remarks(peer, merged))


class Admitted(NamedTuple):
    """An image that goes to the service; its header counters as the session wants them."""

    body: bytes
    role: ImageRole
    repetition: int
    slice: int


class PassedOnly(NamedTuple):
    """An image that is passed through and not used."""

    reason: str


class ImageRules:
    """Decides image by image. The first image used fixes series and set; counters of 16 bits are unwrapped."""

    def __init__(self, choice: Choice) -> None:
        self._config = choice.config
        self._n_slices = choice.n_slices
        self._n_planned = len(choice.scan.schedule)
        self._series: int | None = None
        self._set: int | None = choice.config.set
        self._n_arrived = 0
        self._last_counter: int | None = None

    def admit(self, body: bytes) -> Admitted | PassedOnly:
        """What becomes of an image.

        Raises
        ------
        InputError
            Its Meta cannot be read.
        """
        header = ismrmrd.ImageHeader.from_buffer_copy(body)
        n_meta = int.from_bytes(body[HEADER_BYTES : HEADER_BYTES + 8], "little")
        meta = parse_meta(body[HEADER_BYTES + 8 : HEADER_BYTES + 8 + n_meta])
        role = role_of(meta, header.image_type)
        if role == "other":
            return PassedOnly("it is neither a magnitude, real or complex image nor a known map")
        if role != "image":
            return Admitted(body, role, header.repetition, header.slice)
        if is_dummy(meta, header.flags):
            return PassedOnly("it is declared a dummy")
        verdict = self._other_dimension(header) or self._number(header, body)
        if isinstance(verdict, Admitted):
            self._series, self._set = header.image_series_index, header.set
        return verdict

    def expect_volumes(self) -> None:
        """One image per repetition from now on."""
        self._n_slices = 1

    def _other_dimension(self, header: ismrmrd.ImageHeader) -> PassedOnly | None:
        """One echo, one set, one series, one average, one cardiac phase are used: the dimension that counts repetitions apart."""
        dynamic = self._config.dynamic_index
        if dynamic != "contrast" and header.contrast != self._config.echo:
            return PassedOnly(f"it is echo {header.contrast}, and echo {self._config.echo} is used")
        if dynamic != "average" and header.average:
            return PassedOnly(f"it is average {header.average}, and only average 0 is used")
        if dynamic != "phase" and header.phase:
            return PassedOnly(f"it is cardiac phase {header.phase}, and only phase 0 is used")
        if dynamic != "set" and self._set not in (None, header.set):
            return PassedOnly(f"it belongs to set {header.set}, and set {self._set} is used")
        if self._series not in (None, header.image_series_index):
            return PassedOnly(f"it belongs to series {header.image_series_index}, and series {self._series} is used")
        return None

    def _number(self, header: ismrmrd.ImageHeader, body: bytes) -> Admitted | PassedOnly:
        counter = self._counter(header)
        repetition = counter - self._config.first_repetition - self._config.dummies
        if repetition < 0:
            return PassedOnly("it comes before the first repetition that is used")
        if repetition >= self._n_planned:
            return PassedOnly(f"it is repetition {repetition}, and the schedule has {self._n_planned}")
        slice_ = header.slice if self._n_slices > 1 else 0
        if slice_ >= self._n_slices:
            return PassedOnly(f"it is slice {slice_}, and {self._n_slices} are expected")
        self._last_counter = counter
        return Admitted(_renumbered(header, body, repetition, slice_), "image", repetition, slice_)

    def _counter(self, header: ismrmrd.ImageHeader) -> int:
        if self._config.dynamic_index == "arrival":
            self._n_arrived += 1
            return (self._n_arrived - 1) // self._n_slices + self._config.first_repetition
        value = getattr(header, self._config.dynamic_index)
        last = value if self._last_counter is None else self._last_counter
        return last + (value - last + 0x8000) % 0x10000 - 0x8000  # the nearest number with these 16 bits


def _renumbered(header: ismrmrd.ImageHeader, body: bytes, repetition: int, slice_: int) -> bytes:
    """The image with the session's counters in its header; the same bytes where they are so already."""
    if (header.repetition, header.slice, header.set) == (repetition, slice_, 0):
        return body
    changed = ismrmrd.ImageHeader.from_buffer_copy(header)
    changed.repetition, changed.slice, changed.set = repetition, slice_, 0
    return bytes(changed) + body[HEADER_BYTES:]


def _choose_scan(parameters: Mapping[str, str], config: GatewayConfig) -> Scan:
    named = parameters.get("scan", "").strip()
    if named:
        return _find_scan(named, config) or _unknown(named, config)
    for parameter in _NAMING[1:]:
        found = _find_scan(parameters.get(parameter, ""), config)
        if found is not None:
            return found
    if config.scan is not None:
        return load(config.scan)
    named = next((parameters[name] for name in _NAMING if parameters.get(name)), "")
    return _unknown(named, config)


def _remarks(peer: Peer, config: GatewayConfig) -> tuple[str, ...]:
    named = [peer.parameters[name] for name in _NAMING if peer.parameters.get(name, "").strip()]
    remarks = []
    if named and all(_find_scan(name, config) is None for name in named):
        names = ", ".join(repr(name[:64]) for name in named)
        remarks.append(f"No scan is called {names}: the gateway's own is used, {config.scan}.")
    if not peer.header_is_readable:
        remarks.append("The MRD header is not XML: neither the field strength nor the number of slices could be checked.")
    return tuple(remarks)


def _find_scan(name: str, config: GatewayConfig) -> Scan | None:
    stem = PurePosixPath(name.strip().replace("\\", "/")).name
    for suffix in (".xml", ".json", ".yaml", ".yml"):
        stem = stem.removesuffix(suffix)
    if stem in BUILTIN:
        return BUILTIN[stem]
    path = _scan_files(config).get(stem)
    return None if path is None else load(str(path))


def _scan_files(config: GatewayConfig) -> dict[str, Path]:
    return {} if config.scans_dir is None else {path.stem: path for path in sorted(config.scans_dir.glob("*.yaml"))}


def _unknown(name: str, config: GatewayConfig) -> Scan:
    known = ", ".join(sorted({*BUILTIN, *_scan_files(config)}))
    what = (
        f"names the scan {name[:64]!r}, which is not known here"
        if name
        else "names no scan, and the gateway was started without one"
    )
    raise InputError(f"The configuration sent with the images {what}; known are: {known}.")


def _parameters(text: str) -> dict[str, str]:
    root = _xml(text)
    if root is not None:
        return _xml_parameters(root)
    if text.lstrip().startswith("{"):
        return _json_parameters(text)
    return {"config": text.strip()} if len(text) <= 256 else {}


def _xml_parameters(root: ElementTree.Element) -> dict[str, str]:
    """`<property name=".." value=".."/>`, `<property><name>..</name><value>..</value></property>` and `<scan>..</scan>`."""
    found: dict[str, str] = {}
    for element in root.iter():
        tag = element.tag.rpartition("}")[2]
        if tag == "property":
            name = element.get("name") or element.findtext("{*}name", "")
            found[name.strip()] = (element.get("value") or element.findtext("{*}value", "")).strip()
        elif tag in _PEER_OPTIONS or tag == "scan":
            found[tag] = (element.text or "").strip()
    return found


def _json_parameters(text: str) -> dict[str, str]:
    """The `parameters` of an OpenRecon JSON, as text; anything else says nothing."""
    try:
        content = json.loads(text[:_MAX_MEANING_BYTES])
    except (ValueError, RecursionError):
        return {}
    parameters = content.get("parameters", content) if isinstance(content, dict) else {}
    if not isinstance(parameters, dict):
        return {}
    return {name: str(value) for name, value in parameters.items() if isinstance(value, str | int | float | bool)}


def _xml(text: str) -> ElementTree.Element | None:
    """The root of an XML text; none if it is not XML or has a document type."""
    if not text.lstrip().startswith("<") or len(text) > _MAX_MEANING_BYTES or "<!doctype" in text.lower():
        return None
    try:
        return ElementTree.fromstring(text.strip())
    except (ElementTree.ParseError, ValueError):
        return None


def _number(root: ElementTree.Element, path: str) -> float | None:
    try:
        value = float(root.findtext(path, ""))
    except ValueError:
        return None
    return value if abs(value) < float("inf") else None
