"""Which images of a session have arrived: to recognise one that comes again, and to refuse one that cannot belong to it."""

from __future__ import annotations

from scansteer.core.errors import InputError
from scansteer.realtime.codec import Bytes, ProtocolError
from scansteer.realtime.config import Limits
from scansteer.realtime.image_check import check_body
from scansteer.realtime.images import open_image
from scansteer.realtime.journal import Entry
from scansteer.realtime.messages import Accepted, Image
from scansteer.realtime.worker import SideImages


class Received:
    """The images of one session. A function of the images added to it, in their order."""

    def __init__(self, n_slices: int, limits: Limits) -> None:
        self.n_auxiliary = 0
        """Map and mask images so far."""
        self.is_underway = False
        """Images of the series were given to the posterior: maps come too late."""
        self._n_slices = n_slices
        self._limits = limits
        self._records: dict[tuple[str, int, int, int, int], Entry] = {}
        self._dynamic: tuple[int, int] | None = None
        self._side: dict[str, dict[int, Entry]] = {}
        self._new_masks: dict[tuple[int, int, int], int] = {}

    def __len__(self) -> int:
        """Images of the series; maps and masks not counted."""
        return len(self._records) - self.n_auxiliary

    def find(self, message: Image) -> Accepted | None:
        """The answer to an image that was accepted before; none if it is new.

        Raises
        ------
        ProtocolError
            Another image was accepted under the same identity.
        """
        known = self._records.get(_identity(message))
        if known is None:
            return None
        _, checksum_of_body = known.checksums
        if checksum_of_body != message.crc32:
            kind = "image" if message.role == "image" else f"{message.role} image"
            way_out = "; a further mask needs another series or repetition" if message.role == "mask" else ""
            raise ProtocolError(
                "conflict",
                f"Another {kind} of repetition {message.repetition} (series {message.series}, slice {message.slice}, "
                f"set {message.set}) was accepted before; an image is never replaced{way_out}.",
            )
        return Accepted(
            session_id=message.session_id, sequence_number=known.sequence, repetition=message.repetition, duplicate=True
        )

    def check(self, message: Image, body: Bytes) -> None:
        """Refuse an image that cannot belong to this session, before it is written down.

        Raises
        ------
        ProtocolError
            With the reason.
        """
        check_body(message, body, self._limits)
        if message.role != "image":
            self._check_side_image(message, body)
            return
        if message.repetition >= self._limits.max_repetitions:
            raise ProtocolError(
                "limit", f"Repetition {message.repetition} is beyond the {self._limits.max_repetitions} accepted."
            )
        if message.slice >= self._n_slices:
            raise ProtocolError("conflict", f"Slice {message.slice} of a session that was opened with {self._n_slices} slices.")
        if self._dynamic is not None and self._dynamic != (message.series, message.set):
            series, set_ = self._dynamic
            raise ProtocolError(
                "conflict", f"Series {message.series}, set {message.set} are not this session's (series {series}, set {set_})."
            )

    def add(self, message: Image, entry: Entry) -> None:
        """Remember an image that is written down."""
        self._records[_identity(message)] = entry
        if message.role == "image":
            self._dynamic = self._dynamic or (message.series, message.set)
        else:
            self._side.setdefault(message.role, {})[message.slice] = entry
            self.n_auxiliary += 1

    def completes_a_mask(self, message: Image) -> bool:
        """Whether all slices of a mask that came during the series are here with this one (counted once per image)."""
        key = (message.series, message.repetition, message.set)
        self._new_masks[key] = self._new_masks.get(key, 0) + 1
        return self._new_masks[key] == self._n_slices

    def side_images(self) -> SideImages:
        """Maps and masks so far, the latest of each slice."""
        return {role: tuple(slices[index] for index in sorted(slices)) for role, slices in self._side.items()}

    def _check_side_image(self, message: Image, body: Bytes) -> None:
        if self.is_underway and message.role != "mask":
            raise ProtocolError(
                "conflict", f"A {message.role} map came after image 0 was used; send maps before the first image."
            )
        try:
            role = open_image(body, max_voxels=self._limits.max_voxels).role
        except InputError as error:
            raise ProtocolError("malformed", str(error)) from error
        if role != message.role:
            raise ProtocolError("malformed", f"The message says {message.role!r}, the image's Meta says {role!r}.")


def _identity(message: Image) -> tuple[str, int, int, int, int]:
    return message.role, message.series, message.slice, message.repetition, message.set
