"""Parameter maps on their way back to the scanner: MRD image series with the geometry of the images they come from."""

from __future__ import annotations

import json
from typing import NamedTuple

import ismrmrd
import numpy as np

from scansteer.realtime.admission import Admitted
from scansteer.realtime.images import HEADER_BYTES, parse_meta
from scansteer.realtime.mrd_connection import image_frame
from scansteer.realtime.uplink import MapSet


class Head(NamedTuple):
    """What a map takes over from an input image."""

    header: bytes
    history: str
    """Meta `ImageProcessingHistory`."""


class Heads:
    """Of the images of one connection, by repetition and slice.

    A map takes that of the repetition it was decided on: its image was used, so its geometry is that of the maps, whatever the geometry of
    images before and after it that were left out.
    """

    def __init__(self) -> None:
        self._by_repetition: dict[int, dict[int, Head]] = {}
        self._by_place: dict[bytes, Head] = {}

    def __bool__(self) -> bool:
        return bool(self._by_repetition)

    def note(self, image: Admitted) -> None:
        """Remember an image of the series; of two for one slice, the first."""
        header = ismrmrd.ImageHeader.from_buffer_copy(image.body)
        vectors = (header.field_of_view, header.position, header.read_dir, header.phase_dir, header.slice_dir)
        place = b"".join(map(bytes, (image.slice.to_bytes(2, "little"), header.matrix_size, *vectors)))
        if place not in self._by_place:
            n_meta = int.from_bytes(image.body[HEADER_BYTES : HEADER_BYTES + 8], "little")
            meta = parse_meta(image.body[HEADER_BYTES + 8 : HEADER_BYTES + 8 + n_meta])
            self._by_place[place] = Head(image.body[:HEADER_BYTES], meta.get("ImageProcessingHistory", ""))
        self._by_repetition.setdefault(image.repetition, {}).setdefault(image.slice, self._by_place[place])

    def of(self, repetition: int) -> list[Head]:
        """Those of a repetition's slices, in order."""
        return [head for _, head in sorted(self._by_repetition.get(repetition, {}).items())]


def map_frames(maps: MapSet, heads: Heads, scan_name: str, first_series: int, n_earlier: int = 0) -> list[bytes]:
    """IMAGE messages of the maps: a series for each, an image for each slice, the header copied from the input's.

    Parameters
    ----------
    n_earlier
        How many sets of maps went before: `image_index` counts on within each series.

    Returns
    -------
    float32 images, 0 outside the region; the decision and the scan's name in Meta.
    """
    frames: list[bytes] = []
    slices = heads.of(maps.decision.repetition)
    for number, (name, array) in enumerate(maps.arrays.items()):
        values = np.nan_to_num(array, nan=0.0).astype("<f4")
        depth = values.shape[0] // max(len(slices), 1)
        for index, head in enumerate(slices):
            header = _map_header(head.header, first_series + number, n_earlier * len(slices) + index)
            text = _map_meta(name, head.history, maps, scan_name).encode("utf-8")
            header.attribute_string_len = len(text)
            part = values[index * depth : (index + 1) * depth]
            frames.append(image_frame(bytes(header) + len(text).to_bytes(8, "little") + text + part.tobytes()))
    return frames


def _map_header(head: bytes, series: int, index: int) -> ismrmrd.ImageHeader:
    header = ismrmrd.ImageHeader.from_buffer_copy(head)
    header.data_type, header.image_type, header.channels = ismrmrd.DATATYPE_FLOAT, ismrmrd.IMTYPE_MAGNITUDE, 1
    header.image_series_index, header.image_index = series, index + 1
    header.repetition = header.contrast = header.set = header.average = header.phase = 0
    return header


def _map_meta(name: str, history: str, maps: MapSet, scan_name: str) -> str:
    values: dict[str, str | list[str]] = {
        "DataRole": ["Quantitative", name],
        "ImageProcessingHistory": [*(history.split("\\") if history else []), "SCANSTEER"],
        "Keep_image_geometry": "1",
        "SeriesDescription": f"scansteer_{name}",
        "ScansteerUnit": _unit(name),
        "ScansteerScan": scan_name,
        "ScansteerDecision": json.dumps(maps.decision.model_dump(mode="json")),
    }
    return ismrmrd.Meta(values).serialize()


def _unit(name: str) -> str:
    return "1/s" if name.startswith("k") else "fraction"
