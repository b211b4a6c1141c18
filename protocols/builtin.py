"""The built-in scans by name."""

from scansteer.protocols import larg_phantom, mt_mouse
from scansteer.protocols.scan import Scan

BUILTIN: dict[str, Scan] = {scan.name: scan for scan in (larg_phantom.PUBLISHED, larg_phantom.WIDE, mt_mouse.SCAN)}
