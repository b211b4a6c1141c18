"""Three L-arginine vials at 9.4 T, as their publishers describe the scan: CW saturation at 3 ppm, 30 images, 60 degrees.

Vladimirov et al., Nat. Protoc. 2025, doi 10.1038/s41596-025-01152-w (molecular-mrf). The alpha-amine's three protons count:
fs = 3 x concentration / 110 M.

The wide description marginalises to first order about the centres of its ranges; to second in T1, T2 and B0, for at a pool's own offset a signal's
slope with B0 vanishes, and where carry-over or the first state meet T1. On the published vials that leaves a half-width of f of 42 % at 18 images
and 40 % at 30 (`benchmarks/promises.py real`), or 22 % were B0 known (`widths`). Without B0's curvature it would be said to be 20 %, and of closed
loops whose truth is drawn from these ranges only 84 % would stop with the truth within the 95 % region.
"""

from scansteer.protocols.scan import (
    Auxiliary,
    FirstState,
    Limits,
    Noise,
    Parameter,
    Pool,
    Range,
    Readout,
    SaturationBlock,
    Scan,
    Stop,
)

B1_UT = (5, 5, 3, 3.75, 2.5, 1.75, 5.5, 6, 3.75, 5.75, 0.25, 3, 6, 4.5, 3.75, 3.5, 3.5, 0, 3.75, 6, 3.75, 4.75, 4.5, 4.25, 3.25, 5.25,
         5.25, 0.25, 4.5, 5.25)  # fmt: skip

PUBLISHED = Scan(
    name="larg-phantom-9.4T",
    description="L-arginine phantom, 9.4 T, 30 CW images at 3 ppm, as published (60 degrees, T1 2.5-3.3 s, equilibrium before image 0)",
    field_t=9.4,
    matrix=(64, 64, 1),
    pools=(Pool(name="amine", kind="solute", offset_ppm=3.0, f="fs", k_per_s="ksw", t1_s=2.8, t2_s=0.04),),
    parameters={"fs": Parameter(lower=0.0, upper=4.09e-3), "ksw": Parameter(lower=0.0, upper=1500.0)},
    schedule=tuple(SaturationBlock(b1_ut=b1, offset_ppm=3.0, t_sat_s=3.0, t_rec_s=1.0) for b1 in B1_UT),
    readout=Readout(flip_deg=60.0),
    first_state=FirstState(mz=1.0),
    auxiliaries={
        "t1_s": Auxiliary(lower=2.5, upper=3.3, map_error_relative=0.03),
        "t2_s": Auxiliary(lower=0.6, upper=1.2, map_error_relative=0.05),
        "b0_ppm": Auxiliary(lower=0.0, upper=0.0, map_error=0.02),
        "b1_relative": Auxiliary(lower=1.0, upper=1.0, map_error_relative=0.03),
    },
    noise=Noise(),
    stop=Stop(n_min=12, confirmations=3),  # with fewer images, probes among them, an unknown pool often goes unnoticed
    limits=Limits(
        b1_max_ut=6.0,
        offset_ppm=Range(lower=-5.0, upper=5.0),
        t_sat_s=Range(lower=0.5, upper=3.0),
        t_rec_s=Range(lower=1.0, upper=10.0),
        duty_cycle_max=0.8,
        b1rms_10s_ut=5.5,
        b1rms_6min_ut=4.5,
    ),
)

WIDE = PUBLISHED.model_copy(
    update={
        "name": "larg-phantom-9.4T-wide",
        "description": "L-arginine phantom, 9.4 T, 30 CW images at 3 ppm, with what its publishers' description leaves unsettled as ranges",
        "parameters": {name: parameter.model_copy(update={"prior": "beta"}) for name, parameter in PUBLISHED.parameters.items()},
        "readout": Readout(flip_deg=60.0, carry_over=Range(lower=-0.7, upper=0.1), offset=Range(lower=0.0, upper=0.1)),
        "first_state": FirstState(mz=Range(lower=0.4, upper=1.0)),
        "auxiliaries": {
            "t1_s": Auxiliary(lower=1.4, upper=3.3, map_error_relative=0.03),
            "t2_s": Auxiliary(lower=0.3, upper=2.5, map_error_relative=0.05),
            "b0_ppm": Auxiliary(lower=-0.1, upper=0.1, map_error=0.02),
            "b1_relative": Auxiliary(lower=0.9, upper=1.1, map_error_relative=0.03),
        },
    }
)
