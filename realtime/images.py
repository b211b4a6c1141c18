"""MRD images: from the bytes of a message to pixels with a place and a meaning, and back.

A message body is what `ismrmrd.Image.to_bytes()` gives: 198-byte header, uint64 length, that many bytes of Meta XML, then the
data as [channel, z, y, x] in C order, little-endian. Everything that a peer declares is compared with a bound, and with the
bytes that are really there, before anything is allocated or parsed.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple
from xml.etree import ElementTree

import ismrmrd
import numpy as np

from scansteer.core.errors import InputError

Role = Literal["image", "t1", "t2", "b0", "b1", "fss", "kssw", "mask", "other"]
Vector = tuple[float, float, float]

HEADER_BYTES = ctypes.sizeof(ismrmrd.ImageHeader)
MAX_VOXELS = 2**24
"""Matrix x channels that is accepted unless the caller says otherwise (a 256 x 256 x 256 volume)."""
MAX_META_BYTES = 2**20
FAINTEST, BRIGHTEST = 1e-6, 1e12
"""Largest pixel of an image: squares of squares, of the noise as well, stay normal numbers in single precision where they are small, and
sums of squares finite where they are large. From 1e-8 on results do not depend on the scale; at 5e-10 they begin to."""

DTYPES = {1: "<u2", 2: "<i2", 3: "<u4", 4: "<i4", 5: "<f4", 6: "<f8", 7: "<c8", 8: "<c16"}
"""NumPy type of each MRD `data_type`; 4 is int32 in the standard although ismrmrd-python maps it to int64."""
_DATA_TYPES = {np.dtype(dtype): number for number, dtype in DTYPES.items()}

_PHASE, _IMAGINARY, _RGB = 2, 4, 6
_NAVIGATION_FLAG = 1 << (ismrmrd.IMAGE_IS_NAVIGATION_DATA - 1)

ROLES: dict[str, Role] = {
    "T1": "t1", "T1MAP": "t1", "T2": "t2", "T2MAP": "t2", "FREQMAP": "b0", "B0": "b0", "B0MAP": "b0", "B1": "b1", "B1MAP": "b1",
    "FSS": "fss", "FSSMAP": "fss", "KSSW": "kssw", "KSSWMAP": "kssw",
    "MASK": "mask", "LABEL": "mask", "LABELS": "mask", "LABELMAP": "mask", "SEGMENTATION": "mask",
}  # fmt: skip
"""Maps and masks by their names in Meta, in capitals."""

UNITS: dict[str, str] = {"t1": "ms", "t2": "ms", "b0": "Hz", "b1": "relative", "fss": "fraction", "kssw": "1/s"}
"""What the values of a map mean, in frames, in messages and in files; B1 is relative to nominal."""

# Other units that a map's Meta `Unit` may state, in lower case, as factors to ours.
_UNIT_FACTORS: dict[str, dict[str, float]] = {
    "t1": {"ms": 1.0, "s": 1e3},
    "t2": {"ms": 1.0, "s": 1e3, "us": 1e-3},
    "b0": {"hz": 1.0},
    "b1": {"relative": 1.0, "fraction": 1.0, "1": 1.0, "": 1.0, "%": 0.01, "percent": 0.01},
    "fss": {"fraction": 1.0, "1": 1.0, "": 1.0, "%": 0.01, "percent": 0.01},
    "kssw": {"1/s": 1.0, "s^-1": 1.0, "hz": 1.0},
}


@dataclass(frozen=True)
class Geometry:
    """Where the voxels of an image lie: matrix as (x, y, z); millimetres and directions in MRD's patient system (LPS)."""

    matrix: tuple[int, int, int]
    field_of_view_mm: Vector = (0.0, 0.0, 0.0)
    """Extent of the volume; a value that is not positive means voxels of 1 mm."""
    position_mm: Vector = (0.0, 0.0, 0.0)
    """Centre of the volume."""
    read_dir: Vector = (0.0, 0.0, 0.0)
    phase_dir: Vector = (0.0, 0.0, 0.0)
    slice_dir: Vector = (0.0, 0.0, 0.0)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (z, y, x) of the pixel array."""
        x, y, z = self.matrix
        return z, y, x

    @property
    def voxel_mm(self) -> Vector:
        sizes = [
            extent / count if math.isfinite(extent) and extent > 0 else 1.0
            for extent, count in zip(self.field_of_view_mm, self.matrix, strict=True)
        ]
        return sizes[0], sizes[1], sizes[2]

    @property
    def is_oriented(self) -> bool:
        """Whether the three directions are orthonormal (within 1 %), hence to be believed."""
        directions = np.array([self.read_dir, self.phase_dir, self.slice_dir])
        return bool(np.all(np.isfinite(directions)) and np.allclose(directions @ directions.T, np.eye(3), atol=0.01))

    def affine(self) -> np.ndarray:
        """NIfTI affine, shape (4, 4): voxel index (x, y, z) to millimetres in RAS.

        The position is that of the volume's centre, index (n - 1) / 2. Directions that cannot be believed give the identity: the
        axes of the array are then taken as right, anterior, superior, which is an assumption and not a measurement.
        """
        lps_to_ras = np.diag([-1.0, -1.0, 1.0])
        rotation = np.eye(3)
        if self.is_oriented:
            rotation = lps_to_ras @ np.array([self.read_dir, self.phase_dir, self.slice_dir]).T
        affine = np.eye(4)
        affine[:3, :3] = rotation * np.array(self.voxel_mm)
        centre = np.nan_to_num(lps_to_ras @ np.array(self.position_mm), nan=0.0, posinf=0.0, neginf=0.0)
        affine[:3, 3] = centre - affine[:3, :3] @ ((np.array(self.matrix) - 1) / 2)
        return affine

    def difference(self, other: Geometry) -> str | None:
        """What differs in `other`, as half a sentence; none when the two place their voxels alike (within 0.01 mm and 0.001)."""
        directions = ("read_dir", "phase_dir", "slice_dir")
        if other.matrix != self.matrix:
            return f"its matrix is {by(other.matrix)} instead of {by(self.matrix)}"
        for name, tolerance in {"field_of_view_mm": 0.01, "position_mm": 0.01, **dict.fromkeys(directions, 1e-3)}.items():
            here, there = getattr(self, name), getattr(other, name)
            if not np.allclose(here, there, rtol=0, atol=tolerance, equal_nan=True):
                return f"its {name} is {_listed(there)} instead of {_listed(here)}"
        return None


@dataclass(frozen=True)
class Frame:
    """One decoded image."""

    pixels: np.ndarray
    """Values, float64, shape (z, y, x): magnitude of complex data, root sum of squares of several channels, rescaled as Meta
    asks. Real data keep their sign (a B0 map has one). Maps are in the unit of `UNITS`."""
    geometry: Geometry
    role: Role = "image"
    """What the image is, from Meta `DataRole` or `GADGETRON_DataRole`; phase, imaginary and colour images are `other`."""
    repetition: int = 0
    slice: int = 0
    set: int = 0
    contrast: int = 0
    average: int = 0
    series_index: int = 0
    image_index: int = 0
    meta: dict[str, str] = field(default_factory=dict)
    """Meta attributes; several values of one name are joined by a backslash, as in DICOM."""
    data_type: int = 5
    """MRD number of the pixels' type as they were sent."""
    is_dummy: bool = False
    """Declared not to be data: navigation flag, a DataRole `DUMMY`, or Meta `IsDummy`."""


def decode_frame(message: bytes | bytearray | memoryview, *, max_voxels: int = MAX_VOXELS) -> Frame:
    """Decode the body of an MRD image message.

    Rescaling: value = stored x `RescaleSlope` + `RescaleIntercept` if Meta has them, before channels are combined. A map whose
    Meta says another `Unit` than that of `UNITS` is converted.

    Parameters
    ----------
    message
        Header, Meta length, Meta, data; nothing before or after.
    max_voxels
        Largest matrix x channels that is accepted.

    Raises
    ------
    InputError
        One sentence that says what is wrong with the message. NaN and empty pictures are left to `check_usable`.
    """
    sent = open_image(message, max_voxels=max_voxels)
    header, meta = sent.header, sent.meta
    with np.errstate(invalid="ignore", over="ignore"):  # a signalling NaN or a sum of squares beyond float64 is `check_usable`'s
        pixels = _combined(_rescaled(_widened(sent.values), *sent.rescaling)) * sent.unit_factor
    return Frame(
        pixels=pixels,
        geometry=sent.geometry,
        role=sent.role,
        repetition=header.repetition,
        slice=header.slice,
        set=header.set,
        contrast=header.contrast,
        average=header.average,
        series_index=header.image_series_index,
        image_index=header.image_index,
        meta=meta,
        data_type=header.data_type,
        is_dummy=is_dummy(meta, header.flags),
    )


class SentImage(NamedTuple):
    """An image message as it was sent: everything in it is legible, its values are untouched."""

    header: ismrmrd.ImageHeader
    values: np.ndarray
    """(channel, z, y, x), a view of the message."""
    meta: dict[str, str]
    role: Role
    rescaling: tuple[float, float]
    """Slope and intercept."""
    unit_factor: float
    geometry: Geometry


def open_image(message: bytes | bytearray | memoryview, *, max_voxels: int = MAX_VOXELS) -> SentImage:
    """Everything that `decode_frame` refuses is refused here, in a time that does not grow with the number of voxels.

    Raises
    ------
    InputError
        As `decode_frame`.
    """
    view = memoryview(message).cast("B")
    header = _header(view)
    shape = _declared_shape(header, max_voxels)
    meta_bytes, payload = _split(view)
    values = np.frombuffer(payload, _payload_dtype(header.data_type, math.prod(shape), len(payload))).reshape(shape)
    meta = parse_meta(meta_bytes)
    role = role_of(meta, header.image_type)
    if shape[0] > 1 and role not in ("image", "other"):
        raise InputError(f"The {role} map has {shape[0]} channels; send one combined map.")
    rescaling = _rescaling(meta, values.dtype.kind == "c")
    return SentImage(header, values, meta, role, rescaling, _unit_factor(role, meta), _geometry(header))


def check_usable(frame: Frame) -> None:
    """Refuse an image that says nothing.

    Raises
    ------
    InputError
        A pixel is NaN or infinite, or all are zero, or so large or small that their products leave the range of numbers.
    """
    n_bad = int(np.count_nonzero(~np.isfinite(frame.pixels)))
    if n_bad:
        raise InputError(f"The image of repetition {frame.repetition} has {n_bad} NaN or infinite pixels; it is not used.")
    largest = float(np.max(np.abs(frame.pixels)))
    if largest == 0:
        raise InputError(f"The image of repetition {frame.repetition} is zero everywhere; it is not used.")
    if not FAINTEST <= largest <= BRIGHTEST:
        raise InputError(
            f"The image of repetition {frame.repetition} has pixels of up to {largest:g}; {FAINTEST:g} to {BRIGHTEST:g} can be used, rescale it."
        )


def image_message(
    pixels: np.ndarray,
    geometry: Geometry | None = None,
    *,
    repetition: int = 0,
    slice: int = 0,
    set: int = 0,
    contrast: int = 0,
    average: int = 0,
    series_index: int = 0,
    image_index: int = 0,
    meta: Mapping[str, str | list[str]] | None = None,
    flags: int = 0,
) -> bytes:
    """Build the body of an MRD image message.

    Parameters
    ----------
    pixels
        Shape (y, x), (z, y, x) or (channel, z, y, x); sent in its own type (unsigned or signed 16 or 32 bit, float or complex).
    geometry
        Placement; its matrix must be that of the pixels. None: nothing is known but the matrix.
    repetition, slice, set, contrast, average, series_index, image_index
        Counters of the header; they wrap at 65536, as MRD's do.
    meta
        Meta attributes, a list for several values.
    flags
        MRD image flags.

    Raises
    ------
    InputError
        The type has no MRD number, or the geometry is another matrix's.
    """
    if not 2 <= pixels.ndim <= 4:
        raise InputError(f"An image is (y, x), (z, y, x) or (channel, z, y, x); got {pixels.ndim} axes.")
    data = np.ascontiguousarray(pixels.reshape((1,) * (4 - pixels.ndim) + pixels.shape))
    data_type = _DATA_TYPES.get(data.dtype.newbyteorder("<"))
    if data_type is None:
        raise InputError(f"MRD images cannot hold {data.dtype}; convert the pixels to float32 or a 16 or 32 bit integer.")
    channels, z, y, x = data.shape
    geometry = geometry or Geometry((x, y, z))
    if geometry.matrix != (x, y, z):
        raise InputError(f"The geometry is for a matrix {by(geometry.matrix)}, the pixels are {by((x, y, z))}.")
    header = ismrmrd.ImageHeader(
        version=1, data_type=data_type, flags=flags, channels=channels, matrix_size=(x, y, z),
        field_of_view=geometry.field_of_view_mm, position=geometry.position_mm,
        read_dir=geometry.read_dir, phase_dir=geometry.phase_dir, slice_dir=geometry.slice_dir,
        average=average & 0xFFFF, slice=slice & 0xFFFF, contrast=contrast & 0xFFFF, repetition=repetition & 0xFFFF,
        set=set & 0xFFFF, image_type=5 if data.dtype.kind == "c" else 1, image_index=image_index & 0xFFFF,
        image_series_index=series_index & 0xFFFF,
    )  # fmt: skip
    text = ismrmrd.Meta(meta or {}).serialize().encode("utf-8")
    header.attribute_string_len = len(text)
    little_endian = data.astype(DTYPES[data_type], copy=False)
    return bytes(header) + len(text).to_bytes(8, "little") + text + little_endian.tobytes()


def encode_frame(frame: Frame) -> bytes:
    """The message of a frame: pixels as float32, counters, geometry and Meta kept.

    Meta's rescale attributes are dropped (they are applied already), a map's unit is stated, and a role that Meta does not name
    is written as `DataRole`.
    """
    meta: dict[str, str | list[str]] = {
        name: value.split("\\") for name, value in frame.meta.items() if name not in ("RescaleSlope", "RescaleIntercept")
    }
    if not _data_roles(frame.meta):
        meta["DataRole"] = "FREQMAP" if frame.role == "b0" else frame.role.upper()
    if frame.role in UNITS:
        meta["Unit"] = UNITS[frame.role]
    if frame.is_dummy:
        meta["IsDummy"] = "1"
    return image_message(
        frame.pixels.astype(np.float32),
        frame.geometry,
        repetition=frame.repetition,
        slice=frame.slice,
        set=frame.set,
        contrast=frame.contrast,
        average=frame.average,
        series_index=frame.series_index,
        image_index=frame.image_index,
        meta=meta,
    )


def _header(view: memoryview) -> ismrmrd.ImageHeader:
    if len(view) < HEADER_BYTES + 8:
        raise InputError(f"The image message has {len(view)} bytes, fewer than an MRD image header ({HEADER_BYTES + 8}).")
    return ismrmrd.ImageHeader.from_buffer_copy(view[:HEADER_BYTES])


def _declared_shape(header: ismrmrd.ImageHeader, max_voxels: int) -> tuple[int, int, int, int]:
    x, y, z = header.matrix_size
    shape = int(header.channels), int(z), int(y), int(x)
    if math.prod(shape) == 0:
        raise InputError(f"The image header declares no voxels: matrix {by((x, y, z))}, {header.channels} channels.")
    if math.prod(shape) > max_voxels:
        raise InputError(
            f"The image header declares {math.prod(shape)} values (matrix {by((x, y, z))}, {header.channels} channels), "
            f"more than the {max_voxels} that are accepted."
        )
    return shape


def _split(view: memoryview) -> tuple[memoryview, memoryview]:
    """(Meta, data) of a message."""
    start = HEADER_BYTES + 8
    meta_length = int.from_bytes(view[HEADER_BYTES:start], "little")
    if meta_length > MAX_META_BYTES:
        raise InputError(f"The image message declares {meta_length} bytes of Meta, more than the {MAX_META_BYTES} accepted.")
    if meta_length > len(view) - start:
        raise InputError(f"The image message declares {meta_length} bytes of Meta but ends after {len(view) - start}.")
    return view[start : start + meta_length], view[start + meta_length :]


def _payload_dtype(data_type: int, n_values: int, n_bytes: int) -> np.dtype:
    if data_type not in DTYPES:
        raise InputError(f"The image header has data_type {data_type}; MRD knows 1 to 8.")
    dtype = np.dtype(DTYPES[data_type])
    if data_type == 4 and n_bytes == 8 * n_values:
        return np.dtype("<i8")  # what ismrmrd-python sends as type 4; here the length tells the two apart
    if n_bytes != n_values * dtype.itemsize:
        raise InputError(f"The image message has {n_bytes} bytes of pixels, its header declares {n_values * dtype.itemsize}.")
    return dtype


def _widened(stored: np.ndarray) -> np.ndarray:
    return stored.astype(np.complex128 if stored.dtype.kind == "c" else np.float64)


def _combined(channels: np.ndarray) -> np.ndarray:
    """Magnitude of complex values, root sum of squares of several channels; shape (z, y, x)."""
    pixels = np.abs(channels) if channels.dtype.kind == "c" else channels
    return np.sqrt(np.sum(pixels**2, axis=0)) if len(pixels) > 1 else pixels[0]


def parse_meta(raw: bytes | memoryview) -> dict[str, str]:
    """Meta XML, up to its first NUL, as a dictionary; several values of one name are joined by a backslash.

    Raises
    ------
    InputError
        Not UTF-8, not XML, not Meta, or with a document type: no peer has a use for entities.
    """
    try:
        text = bytes(raw).split(b"\0", 1)[0].decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"The Meta attributes of the image are not UTF-8: byte {error.start}.") from error
    if not text:
        return {}
    if "<!doctype" in text.lower():
        raise InputError("The Meta attributes of the image contain a document type, which is not accepted.")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise InputError(f"The Meta attributes of the image are not XML: {error}.") from error
    if root.tag != "ismrmrdMeta":
        raise InputError(f"The Meta attributes of the image are <{root.tag[:40]}>, not <ismrmrdMeta>.")
    meta: dict[str, str] = {}
    for entry in root.findall("meta"):
        name = entry.findtext("name", "").strip()
        values = [value.text or "" for value in entry.findall("value")]
        meta[name] = "\\".join([meta[name], *values] if name in meta else values)
    return meta


def _rescaling(meta: Mapping[str, str], is_complex: bool) -> tuple[float, float]:
    slope, intercept = _number(meta, "RescaleSlope", 1.0), _number(meta, "RescaleIntercept", 0.0)
    if slope <= 0:
        raise InputError(f"RescaleSlope of the image must be positive, got {slope:g}.")
    if is_complex and intercept != 0:
        raise InputError(f"RescaleIntercept {intercept:g} has no meaning for complex pixels; send the magnitude or leave it out.")
    return slope, intercept


def _rescaled(pixels: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    return pixels if (slope, intercept) == (1.0, 0.0) else pixels * slope + intercept


def _unit_factor(role: Role, meta: Mapping[str, str]) -> float:
    if role not in UNITS or "Unit" not in meta:
        return 1.0
    factor = _UNIT_FACTORS[role].get(meta["Unit"].strip().lower())
    if factor is None:
        raise InputError(f"The {role} map says that its unit is {meta['Unit'][:40]!r}; give it in {UNITS[role]}.")
    return factor


def _number(meta: Mapping[str, str], name: str, default: float) -> float:
    text = meta.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{name} of the image must be a number, got {text[:40]!r}.")
    return value


def _data_roles(meta: Mapping[str, str]) -> list[str]:
    named = [meta[name] for name in ("DataRole", "GADGETRON_DataRole") if name in meta]
    return [role.strip().upper() for text in named for role in text.split("\\") if role.strip()]


def role_of(meta: Mapping[str, str], image_type: int = 1) -> Role:
    """What an image is, by Meta and MRD image type: a named map or mask, data, or something else."""
    roles = _data_roles(meta)
    for role in roles:
        if role in ROLES:
            return ROLES[role]
    if image_type in (_PHASE, _IMAGINARY, _RGB):
        return "other"
    return "image" if not roles or {"IMAGE", "DUMMY"} & {*roles} else "other"


def is_dummy(meta: Mapping[str, str], flags: int) -> bool:
    """Whether an image is declared not to be data."""
    declared = meta.get("IsDummy", "").strip().lower() in ("1", "true", "yes")
    return declared or "DUMMY" in _data_roles(meta) or bool(flags & _NAVIGATION_FLAG)


def _geometry(header: ismrmrd.ImageHeader) -> Geometry:
    def three(values: object) -> Vector:
        a, b, c = (float(value) for value in values)  # type: ignore[attr-defined]
        return a, b, c

    x, y, z = (int(size) for size in header.matrix_size)
    return Geometry(
        matrix=(x, y, z),
        field_of_view_mm=three(header.field_of_view),
        position_mm=three(header.position),
        read_dir=three(header.read_dir),
        phase_dir=three(header.phase_dir),
        slice_dir=three(header.slice_dir),
    )


def by(sizes: tuple[int, ...]) -> str:
    """Sizes as people write them: 64 x 64 x 1."""
    return " x ".join(str(size) for size in sizes)


def _listed(values: Vector) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"
