"""Tissue: water and the pools that exchange with it."""

from __future__ import annotations

from typing import Literal

import equinox as eqx
from jaxtyping import Array, Float

Lineshape = Literal["bloch", "lorentzian", "super-lorentzian"]


class Pool(eqx.Module):
    """Protons that exchange with water. All leaves have the shape of the tissue, e.g. (cells,), or broadcast with it."""

    f: Float[Array, "..."]
    """Volume fraction relative to water."""
    k: Float[Array, "..."]
    """Exchange rate pool -> water [1/s]; water -> pool is k f."""
    t1: Float[Array, "..."]
    """Longitudinal relaxation time [s]."""
    t2: Float[Array, "..."]
    """Transverse relaxation time [s]."""
    offset_hz: Float[Array, "..."]
    """Chemical shift from water [Hz], positive on the amide side."""
    lineshape: Lineshape = eqx.field(static=True, default="bloch")
    """`bloch`: x-y-z magnetisation; the others: z only, absorbing with that lineshape."""
    cutoff_hz: float = eqx.field(static=True, default=0.0)
    """Super-Lorentzian only: closer to resonance than this [Hz] the line, which diverges there, is bridged (one ppm of the field)."""


class Tissue(eqx.Module):
    """Water, its pools, and the fields they see. All leaves have one shape, e.g. (cells,), or broadcast with it."""

    t1: Float[Array, "..."]
    """T1 of water [s]."""
    t2: Float[Array, "..."]
    """T2 of water [s]."""
    pools: tuple[Pool, ...]
    b0_hz: Float[Array, "..."]
    """Shift of every pool's resonance [Hz]: a pulse played at offset x is seen at x - b0_hz from water."""
    b1: Float[Array, "..."]
    """True over nominal RF amplitude."""
    dephases: bool = eqx.field(static=True, default=False)
    """B0 differs so much within a cell (a voxel) that under a long pulse, far from water's resonance, precession about the effective field averages
    out: see `core.signal`."""
