"""Amide CEST of the human brain at 3 T: trains of spin-lock pulses at 3.5 ppm, 3D EPI snapshot readout.

Vladimirov et al., Nat. Protoc. 2025, doi 10.1038/s41596-025-01152-w. The semisolid pool comes from the same subject's MT scan, as maps of
fss and kssw.
"""

from scansteer.protocols import amide_mouse, mt_human
from scansteer.protocols.scan import Auxiliary, Limits, Parameter, Pool, Range, Scan

SCAN = Scan.model_validate(
    mt_human.SCAN.model_dump()
    | {
        "name": "amide-human-3T",
        "description": "Human brain, 3 T, amide, unsaturated image + 30 spin-lock trains at 3.5 ppm; takes fss and kssw maps of an MT scan",
        "pools": (
            Pool(name="amide", kind="solute", offset_ppm=amide_mouse.OFFSET_PPM, f="fs", k_per_s="ksw", t2_s=0.04),
            mt_human.SEMISOLID,
        ),
        "parameters": {"fs": Parameter(lower=0.0, upper=1e-2), "ksw": Parameter(lower=50.0, upper=550.0)},
        "schedule": amide_mouse.SCAN.schedule,
        "auxiliaries": dict(mt_human.AUXILIARIES)
        | {
            "fss": Auxiliary(lower=0.0, upper=0.30, map_error_relative=0.1),
            "kssw": Auxiliary(lower=0.0, upper=70.0, map_error_relative=0.25),
        },
        "limits": Limits.model_validate(mt_human.LIMITS.model_dump() | {"offset_ppm": Range(lower=-5.0, upper=5.0)}),
    }
)
