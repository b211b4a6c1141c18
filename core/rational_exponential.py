"""exp(x) as a sum of simple poles, for evaluating exponentials of matrices through their resolvent.

exp(x) = 2 Re sum_j weight_j / (x - pole_j) to 9e-14 for real x <= 0, and, since both fall to zero, to 3e-10 wherever
Re x < -28. It is *not* exp for large imaginary parts near the axis: eigenvalues there need `remainder`.

Trefethen LN, Weideman JAC, Schmelzer T. Talbot quadratures and rational approximations. BIT 46 (2006),
doi:10.1007/s10543-006-0077-9 (their Caratheodory-Fejer approximant of degree 14, the half with positive imaginary part).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex

POLES = np.array([
    5.623158544960684 + 1.1940650089450893j,
    5.089360791674981 + 3.588811802922035j,
    3.99338484086075 + 6.00481087106402j,
    2.269797611406378 + 8.461707990927524j,
    -0.20874807842864476 + 10.991220724945983j,
    -3.703271155952258 + 13.65632362095924j,
    -8.89777661886301 + 16.630933425563992j,
])
WEIGHTS = np.array([
    -27.875883888575082-102.14852925423567j,
    46.93437269716732 + 45.64371009939153j,
    -23.49863709240672-5.807987039362784j,
    4.807132826299541-1.3211277783433177j,
    -0.37635127962839887 + 0.3352007410088586j,
    0.009438272779782424-0.017185308708013526j,
    -7.153555321737821e-05 + 0.00014361358453387734j,
])
SAFE_REAL_PART = -28.0
"""Left of it the sum is exp to 3e-10, whatever the imaginary part."""
FAR = 40.0
"""Poles end at |Im| = 17: eigenvalues with larger imaginary parts than this do not come near one."""
OUT_OF_REACH = 300.0
"""With an imaginary part larger than this the sum is below 1e-11."""


def remainder(x: Complex[Array, "..."]) -> Complex[Array, "..."]:
    """exp(x) minus the sum of poles: what an eigenvalue off the negative real axis still lacks."""
    def subtract(total, at):
        pole, weight = at
        return total - weight / (x - pole) - jnp.conj(weight) / (x - jnp.conj(pole)), None

    return lax.scan(subtract, jnp.exp(x), (jnp.asarray(POLES), jnp.asarray(WEIGHTS)))[0]
