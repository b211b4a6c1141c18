"""Parameter maps on their way back to the scanner: MRD image series with the geometry of the images they come from."""

from __future__ import annotations

import json

import ismrmrd
import numpy as np

from scansteer.realtime.mrd_connection import image_frame
from scansteer.realtime.uplink import MapSet


def map_frames(maps: MapSet, heads: dict[int, tuple[bytes, dict[str, str]]], scan_name: str, first_series: int) -> list[bytes]:
    """IMAGE messages of the maps: a series for each, an image for each slice, the header copied from the input's.

    Parameters
    ----------
    heads
        Slice -> header and Meta of an input image.

    Returns
    -------
    float32 images, 0 outside the region; the decision and the scan's name in Meta.
    """
    frames: list[bytes] = []
    for number, (name, array) in enumerate(maps.arrays.items()):
        values = np.nan_to_num(array, nan=0.0).astype("<f4")
        depth = values.shape[0] // max(len(heads), 1)
        for index, slice_ in enumerate(sorted(heads)):
            head, meta = heads[slice_]
            header = _map_header(head, first_series + number, index)
            text = _map_meta(name, meta, maps, scan_name).encode("utf-8")
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


def _map_meta(name: str, meta: dict[str, str], maps: MapSet, scan_name: str) -> str:
    history = meta.get("ImageProcessingHistory", "")
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
