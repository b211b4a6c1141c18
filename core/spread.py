"""One computation over all devices, cells split between them. A CPU counts as as many devices as `jax_num_cpu_devices` says (set at the edge).

XLA runs the body of a loop on one thread; chunks in cache are worth more than threads, so the second core comes from here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Result = TypeVar("Result")


def over_devices(function: Callable[..., Result], cells, *shared, devices: Sequence[Any] | None = None) -> Result:
    """`function(cells, *shared)`, each device taking a slice of the cells; the result lies on the first device.

    Parameters
    ----------
    function
        Jitted; treats the cells alike, whatever their number. Leaves of its result end in the cell axis.
    cells
        Leaves of shape (..., cell) with one number of cells.
    shared
        Passed on as they are.
    devices
        Default: all of the default backend. Not to be called inside `jax.jit`.
    """
    devices = jax.devices() if devices is None else devices
    count = jax.tree.leaves(cells)[0].shape[-1]
    parts = min(len(devices), count)
    if parts < 2:
        return function(cells, *shared)
    bounds = [count * part // parts for part in range(parts + 1)]
    results = []
    for device, start, stop in zip(devices, bounds[:-1], bounds[1:], strict=False):
        own = jax.device_put((jax.tree.map(lambda leaf: leaf[..., start:stop], cells), shared), device)  # noqa: B023
        results.append(function(own[0], *own[1]))  # returns at once; the devices run side by side
    gathered = jax.device_put(results, devices[0])
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), *gathered)
