import jax.numpy as jnp
import numpy as np

from scansteer.core import lattice
from scansteer.core.lattice import Box

BOX = Box(jnp.array([0.001, 5.0]), jnp.array([0.3, 70.0]), (64, 48))


def test_position_is_the_inverse_of_value_and_slope_its_derivative():
    x = jnp.linspace(0.5, 46.5, 30)
    for axis in (0, 1):
        np.testing.assert_allclose(BOX.position(axis, BOX.value(axis, x)), x, rtol=1e-9)
        h = 1e-4
        by_difference = (BOX.value(axis, x + h) - BOX.value(axis, x - h)) / (2 * h)
        np.testing.assert_allclose(BOX.slope(axis, x), by_difference, rtol=1e-6)
    assert BOX.value(0, jnp.array(63.0)) == 0.3


def test_upsampling_meets_a_smooth_saturation_curve():
    f, k = (lattice.node_values(float(low), float(high)) for low, high in zip(BOX.lower, BOX.upper, strict=True))

    def signal(f, k):
        return 1 / (1 + 20 * f[:, None] * k[None] / (1 + 0.1 * k[None]))

    got = lattice.upsample(jnp.asarray(signal(f, k).reshape(1, -1)), BOX.n_points)
    points = [np.array(BOX.value(axis, jnp.arange(n, dtype=float))) for axis, n in enumerate(BOX.n_points)]
    np.testing.assert_allclose(np.array(got).reshape(BOX.n_points), signal(*points), atol=3e-5)
