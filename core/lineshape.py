"""How strongly a semisolid pool without transverse magnetisation absorbs RF."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

N_ORIENTATIONS = 101
ORIENTATION_STEP = 0.01
BRIDGE_TANGENT = 30.0


def lorentzian(offset: Float[Array, "..."], t2: Float[Array, "..."]) -> Float[Array, "..."]:
    """Absorption line pi g(offset) [s] of a Lorentzian: T2 / (1 + (offset T2)^2).

    The saturation rate is this times the squared RF amplitude [rad/s].

    Parameters
    ----------
    offset
        RF frequency minus the pool's resonance [rad/s].
    t2
        Transverse relaxation time of the pool [s].
    """
    return t2 / (1 + (offset * t2) ** 2)


def super_lorentzian(offset: Float[Array, "..."], t2: Float[Array, "..."], cutoff: Float[Array, "..."]) -> Float[Array, "..."]:
    """Absorption line pi g(offset) [s] of a super-Lorentzian: dipolar lines averaged over the orientation of their axis.

    pi g = pi sqrt(2/pi) sum_u du T2 / |3 u^2 - 1| exp(-2 (offset T2 / |3 u^2 - 1|)^2), u = 0, 0.01, .. 1. The average diverges
    at resonance; closer than `cutoff` a cubic Hermite spline bridges the gap. Sum, spline and its tangents are those of
    pulseq-cest, so that models written for it mean the same here.

    Parameters
    ----------
    offset
        RF frequency minus the pool's resonance [rad/s].
    t2
        Transverse relaxation time of the pool [s].
    cutoff
        Half-width of the bridged gap [rad/s]; pulseq-cest takes one ppm of the field.

    References
    ----------
    Morrison C, Henkelman RM. Magn Reson Med 33 (1995), doi:10.1002/mrm.1910330404.
    Herz K et al. Pulseq-CEST. Magn Reson Med 86 (2021), doi:10.1002/mrm.28825.
    """
    inside = jnp.abs(offset) < cutoff
    safe = jnp.where(inside, cutoff, offset)
    return jnp.where(inside, _bridge(offset, t2, cutoff), _orientation_sum(safe, t2))


def _orientation_sum(offset, t2):
    u = ORIENTATION_STEP * np.arange(N_ORIENTATIONS)
    weight = np.abs(3 * u**2 - 1)
    ratio = (offset * t2)[..., None] / weight.reshape((1,) * jnp.ndim(offset * t2) + (-1,))
    lines = jnp.exp(-2 * ratio**2) / weight.reshape((1,) * jnp.ndim(offset * t2) + (-1,))
    return np.pi * ORIENTATION_STEP * np.sqrt(2 / np.pi) * t2 * lines.sum(-1)


def _bridge(offset, t2, cutoff):
    outer, inner = _orientation_sum(cutoff + 300.0, t2), _orientation_sum(cutoff + 100.0, t2)
    place = jnp.abs((offset + cutoff + 101.0) / (2 * cutoff + 201.0))
    tangent = BRIDGE_TANGENT * (inner - outer)  # the line is even: rising on the left, falling on the right
    rise = place**3 - 2 * place**2 + place
    fall = place**3 - place**2
    return inner + tangent * (rise - fall)
