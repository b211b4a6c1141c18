"""Will this machine keep up? Speeds of the parts that must answer before the next repetition, measured one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scansteer.core import signal as spin
from scansteer.protocols import tissue_model
from scansteer.protocols.scan import Scan
from scansteer.realtime.images import Frame, Geometry
from scansteer.realtime.session import Session
from scansteer.realtime.worker import Setup

N_VOXELS = 2000
N_GRID = 100
"""Side of the grid of (f, k) whose dictionary is timed: 10^4 points, as published."""


def bench(scan: Scan, tell: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Time dictionary, decisions and a matrix product; keys as in the documentation of `scansteer bench`."""
    tell("dictionary")
    speed = dictionary_signals_per_s(scan)
    tell("decisions")
    latencies, n_candidates = decision_latencies_ms(scan)
    tell("matrix product")
    return {
        "dictionary_signals_per_s": speed,
        "update_decide_ms": {"p50": float(np.percentile(latencies, 50)), "p99": float(np.percentile(latencies, 99))},
        "encoder_volume_s": None,
        "n_voxels": N_VOXELS,
        "n_candidates": n_candidates,
        "matmul_gflops": matmul_gflops(),
        "repetition_ms": 1e3 * min(block.duration_s for block in scan.schedule),
    }


def dictionary_signals_per_s(scan: Scan) -> float:
    """Whole-schedule signals of 10^4 grid points per second, compilation apart."""
    f, k = (np.linspace(each.lower, each.upper, N_GRID) for each in scan.parameters.values())
    values = dict(zip(scan.parameter_names, (each.reshape(-1) for each in np.meshgrid(f, k, indexing="ij")), strict=True))
    tissue = tissue_model.tissue(scan, {name: jnp.asarray(value) for name, value in values.items()})
    distinct = list(dict.fromkeys(scan.schedule))
    index = jnp.asarray([distinct.index(block) for block in scan.schedule])
    pulses = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(tissue_model.saturation(scan, block) for block in distinct))
    train, readout, start = tissue_model.train(scan), tissue_model.readout(scan), spin.equilibrium(tissue)
    simulate = jax.jit(lambda start: spin.signals(tissue, pulses, train, readout, start, index))
    return N_GRID**2 / _best(lambda: simulate(start))


def decision_latencies_ms(scan: Scan) -> tuple[list[float], int]:
    """Latency of every decision of a made-up scan of `N_VOXELS` voxels, and the number of candidate pulses weighed each time."""
    geometry = Geometry((50, N_VOXELS // 50, 1))
    rng = np.random.default_rng(0)
    region = Frame(np.ones(geometry.shape), geometry, role="mask")
    session = Session(Setup("bench", scan.model_copy(update={"matrix": None}), region=region))
    made_up = [Frame(rng.normal(1000.0, 20.0, geometry.shape), geometry, repetition=number) for number in range(len(scan.schedule))]
    latencies = [session.absorb(frame, received_at=time.perf_counter()).latency_ms.total for frame in made_up]
    session.close()
    return latencies, session.n_candidates


def matmul_gflops() -> float:
    """float32 product of 4096 x 256 with 256 x 256, the yardstick of the encoder."""
    a, b = jnp.ones((4096, 256), jnp.float32), jnp.ones((256, 256), jnp.float32)
    product = jax.jit(lambda a, b: a @ b)
    return 2 * 4096 * 256 * 256 / _best(lambda: product(a, b), n=20) / 1e9


def _best(run: Callable[[], Any], n: int = 3) -> float:
    """Shortest of a few runs [s], after one that compiles."""
    jax.block_until_ready(run())
    times = []
    for _ in range(n):
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return min(times)
