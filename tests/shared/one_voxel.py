"""A question about the next pulse, of one voxel at one draw of its posterior."""

import jax.numpy as jnp
import numpy as np

from scansteer.core.design import Question


def question(columns, signals, sigma, weights, dof=1e6) -> Question:
    """Images' columns, shape (image, column), what they read, noise [pixel units], and weights of the columns, shape (column, node)."""
    return Question(
        weights=weights[None, None],
        gram=(columns.T @ columns)[None, None, None],
        projection=(columns.T @ signals)[None, None, None],
        energy=np.array([signals @ signals]),
        n_images=jnp.asarray(float(len(signals))),
        shift=np.zeros((1, columns.shape[1] - 1)),
        draw_weights=np.ones((1, 1)),
        mean_weights=np.ones((1, 1)),
        contrast=np.zeros((1, 1, 1)),
        importance=np.ones(1),
        variance=jnp.asarray(sigma**2),
        dof=jnp.asarray(dof),
        discrepancy=jnp.asarray(0.0),
    )


def between(cell: Question, neighbour: Question, mean_weights) -> Question:
    """Two questions as one of a narrow posterior, whose mean lies between the first's cell and the second's, by weights of shape (1, 2)."""
    both = {name: np.concatenate([getattr(cell, name), getattr(neighbour, name)], axis=1) for name in ("gram", "projection")}
    weights = {"draw_weights": np.array([[1.0, 0.0]]), "mean_weights": mean_weights, "contrast": np.zeros((1, 1, 2))}
    return Question(**{**vars(cell), **both, **weights})
