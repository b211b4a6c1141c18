"""From a `Scan` (ppm, microtesla, degrees) to what the spin physics takes (hertz, tesla, radians)."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from scansteer.core import saturation as core_saturation
from scansteer.core import signal as core_signal
from scansteer.core import tissue as core_tissue
from scansteer.protocols import scan as description
from scansteer.protocols.scan import Range, SaturationBlock, Scan

WITHOUT_MAP = {"b0_ppm": 0.0, "b1_relative": 1.0}
"""Auxiliaries that a scan may leave out, and what is then meant."""


def centre(value: float | Range) -> float:
    """A number, or the centre of its range."""
    return 0.5 * sum(description.bounds(value))


def pool_t2_name(pool: description.Pool) -> str:
    """Name under which `tissue` takes the T2 of a pool."""
    return f"{pool.name}_t2_s"


def tissue(scan: Scan, values: Mapping[str, Float[Array, "..."]], *, voxels: bool = False) -> core_tissue.Tissue:
    """The scan's tissue with the given values.

    Parameters
    ----------
    values
        By name: the scan's parameters and auxiliaries (t1_s, t2_s, b0_ppm, b1_relative, fss, kssw; units in the names), and
        "<pool>_t2_s" for the T2 of a pool. Shapes (*cell,), or broadcasting. What is missing is the centre of its range.
    voxels
        Cells are voxels, in which precession dephases (`core.signal`), and not spins.
    """

    def value(name: str):
        if name in values:
            return jnp.asarray(values[name], float)
        known = {**scan.parameters, **scan.auxiliaries}
        return jnp.asarray(known[name].centre if name in known else WITHOUT_MAP[name], float)

    def resolve(number: float | str):
        return value(number) if isinstance(number, str) else jnp.asarray(number, float)

    hz, t1 = scan.larmor_hz_per_ppm, value("t1_s")
    pools = tuple(
        core_tissue.Pool(
            f=resolve(pool.f),
            k=resolve(pool.k_per_s),
            t1=t1 if pool.t1_s is None else jnp.asarray(pool.t1_s, float),
            t2=jnp.asarray(values.get(pool_t2_name(pool), centre(pool.t2_s)), float),
            offset_hz=jnp.asarray(pool.offset_ppm * hz, float),
            lineshape=pool.lineshape,
            cutoff_hz=hz,
        )
        for pool in scan.pools
    )
    return core_tissue.Tissue(t1=t1, t2=value("t2_s"), pools=pools, b0_hz=value("b0_ppm") * hz, b1=value("b1_relative"), dephases=voxels)


def saturation(scan: Scan, block: SaturationBlock) -> core_saturation.Saturation:
    """One block in SI units."""
    fields = (block.b1_ut * 1e-6, block.offset_ppm * scan.larmor_hz_per_ppm, block.t_sat_s, block.t_rec_s)
    return core_saturation.Saturation(*(jnp.asarray(field, float) for field in fields))


def train(scan: Scan) -> core_saturation.Train:
    """How the scan fills its saturation time with RF."""
    return core_saturation.Train(**scan.train.model_dump())


def readout(scan: Scan, carry_over: Float[Array, "..."] | float | None = None) -> core_signal.Readout:
    """The scan's readout.

    Parameters
    ----------
    carry_over
        Share of Mz that the readout leaves, scalar or per cell; none: the scan's (the centre of its range, or by the flips).
    """
    described = scan.readout
    if carry_over is None and described.carry_over is not None:
        carry_over = centre(described.carry_over)
    return core_signal.Readout(
        flip_angle=jnp.deg2rad(jnp.asarray(described.flip_deg, float)),
        shot_spacing=jnp.asarray(described.shot_spacing_s, float),
        carry_over=None if carry_over is None else jnp.asarray(carry_over, float),
        n_shots=described.n_shots,
        encoded_shot=described.encoded_shot,
    )
