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
from scansteer.core import gaussian_region
from scansteer.core.code_generation import for_blocks_of_voxels
from scansteer.core.likelihood import Noise
from scansteer.protocols.scan import load
from scansteer.realtime import bench, encoder_file
from scansteer.realtime.volume import BLOCK, answer


def main(name: str = "mt-mouse-7T-30", n_voxels: int = 169_000) -> None:
    """Print one line per measurement."""
    scan = load(name)
    trained = encoder_file.shipped(scan)
    if trained is None:
        raise SystemExit(f"no encoder is shipped for {name}")
    print(f"{name}: {sum(trained.encoder.basis.ranks)} functions, {len(jax.devices())} {jax.devices()[0].platform} device(s), jax {jax.__version__}")
    rate = bench.matmul_gflops()
    for seconds in bench.volume_times_s(scan, trained, n_voxels):
        print(f"update and summary of {n_voxels} voxels {seconds:.2f} s; 4096x256x256 at {rate:.0f} GFLOP/s before")
    print(f"4096x256x256 at {bench.matmul_gflops():.0f} GFLOP/s after")
    parts(trained.encoder, scan.noise.discrepancy, bool(trained.mapped), n_voxels, np.random.default_rng(0))


def parts(encoder: encoders.Encoder, discrepancy: float, mapped: bool, n_voxels: int, rng: np.random.Generator) -> None:
    """Each stage on one block, scaled to the volume on one core's worth of blocks."""
    plan, size = encoders.plan(encoder), sum(encoder.basis.ranks)
    state = encoders.init(BLOCK, BLOCK if mapped else 1, size)
    for _ in range(5):
        coefficients = jnp.asarray(rng.normal(size=(size, BLOCK if mapped else 1)) * 0.2 + 5 * np.eye(size)[:, :1])
        state = encoders.update(encoder.basis, state, coefficients, jnp.asarray(rng.uniform(0.4, 0.8, BLOCK)))
    noise = Noise(jnp.asarray(0.01), jnp.asarray(100.0), jnp.asarray(discrepancy))
    z = jnp.asarray(rng.normal(size=(2, 9, BLOCK)), jnp.float32)
    expansion = compiled(encoders.expand)(encoder, plan, state, z[:, 0].T)
    posterior = encoders.Gaussian(z[:, 0].T, jnp.abs(z[:, 1:4].reshape(6, -1)[:3].T) + 0.1)
    work = {
        "anchors": lambda: features(encoder, plan, state, noise),
        "likelihood at 9 points": lambda: evaluate(encoder, plan, expansion, noise, z),
        "posterior": lambda: infer(encoder, plan, state, noise),
        "first expansion": lambda: expand(encoder, plan, state, posterior.mean),
        "regions": lambda: regions(posterior, posterior.mean.T, encoder.coordinate),
        "all": lambda: everything(encoder, plan, state, noise),
    }
    features, expand, infer, regions, everything = (
        compiled(each) for each in (encoders.anchor_features, encoders.expand, encoders.infer, gaussian_region.summarise, answer)
    )
    evaluate = compiled(lambda *given: encoders.evaluate(*given).log_likelihood)
    for what, function in work.items():
        print(f"{what:24s} {1e3 * best(function):7.1f} ms per block of {BLOCK}, {best(function) * n_voxels / BLOCK:5.2f} s per volume")


def compiled(function):
    return eqx.filter_jit(function, compiler_options=for_blocks_of_voxels())


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
