"""Saturation blocks: what RF is played before a readout."""

from __future__ import annotations

from typing import Literal

import equinox as eqx
from jaxtyping import Array, Float


class Train(eqx.Module):
    """How the saturation time is filled with RF; static, one compilation each."""

    n_pulses: int = eqx.field(static=True, default=1)
    duty_cycle: float = eqx.field(static=True, default=1.0)
    """Pulse length over pulse spacing; there is no pause after the last pulse."""
    spin_lock: bool = eqx.field(static=True, default=False)
    """Tip water by atan(gamma B1 / offset) before each pulse, and back after it."""
    shape: Literal["block", "gauss"] = eqx.field(static=True, default="block")


class Saturation(eqx.Module):
    """One repetition's preparation: free recovery `t_rec`, then RF for `t_sat`. Scalars, all traced."""

    b1: Float[Array, ""]
    """Nominal amplitude [T]; for shaped pulses the continuous-wave equivalent (rms) amplitude of a pulse."""
    offset_hz: Float[Array, ""]
    """Offset from the nominal water frequency [Hz]."""
    t_sat: Float[Array, ""]
    """Start of the first to end of the last pulse [s]."""
    t_rec: Float[Array, ""]
    """Free recovery before the first pulse [s]."""
