"""Semisolid MT of the mouse brain at 7 T: CW saturation at 6-14 ppm, SE-EPI with a 90 degree readout.

Vladimirov et al., Nat. Protoc. 2025, doi 10.1038/s41596-025-01152-w. The semisolid pool is a Lorentzian of T2 = 40 us at the
water frequency, standing in for a super-Lorentzian of 10 us (it fits the published mouse at 2.5 %, the publishers' 10 us at 6 %).

No B1 map came with the published scans. Far from water, a true B1 of x times the nominal one reads as x^2 f and k / x^2, to 0.3 % of M0 in all
images: unknown within 10 % it alone leaves f a half-width of a quarter. The target for f is what steering can meet so; with a B1 map ask for less.
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

B1_UT = (2, 2, 1.7, 1.5, 1.2, 1.2, 3, 0.5, 3, 1, 2.2, 3.2, 1.5, 0.7, 1.5, 2.2, 2.5, 1.2, 3, 0.2, 1.5, 2.5, 0.7, 4, 3.2, 3.5, 1.5, 2.7,
         0.7, 0.5)  # fmt: skip
OFFSET_PPM = (8, 6, 6, 10, 10, 10, 8, 6, 8, 14, 14, 10, 6, 10, 8, 6, 8, 10, 14, 14, 6, 8, 14, 6, 14, 14, 14, 8, 10, 8)

SCAN = Scan(
    name="mt-mouse-7T-30",
    description="Mouse brain, 7 T, semisolid MT, 30 CW images at 6-14 ppm, no unsaturated image, T1 and T2 maps",
    field_t=7.0,
    matrix=(64, 64, 1),
    pools=(Pool(name="semisolid", kind="semisolid", offset_ppm=0.0, f="fss", k_per_s="kssw", t2_s=40e-6),),
    parameters={
        "fss": Parameter(lower=0.0, upper=0.30, prior="beta", target_halfwidth_relative=0.35),
        "kssw": Parameter(lower=0.0, upper=70.0, prior="beta", target_halfwidth_relative=0.5),
    },
    schedule=tuple(
        SaturationBlock(b1_ut=b1, offset_ppm=offset, t_sat_s=2.5, t_rec_s=1.0) for b1, offset in zip(B1_UT, OFFSET_PPM, strict=True)
    ),
    readout=Readout(flip_deg=90.0),
    first_state=FirstState(mz=1.0),
    auxiliaries={
        "t1_s": Auxiliary(lower=1.0, upper=2.8, map_error_relative=0.03),
        "t2_s": Auxiliary(lower=0.025, upper=0.15, map_error_relative=0.05),
        "b0_ppm": Auxiliary(lower=0.0, upper=0.0, map_error=0.02),
        "b1_relative": Auxiliary(lower=0.9, upper=1.1, map_error_relative=0.03),
    },
    noise=Noise(discrepancy=0.0125),  # what the two-pool model leaves on published mice beyond the noise, in M0
    stop=Stop(),
    limits=Limits(
        b1_max_ut=6.0,
        offset_ppm=Range(lower=6.0, upper=14.0),
        t_sat_s=Range(lower=0.5, upper=3.0),
        t_rec_s=Range(lower=1.0, upper=15.0),
        duty_cycle_max=0.8,
        b1rms_10s_ut=4.0,
        b1rms_6min_ut=3.0,
    ),
)

UNSATURATED = SaturationBlock(b1_ut=0.0, offset_ppm=8.0, t_sat_s=2.5, t_rec_s=12.5)
"""The reference image of the 31-image protocols, after 15 s of recovery in all."""

WITH_REFERENCE = Scan.model_validate(
    SCAN.model_dump()
    | {
        "name": "mt-mouse-7T",
        "description": "Mouse brain, 7 T, semisolid MT, unsaturated image (TR 15 s) + 30 CW images at 6-14 ppm, T1 and T2 maps",
        "schedule": (UNSATURATED, *SCAN.schedule),
    }
)
