"""Amide CEST of the mouse brain at 7 T: CW saturation at 3.5 ppm, SE-EPI with a 90 degree readout.

Vladimirov et al., Nat. Protoc. 2025, doi 10.1038/s41596-025-01152-w. The semisolid pool comes from the same animal's MT scan, as maps of
fss and kssw.
"""

from scansteer.protocols import mt_human, mt_mouse
from scansteer.protocols.scan import Auxiliary, Limits, Parameter, Pool, Range, SaturationBlock, Scan

OFFSET_PPM = 3.5

SCAN = Scan.model_validate(
    mt_mouse.WITH_REFERENCE.model_dump()
    | {
        "name": "amide-mouse-7T",
        "description": "Mouse brain, 7 T, amide, unsaturated image (TR 15 s) + 30 CW images at 3.5 ppm; takes fss and kssw maps of an MT scan",
        "pools": (Pool(name="amide", kind="solute", offset_ppm=OFFSET_PPM, f="fs", k_per_s="ksw", t2_s=0.04), mt_human.SEMISOLID),
        "parameters": {"fs": Parameter(lower=0.0, upper=6e-3), "ksw": Parameter(lower=50.0, upper=650.0)},
        "schedule": tuple(
            SaturationBlock.model_validate(block.model_dump() | {"offset_ppm": OFFSET_PPM}) for block in mt_mouse.WITH_REFERENCE.schedule
        ),
        "auxiliaries": dict(mt_mouse.SCAN.auxiliaries)
        | {
            "fss": Auxiliary(lower=0.0, upper=0.30, map_error_relative=0.18),  # half-widths of the MT scan's targets, over 1.96
            "kssw": Auxiliary(lower=0.0, upper=70.0, map_error_relative=0.25),
        },
        "limits": Limits.model_validate(mt_mouse.SCAN.limits.model_dump() | {"offset_ppm": Range(lower=-5.0, upper=5.0)}),
    }
)
