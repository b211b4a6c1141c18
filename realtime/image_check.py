"""Is an image what its message says it is? Compared before anything is decoded or written down."""

from __future__ import annotations

import struct
import zlib

from scansteer.realtime.codec import Bytes, ProtocolError
from scansteer.realtime.config import ImageLimits
from scansteer.realtime.images import HEADER_BYTES, MAX_META_BYTES
from scansteer.realtime.messages import Image

IMAGE_FACTS = struct.Struct("<2xH12x3H12xH62xH4x2H20xH68xQ")
"""Of an MRD image: data_type, matrix x, y, z, channels, slice, repetition, set, image_series_index, length of Meta. The layout is
`ismrmrd.ImageHeader`'s (a test compares); read in one go because this is done for every image while the others wait."""

_BYTES_PER_VALUE = {1: (2,), 2: (2,), 3: (4,), 4: (4, 8), 5: (4,), 6: (8,), 7: (8,), 8: (16,)}
"""By MRD data type; 4 is int32 in the standard, int64 in ismrmrd-python."""


def check_body(message: Image, body: Bytes, limits: ImageLimits) -> None:
    """Compare an image's bytes with what its header, its envelope and the limits say; nothing is decoded yet.

    Raises
    ------
    ProtocolError
        With the reason.
    """
    if len(body) > limits.max_image_bytes:
        raise ProtocolError("too-large", f"The image has {len(body)} bytes, more than the {limits.max_image_bytes} accepted.")
    if len(body) < HEADER_BYTES + 8:
        raise ProtocolError("malformed", f"The image has {len(body)} bytes, fewer than an MRD image header.")
    if zlib.crc32(body) != message.crc32:
        raise ProtocolError("malformed", "The image's bytes do not give the checksum that its message declares.")
    data_type, x, y, z, channels, slice_, repetition, set_, series, n_meta = IMAGE_FACTS.unpack_from(body)
    n_values = channels * x * y * z
    if not 1 <= n_values <= limits.max_voxels:
        raise ProtocolError("too-large", f"The image's header declares {n_values} values; 1 to {limits.max_voxels} are accepted.")
    n_data = len(body) - HEADER_BYTES - 8 - n_meta
    if n_meta > MAX_META_BYTES:
        raise ProtocolError("too-large", f"The image declares {n_meta} bytes of Meta, more than the {MAX_META_BYTES} accepted.")
    if n_data not in [n_values * size for size in _BYTES_PER_VALUE.get(data_type, ())]:
        raise ProtocolError("malformed", f"The image has {n_data} bytes of data (type {data_type}), not as its header declares.")
    declared = (series, slice_, repetition, set_)
    if declared != (message.series, message.slice, message.repetition, message.set):
        raise ProtocolError(
            "malformed", f"Series, slice, repetition and set are {declared} in the image's header, not in its message."
        )
