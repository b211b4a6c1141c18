"""One computation on several cores, cells split between them.

XLA runs the body of a loop on one thread; chunks in cache are worth more than threads, so the other cores come from here.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

import jax
import jax.numpy as jnp

Result = TypeVar("Result")


def over_cores(function: Callable[..., Result], cells, *shared, n_cores: int) -> Result:
    """`function(cells, *shared)`, each core taking a slice of the cells.

    Parameters
    ----------
    function
        Jitted; treats the cells alike, whatever their number, and holds no batched LAPACK call (two at once never return on a CPU). Leaves of
        its result end in the cell axis.
    cells
        Leaves of shape (..., cell) with one number of cells.
    shared
        Passed on as they are.
    n_cores
        Slices, one thread each. Not to be called inside `jax.jit`.
    """
    count = jax.tree.leaves(cells)[0].shape[-1]
    parts = max(1, min(n_cores, count))
    if parts == 1:
        return function(cells, *shared)
    bounds = [count * part // parts for part in range(parts + 1)]
    slices = [jax.tree.map(lambda leaf: leaf[..., start:stop], cells) for start, stop in pairwise(bounds)]  # noqa: B023
    with ThreadPoolExecutor(parts) as threads:
        results = list(threads.map(lambda own: jax.block_until_ready(function(own, *shared)), slices))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), *results)
