"""Large batches in slices that stay in cache and bound the memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

Cells = TypeVar("Cells")
Result = TypeVar("Result")


def mapped(function: Callable[[Cells], Result], cells: Cells, at_most: int) -> Result:
    """`function` over slices of the last axis of about `at_most` cells, one after the other.

    `function` must treat the cells alike, whatever their number; all leaves of `cells` share the last axis.
    """
    count = jax.tree.leaves(cells)[0].shape[-1]
    n_slices = -(-count // at_most)
    size = -(-count // n_slices)

    def split(leaf):
        rest = jnp.broadcast_to(leaf[..., -1:], (*leaf.shape[:-1], n_slices * size - count))
        padded = jnp.concatenate([leaf, rest], axis=-1)
        return jnp.moveaxis(padded.reshape((*leaf.shape[:-1], n_slices, size)), -2, 0)

    def join(leaf):
        leaf = jnp.moveaxis(leaf, 0, -2)
        return leaf.reshape((*leaf.shape[:-2], n_slices * size))[..., :count]

    return function(cells) if n_slices == 1 else jax.tree.map(join, lax.map(function, jax.tree.map(split, cells)))
