"""The virtual scanner: plays what the controller says on a phantom and sends every image as a reconstruction would."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from scansteer.protocols.scan import SaturationBlock, Scan
from scansteer.realtime.images import image_message
from scansteer.simulators.controller import SequenceController
from scansteer.simulators.phantom import Magnet

SendImage = Callable[[bytes], object]
"""Takes the body of an MRD image message; returns when the service has it."""


def run_scan(
    scan: Scan,
    magnet: Magnet,
    controller: SequenceController,
    send_image: SendImage,
    *,
    speed: float = 1.0,
    on_image: Callable[[int, SaturationBlock], None] | None = None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Play a scan to its end, by schedule or by the controller's word.

    Parameters
    ----------
    send_image
        Sends one MRD image message.
    speed
        1: the protocol's pace; more: that many times faster. What the service may take for a decision (the recovery time) is not
        shortened, as the service does not get faster.
    on_image
        Called with the repetition and the block played once its image was sent.
    sleep, clock
        Wait for so many seconds, and tell the time; tests pass their own.

    Returns
    -------
    Number of images that were acquired.
    """
    repetition = 0
    while (block := controller.next_block(repetition, deadline_s=_time_to_decide_s(scan, repetition))) is not None:
        begun = clock()
        pixels = magnet.play(block)
        sleep(max(0.0, block.duration_s / speed - (clock() - begun)))
        controller.report(repetition, block)
        send_image(image_of(pixels, magnet, repetition))
        if on_image is not None:
            on_image(repetition, block)
        repetition += 1
    return repetition


def image_of(pixels: np.ndarray, magnet: Magnet, repetition: int) -> bytes:
    """An MRD image as a reconstruction sends it: unsigned 16 bit, rounded."""
    counts = np.clip(np.round(pixels), 0, 65535).astype(np.uint16)
    return image_message(
        counts,
        magnet.phantom.geometry,
        repetition=repetition,
        image_index=repetition + 1,
        meta={"DataRole": "Image", "ImageComments": "scansteer virtual scanner"},
    )


def _time_to_decide_s(scan: Scan, repetition: int) -> float:
    """Until the next saturation begins: the recovery after the readout."""
    return max(scan.schedule[min(repetition, len(scan.schedule) - 1)].t_rec_s, 0.05)
