"""What a pass over a stored scan finds: where each image lies and what it is, before any pixels are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import ismrmrd

from scansteer.core.errors import InputError
from scansteer.realtime.images import ROLES, Role, is_dummy, parse_meta, role_of


@dataclass(frozen=True)
class Entry:
    """One stored image."""

    series: str
    """HDF5 group or series index that it belongs to."""
    key: tuple[int, int, int, int]
    """Repetition, slice, set, contrast."""
    place: str
    """Where it lies, for messages to people."""
    read: Callable[[], bytes]
    """Gives the body of its MRD image message."""
    role: Role = "image"
    is_dummy: bool = False
    is_whole: bool = True
    """Whether the file holds all of it."""


@dataclass
class Index:
    """All images of a file and its header."""

    entries: list[Entry] = field(default_factory=list)
    xml: bytes = b""
    """ISMRMRD header, empty when there is none."""
    cut: str | None = None
    """How the file ends too early, as half a sentence; none when it does not."""
    lost: list[str] = field(default_factory=list)
    """What went with the end of the file."""


def make_entry(series: str, header: ismrmrd.ImageHeader, meta: bytes, place: str, read: Callable[[], bytes]) -> Entry:
    """Entry of a whole image. A map is known by its Meta, else by the name of its series; bad Meta is refused on reading."""
    try:
        attributes = parse_meta(meta)
    except InputError:
        attributes = {}
    role = role_of(attributes, header.image_type)
    if role in ("image", "other"):
        role = ROLES.get(series.upper(), role)
    return Entry(series, key_of(header), place, read, role, is_dummy(attributes, header.flags))


def key_of(header: ismrmrd.ImageHeader) -> tuple[int, int, int, int]:
    """Counters that tell the images of one series apart."""
    return int(header.repetition), int(header.slice), int(header.set), int(header.contrast)
