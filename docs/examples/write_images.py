"""An MRD file that `scansteer replay` takes, of images in an array: one per block of the scan's schedule, in the order in which they were played.

    python write_images.py IMAGES.npy SCAN OUT.h5
"""

import sys
from pathlib import Path

import ismrmrd
import numpy as np

from scansteer.protocols.scan import Scan, load

VOXEL_MM = (0.5, 0.5, 5.0)  # x (along a row), y, z; yours
CENTRE_MM = (0.0, 0.0, 0.0)  # of the volume; left, posterior, superior are positive
READ, PHASE, SLICE = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)  # where x, y and z of the array point, in the same system


def header(scan: Scan) -> str:
    """What the scanner was set to. Put in what it was really set to: a replay compares that with the scan."""
    xsd, first = ismrmrd.xsd, scan.schedule[0]
    tr_s = first.duration_s + scan.readout.n_shots * scan.readout.shot_spacing_s
    return xsd.ismrmrdHeader(
        experimentalConditions=xsd.experimentalConditionsType(H1resonanceFrequency_Hz=round(42.577e6 * scan.field_t)),
        acquisitionSystemInformation=xsd.acquisitionSystemInformationType(systemFieldStrength_T=scan.field_t),
        sequenceParameters=xsd.sequenceParametersType(TR=[1000 * tr_s], flipAngle_deg=[scan.readout.flip_deg]),
    ).toXML()


def write(path: Path, images: np.ndarray, scan: Scan) -> None:
    """Magnitudes of shape (image, row, column), or (image, slice, row, column)."""
    rows, columns = images.shape[-2:]
    slices = images.shape[1] if images.ndim == 4 else 1
    extent = tuple(size * n for size, n in zip(VOXEL_MM, (columns, rows, slices), strict=True))
    with ismrmrd.Dataset(str(path), "dataset", mode="w") as file:  # "w": a file that is there is replaced
        file.write_xml_header(header(scan).encode())
        for repetition, pixels in enumerate(images):
            image = ismrmrd.Image.from_array(pixels.astype(np.float32), transpose=False, repetition=repetition, image_type=ismrmrd.IMTYPE_MAGNITUDE)
            image.field_of_view, image.position = extent, CENTRE_MM
            image.read_dir, image.phase_dir, image.slice_dir = READ, PHASE, SLICE
            file.append_image("image_0", image)


if __name__ == "__main__":
    write(Path(sys.argv[3]), np.load(sys.argv[1]), load(sys.argv[2]))
