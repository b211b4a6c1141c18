"""Small matrices are whitened as LAPACK would, without LAPACK."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scansteer.core import design
from scansteer.core.whitening import log_determinant, whiten


@pytest.mark.parametrize("size", [1, 2, 9, 31])
def test_whitener_is_the_inverse_of_the_cholesky_factor(size):
    root = np.random.default_rng(0).normal(size=(7, 3, size, size))
    matrix = root @ np.swapaxes(root, -1, -2) + np.eye(size)
    whitener = whiten(jnp.asarray(matrix))
    np.testing.assert_allclose(whitener, np.linalg.inv(np.linalg.cholesky(matrix)), rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(log_determinant(whitener), np.linalg.slogdet(matrix)[1], rtol=1e-10, atol=1e-10)


def test_choice_of_the_next_pulse_calls_no_lapack():
    """Two batched LAPACK calls at once never return on two cores (jaxlib 0.10.2)."""
    n, k, i = 2, 5, 4
    given = design.Conditional(jnp.ones((n, k, 3)), jnp.ones((n, k, 3, 2)), jnp.ones((n, k)))
    read = (jnp.ones((n, k, i)), [jnp.ones((n, k, i))] * 2)
    program = jax.make_jaxpr(design.joint_gain)(read, jnp.ones(i), given, jnp.ones((n, k)), jnp.ones((n, 2, k)))
    assert not [word for word in ("cholesky", "lu ", "triangular_solve") if word in str(program)]
