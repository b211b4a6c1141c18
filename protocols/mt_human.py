"""Semisolid MT of the human brain at 3 T: trains of spin-lock pulses at 6-14 ppm, 3D EPI snapshot readout.

Vladimirov et al., Nat. Protoc. 2025, doi 10.1038/s41596-025-01152-w: 13 pulses of 100 ms at a duty cycle of 50 %, then 45 shots of 15 degrees
every 28.37 ms. The schedule is that of the mouse scan. Ranges of T1 and T2 cover white and grey matter at 3 T (Stanisz GJ et al., Magn Reson
Med 54 (2005), doi:10.1002/mrm.20605).
"""

from typing import Literal

from scansteer.protocols import mt_mouse
from scansteer.protocols.scan import Auxiliary, FirstState, Limits, Noise, Parameter, Pool, Range, Readout, Scan, Stop, Train

AuxiliaryName = Literal["t1_s", "t2_s", "b0_ppm", "b1_relative", "fss", "kssw"]
TRAIN = Train(n_pulses=13, duty_cycle=0.5, spin_lock=True)
READOUT = Readout(flip_deg=15.0, n_shots=45, shot_spacing_s=0.02837)
SEMISOLID = Pool(name="semisolid", kind="semisolid", offset_ppm=0.0, f="fss", k_per_s="kssw", t2_s=40e-6, lineshape="lorentzian")
"""Absorbs like an x-y-z pool of this T2 (to a thousandth), whose transverse part does not live to be seen; shared with the amide scans."""
AUXILIARIES: dict[AuxiliaryName, Auxiliary] = {
    "t1_s": Auxiliary(lower=0.7, upper=2.0, map_error_relative=0.03),
    "t2_s": Auxiliary(lower=0.04, upper=0.15, map_error_relative=0.05),
    "b0_ppm": Auxiliary(lower=-0.3, upper=0.3, map_error=0.03),
    "b1_relative": Auxiliary(lower=0.7, upper=1.3, map_error_relative=0.03),
}
LIMITS = Limits(
    b1_max_ut=4.0,
    offset_ppm=Range(lower=6.0, upper=14.0),
    t_sat_s=Range(lower=2.5, upper=2.5),
    t_rec_s=Range(lower=1.0, upper=15.0),
    duty_cycle_max=0.4,
    b1rms_10s_ut=2.5,
    b1rms_6min_ut=2.0,
)

SCAN = Scan(
    name="mt-human-3T",
    description="Human brain, 3 T, semisolid MT, unsaturated image + 30 spin-lock trains at 6-14 ppm, 3D EPI snapshots",
    field_t=3.0,
    pools=(SEMISOLID,),
    parameters={"fss": Parameter(lower=0.0, upper=0.30), "kssw": Parameter(lower=0.0, upper=70.0, target_halfwidth_relative=0.5)},
    schedule=mt_mouse.WITH_REFERENCE.schedule,
    train=TRAIN,
    readout=READOUT,
    first_state=FirstState(mz=1.0),
    auxiliaries=AUXILIARIES,
    noise=Noise(),
    stop=Stop(),
    limits=LIMITS,
)
