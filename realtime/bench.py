"""Will this machine keep up? Speeds of the parts that must answer before the next repetition, measured one after the other."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scansteer.core import lattice, nuisance, voxel_columns
from scansteer.core import signal as spin
from scansteer.core.noise import NoiseEstimate
from scansteer.core.saturation import Saturation, Train
from scansteer.core.spread import over_cores
from scansteer.core.tissue import Tissue
from scansteer.protocols import forward, tissue_model
from scansteer.protocols.scan import Scan, bounds
from scansteer.realtime import encoder_file
from scansteer.realtime.encoded import engine_maker, map_error
from scansteer.realtime.encoder_file import Trained
from scansteer.realtime.images import Frame, Geometry
from scansteer.realtime.session import AUXILIARIES, Session, to_scan_unit
from scansteer.realtime.volume import Volume
from scansteer.realtime.worker import Setup

N_VOXELS = 2000
N_VOLUME = 169_000
"""Voxels of the published volume."""
BRIGHTNESS, NOISE = 1000.0, 0.01
"""Of M0 [pixel units], and of one pixel [M0]."""
N_GRID = 100
"""Side of the grid of (f, k) whose dictionary is timed: 10^4 points, as published."""


def bench(scan: Scan, tell: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Time dictionary, decisions and a matrix product.

    Of `n_candidates` pulses that the scan's limits offer, `n_weighed` are weighed after every image: the others are set aside before the scan,
    for the likelihood does not describe them (`protocols.prospect`).
    """
    tell("dictionary")
    speed = dictionary_signals_per_s(scan)
    tell("decisions of the reference")
    latencies, (n_candidates, n_weighed) = decision_latencies_ms(scan, "none")
    tell("decisions with the encoder")
    with_encoder = None if encoder_file.shipped(scan) is None else percentiles(decision_latencies_ms(scan, None)[0])
    tell("encoder")
    volume_s = encoder_volume_s(scan)
    tell("matrix product")
    return {
        "dictionary_signals_per_s": speed,
        "update_decide_ms": percentiles(latencies),
        "update_decide_encoder_ms": with_encoder,
        "encoder_volume_s": volume_s,
        "n_voxels": N_VOXELS,
        "n_candidates": n_candidates,
        "n_weighed": n_weighed,
        "matmul_gflops": matmul_gflops(),
        "repetition_ms": 1e3 * min(block.duration_s for block in scan.schedule),
    }


class Dictionary(NamedTuple):
    """All images of a scan at every point of a grid of (f, k): what is simulated, and from what."""

    tissue: Tissue
    """Leaves of shape (point,)."""
    start: jax.Array
    """Mz before the first block: equilibrium."""
    pulses: Saturation
    """One entry per distinct block of the schedule."""
    readout: spin.Readout
    order: jax.Array
    """Place in `pulses` of each image's block."""
    train: Train

    def simulate(self, n_cores: int) -> jax.Array:
        """Signals, shape (image, point)."""
        return over_cores(_signals, (self.tissue, self.start), self.pulses, self.readout, self.order, self.train, n_cores=n_cores)


def dictionary(scan: Scan, n_side: int = N_GRID) -> Dictionary:
    """The scan's schedule on `n_side` x `n_side` points over its box; all else at the centre of its range."""
    sides = (np.linspace(each.lower, each.upper, n_side) for each in scan.parameters.values())
    grid = np.meshgrid(*sides, indexing="ij")
    values = {name: jnp.asarray(each.reshape(-1)) for name, each in zip(scan.parameter_names, grid, strict=True)}
    tissue = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (n_side**2,)), tissue_model.tissue(scan, values, voxels=True))
    distinct = list(dict.fromkeys(scan.schedule))
    pulses = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(tissue_model.saturation(scan, block) for block in distinct))
    order = jnp.asarray([distinct.index(block) for block in scan.schedule])
    return Dictionary(tissue, spin.equilibrium(tissue), pulses, tissue_model.readout(scan), order, tissue_model.train(scan))


@partial(jax.jit, static_argnames="train")
def _signals(cells, pulses, readout, order, train):
    tissue, start = cells
    return spin.signals(tissue, pulses, train, readout, start, order)


def dictionary_signals_per_s(scan: Scan) -> float:
    """Whole-schedule signals of 10^4 grid points per second on all cores, compilation apart."""
    work, n_cores = dictionary(scan), os.cpu_count() or 1
    return N_GRID**2 / _best(lambda: work.simulate(n_cores), n=7)


def decision_latencies_ms(scan: Scan, encoder: str | None) -> tuple[list[float], tuple[int, int]]:
    """Latency of every decision of a simulated scan of `N_VOXELS` voxels, and the numbers of pulses as in `Advisor.n_candidates`.

    Parameters
    ----------
    encoder
        As in `realtime.encoded.engine_maker`; the maps that a shipped one was trained with are given.
    """
    side = math.isqrt(N_VOXELS - 1) + 1
    signals = np.asarray(dictionary(scan, side).simulate(os.cpu_count() or 1))[:, :N_VOXELS]
    noisy = BRIGHTNESS * (signals + NOISE * np.random.default_rng(0).normal(size=signals.shape))
    geometry = Geometry((50, N_VOXELS // 50, 1))
    trained = encoder_file.shipped(scan) if encoder is None else None
    session = Session(
        Setup(
            "bench",
            scan.model_copy(update={"matrix": None}),
            region=Frame(np.ones(geometry.shape), geometry, role="mask"),
            auxiliaries={} if trained is None else _level_maps(scan, trained.mapped, geometry),
        ),
        make_engine=engine_maker(encoder),
    )
    images = [Frame(image.reshape(geometry.shape), geometry, repetition=number) for number, image in enumerate(noisy)]
    latencies = [session.absorb(image, received_at=time.perf_counter()).latency_ms.total for image in images]
    session.close()
    return latencies, session.n_candidates


def _level_maps(scan: Scan, names: Sequence[str], geometry: Geometry) -> dict[str, Frame]:
    """Maps that say the same everywhere: the centre of each quantity's range."""
    maps = {}
    for role, name in AUXILIARIES.items():
        if name in names:
            span = scan.auxiliaries[name]  # type: ignore[index]
            centre = 0.5 * (span.lower + span.upper) / to_scan_unit(role, scan.larmor_hz_per_ppm)
            maps[role] = Frame(np.full(geometry.shape, centre), geometry, role=role)  # type: ignore[arg-type]
    return maps


def encoder_volume_s(scan: Scan, n_voxels: int = N_VOLUME) -> float | None:
    """Time to absorb one image of a whole volume and to summarise every voxel; none if no encoder is shipped for the scan."""
    trained = encoder_file.shipped(scan)
    return None if trained is None else min(volume_times_s(scan, trained, n_voxels))


def volume_times_s(scan: Scan, trained: Trained, n_voxels: int, n_images: int = 4) -> list[float]:
    """Of some made-up images, the first left out: its memory is fresh."""
    axes = (*forward.chain_axes(scan), *forward.tissue_axes(scan))
    columns = voxel_columns.make(axes, trained.mapped, nuisance.of_range(*bounds(scan.readout.offset)))
    volume = Volume(trained.encoder, columns, scan.noise.discrepancy)
    rng, spans = np.random.default_rng(0), {axis.name: axis for axis in axes}
    maps = {name: rng.uniform(spans[name].lower, spans[name].upper, n_voxels) for name in trained.mapped}
    errors = {name: map_error(scan, name, values) for name, values in maps.items()}
    volume.begin(voxel_columns.rows_of_voxels(columns, maps, errors), n_voxels)
    nodes = int(np.prod([axis.n_nodes for axis in axes], dtype=int)) + 1
    times = []
    for _ in range(n_images):
        expected, signal = rng.uniform(0.4, 0.8, (nodes, lattice.N_NODES**2)), rng.uniform(400.0, 800.0, n_voxels)
        started = time.perf_counter()
        volume.absorb(expected, signal, NoiseEstimate(10.0, 100.0))
        times.append(time.perf_counter() - started)
    volume.close()
    return times[1:]


def percentiles(latencies_ms: Sequence[float]) -> dict[str, float]:
    """Median and worst of a hundred."""
    return {"p50": float(np.percentile(latencies_ms, 50)), "p99": float(np.percentile(latencies_ms, 99))}


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
