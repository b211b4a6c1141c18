"""The built-in scans by name."""

from scansteer.protocols import amide_human, amide_mouse, larg_phantom, mt_human, mt_mouse
from scansteer.protocols.scan import Scan

SCANS = (
    larg_phantom.PUBLISHED,
    larg_phantom.WIDE,
    mt_mouse.SCAN,
    mt_mouse.WITH_REFERENCE,
    amide_mouse.SCAN,
    mt_human.SCAN,
    amide_human.SCAN,
)

BUILTIN: dict[str, Scan] = {scan.name: scan for scan in SCANS}
