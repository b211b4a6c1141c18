"""Encoder speed: one image of a whole volume, updated and summarised, against the machine's own matrix product in the same run.

    python benchmarks/encoder.py [SCAN] [N_VOXELS]

Made-up signals; nothing about accuracy. The parts are timed one by one as well, on one block.
"""

from __future__ import annotations

import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from scansteer.core import encoder as encoders
from scansteer.core import gaussian_region, voxel_columns
from scansteer.core.likelihood import Noise
from scansteer.core.noise import NoiseEstimate
from scansteer.protocols import forward
from scansteer.protocols.scan import bounds, load
from scansteer.realtime import encoder_file
from scansteer.realtime.encoded import BLOCK, Volume, answer, map_error


def main(name: str = "mt-mouse-7T-30", n_voxels: int = 169_000) -> None:
    """Print one line per measurement."""
    scan = load(name)
    trained = encoder_file.shipped(scan)
    if trained is None:
        raise SystemExit(f"no encoder is shipped for {name}")
    axes = (*forward.chain_axes(scan), *forward.tissue_axes(scan))
    lower, upper = bounds(scan.readout.offset)
    columns = voxel_columns.make(axes, trained.mapped, (0.5 * (lower + upper), (upper - lower) / 12**0.5))
    started = time.perf_counter()
    volume = Volume(trained.encoder, columns, scan.noise.discrepancy)
    print(f"{name}: {sum(trained.encoder.basis.ranks)} functions, {len(jax.devices())} {jax.devices()[0].platform} device(s), jax {jax.__version__}")
    print(f"compile {time.perf_counter() - started:.1f} s")
    rng = np.random.default_rng(0)
    spans = {axis.name: axis for axis in axes}
    maps = {each: rng.uniform(spans[each].lower, spans[each].upper, n_voxels) for each in trained.mapped}
    volume.begin(voxel_columns.of_voxels(columns, maps, {each: map_error(scan, each, values) for each, values in maps.items()}), n_voxels)
    nodes = int(np.prod([axis.n_nodes for axis in axes], dtype=int)) + 1
    for _ in range(4):
        expected, signal = rng.uniform(0.4, 0.8, (nodes, 400)), rng.uniform(400.0, 800.0, n_voxels)
        rate = matrix_rate()
        started = time.perf_counter()
        volume.absorb(expected, signal, NoiseEstimate(10.0, 100.0))
        print(f"update and summary of {n_voxels} voxels {time.perf_counter() - started:.2f} s; 4096x256x256 at {rate:.0f} GFLOP/s")
    parts(trained.encoder, scan.noise.discrepancy, bool(trained.mapped), n_voxels, rng)
    volume.close()


def matrix_rate() -> float:
    """GFLOP/s of a float32 product of 4096x256 by 256x256."""
    a, b = jnp.ones((4096, 256), jnp.float32), jnp.ones((256, 256), jnp.float32)
    product = jax.jit(jnp.matmul)
    seconds = best(lambda: product(a, b))
    return 2 * 4096 * 256 * 256 / seconds / 1e9


def parts(encoder: encoders.Encoder, discrepancy: float, mapped: bool, n_voxels: int, rng: np.random.Generator) -> None:
    """Each stage on one block, scaled to the volume on one core's worth of blocks."""
    plan, size = encoders.plan(encoder), sum(encoder.basis.ranks)
    state = encoders.init(BLOCK, BLOCK if mapped else 1, size)
    for _ in range(5):
        coefficients = rng.normal(size=(BLOCK if mapped else 1, size)) * 0.2 + np.eye(size)[0] * 5
        state = encoders.update(state, jnp.asarray(coefficients), jnp.asarray(rng.uniform(0.4, 0.8, BLOCK)))
    noise = Noise(jnp.asarray(0.01), jnp.asarray(100.0), jnp.asarray(discrepancy))
    z = jnp.asarray(rng.normal(size=(BLOCK, 9, 2)), jnp.float32)
    expansion = eqx.filter_jit(encoders.expand)(encoder, plan, state, z[:, 0])
    posterior = encoders.Gaussian(z[:, 0], jnp.abs(jnp.concatenate([z[:, 0], z[:, 1, :1]], axis=1)) + 0.1)
    work = {
        "anchors": lambda: features(encoder, plan, state, noise),
        "likelihood at 9 points": lambda: evaluate(encoder, plan, expansion, noise, z),
        "posterior": lambda: infer(encoder, plan, state, noise),
        "regions": lambda: regions(posterior, posterior.mean, encoder.coordinate),
        "all": lambda: everything(encoder, plan, state, noise),
    }
    features, evaluate, infer = (eqx.filter_jit(each) for each in (encoders.anchor_features, encoders.evaluate, encoders.infer))
    regions, everything = eqx.filter_jit(gaussian_region.summarise), eqx.filter_jit(answer)
    for what, function in work.items():
        print(f"{what:24s} {1e3 * best(function):7.1f} ms per block of {BLOCK}, {best(function) * n_voxels / BLOCK:5.2f} s per volume")


def best(function, repeats: int = 5) -> float:
    """Shortest of a few runs [s], after one to warm up."""
    jax.block_until_ready(function())
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - started)
    return min(seconds)


if __name__ == "__main__":
    main(*sys.argv[1:2], *(int(each) for each in sys.argv[2:3]))
