"""Signals per second of the simulator, against plain matrix exponentials and BMCTool on the same work in the same run.

    python benchmarks/signals.py [--side 100] [--out benchmarks/signals.json]

A signal is every image of a scan at one point of a grid of (f, k) with `side` points each way. `plain` is the same chain of images, each exponential
by `jax.vmap(jax.scipy.linalg.expm)` of the same generators, once per distinct pulse; it is given the whole machine as well. `bmctool` is
BMCTool's solver driven event by event, without its file reading; `cpp` the figures of open-py-cest-mrf (C++, two workers) on a machine like the
first this ran on. Timings are the best of several, compilation apart; run it on an idle machine. Peak memory is that of the simulator, before
the others run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bmctool.parameters import Parameters
from bmctool.simulation.BlochMcConnellSolver import BlochMcConnellSolver
from jax import lax

from scansteer.core import bloch_mcconnell as bm
from scansteer.core import signal
from scansteer.core.signal import GAMMA
from scansteer.protocols.builtin import BUILTIN
from scansteer.protocols.scan import Scan
from scansteer.realtime.bench import Dictionary, dictionary

CPP_SIGNALS_PER_S = {"larg-phantom-9.4T": 7_022, "mt-human-3T": 169}
N_CORES = os.cpu_count() or 1


def main() -> None:
    """Print the report, and write it where asked."""
    jax.config.update("jax_enable_x64", True)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=100)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    scans = {name: ours(dictionary(BUILTIN[name], arguments.side)) for name in CPP_SIGNALS_PER_S}
    memory_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    for name, report in scans.items():
        report |= others(BUILTIN[name], dictionary(BUILTIN[name], arguments.side), report["signals_per_s"])
    machine = {"processor": processor(), "cores": N_CORES, "load_before": load, "matmul_gflops_float64": matmul_gflops()}
    versions = {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__}
    text = json.dumps({"machine": machine, "versions": versions, "peak_memory_gib": memory_gib, "scans": scans}, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


def ours(work: Dictionary) -> dict[str, Any]:
    """Speed of the simulator on all cores and on one."""
    count = work.start.shape[-1]
    _, one_core_s = best_time(lambda: work.simulate(1), 5)
    compile_s, seconds = best_time(lambda: work.simulate(N_CORES), 9)
    return {
        "points": count,
        "images": work.order.size,
        "distinct_pulses": work.pulses.b1.size,
        "signals_per_s": count / seconds,
        "signals_per_s_one_core": count / one_core_s,
        "compile_s": compile_s,
    }


def others(scan: Scan, work: Dictionary, signals_per_s: float) -> dict[str, Any]:
    """Speed of the others, and ours as ratios to it."""
    _, plain_s = best_time(lambda: plain(work), 1)
    plain_per_s = work.start.shape[-1] / plain_s
    bmctool_per_s = 1 / min(bmctool_time(scan) for _ in range(2))
    return {
        "plain_signals_per_s": plain_per_s,
        "bmctool_signals_per_s": bmctool_per_s,
        "ratio_to_plain": signals_per_s / plain_per_s,
        "ratio_to_bmctool": signals_per_s / bmctool_per_s,
        "ratio_to_cpp": signals_per_s / CPP_SIGNALS_PER_S[scan.name],
        "largest_difference_to_plain": float(jnp.max(jnp.abs(work.simulate(N_CORES) - plain(work)))),
    }


def best_time(run: Callable[[], Any], n: int) -> tuple[float, float]:
    """What the first run takes longer than the best of `n` more, and the best [s]."""
    first, *more = (elapsed(run) for _ in range(n + 1))
    return first - min(more), min(more)


def elapsed(run: Callable[[], Any]) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def plain(work: Dictionary) -> jax.Array:
    """The same signals by `jax.scipy.linalg.expm`."""
    return _plain(work.tissue, work.start, work.pulses, work.readout, work.order, work.train)


@partial(jax.jit, static_argnames="train")
def _plain(tissue, start, pulses, readout, order, train):
    matrices, shifts = lax.map(lambda pulse: plain_block(tissue, pulse, train), pulses)
    reading = signal.readout_map(tissue, readout)

    def image(mz, number):
        mz = bm.apply(matrices[number], mz) + shifts[number]
        return reading.leave(mz), reading.signal(mz)

    return lax.scan(image, start, order)[1]


def plain_block(tissue, saturation, train):
    """Matrix and shift of Mz over recovery and saturation, through augmented matrices (point, row, column)."""
    n, count = bm.n_transverse(tissue), train.n_pulses
    length = saturation.t_sat / (count + (count - 1) * (1 / train.duty_cycle - 1))
    spacing = (saturation.t_sat - count * length) / max(count - 1, 1)
    rf = GAMMA * saturation.b1 * tissue.b1
    offset = 2 * jnp.pi * saturation.offset_hz
    free = augmented(tissue, 0.0 * rf, 0.0)
    # one batch: two batched LAPACK calls at once never return
    together = jnp.stack([augmented(tissue, rf, offset) * length, free * spacing, free * saturation.t_rec])
    pulse, pause, recovery = jax.vmap(jax.vmap(jax.scipy.linalg.expm))(together)
    if train.spin_lock:
        angle = jnp.arctan2(GAMMA * saturation.b1, offset) * tissue.b1
        pulse = turn(tissue, -angle) @ pulse @ turn(tissue, angle)
    if count > 1:
        pulse = pulse @ jnp.linalg.matrix_power(pause @ pulse, count - 1)
    spoiled = recovery * (jnp.arange(pulse.shape[-1]) >= 2 * n)[:, None]
    whole = jnp.moveaxis(pulse @ spoiled, 0, -1)
    return whole[2 * n : -1, 2 * n : -1], whole[2 * n : -1, -1]


def augmented(tissue, w1, offset):
    """[[A, b], [0, 0]] of every point."""
    a, b = bm.generator(tissue, w1, offset)
    upper = jnp.concatenate([a, b[:, None]], axis=1)
    return jnp.moveaxis(jnp.concatenate([upper, jnp.zeros_like(upper[:1])]), -1, 0)


def turn(tissue, angle):
    """The tip of a spin lock as an augmented matrix of every point."""
    matrix = jnp.moveaxis(bm.turn(tissue, angle).matrix, -1, 0)
    return jnp.pad(matrix, ((0, 0), (0, 1), (0, 1))).at[:, -1, -1].set(1.0)


def bmctool_time(scan: Scan) -> float:
    """Seconds that BMCTool's solver takes for one signal: each image's events in turn, block pulses as single steps."""
    solute = {"f": 1e-3, "t1": 1.0, "t2": 0.04, "k": 100.0, "dw": 3.0}
    semisolid = {"f": 0.1, "t1": 1.0, "t2": 4e-5, "k": 30.0, "dw": 0.0, "lineshape": "Lorentzian"}
    pools = {"cest_pool": {"solute": solute}} if scan.pools[0].kind == "solute" else {"mt_pool": semisolid}
    settings = {"water_pool": {"f": 1.0, "t1": 1.0, "t2": 0.08}, "b0": scan.field_t, "gamma": 267.5153, "b0_inhom": 0.0, "rel_b1": 1.0}
    parameters = Parameters.from_dict(settings | pools)
    solver = BlochMcConnellSolver(parameters, len(scan.schedule))
    played = [event for block in scan.schedule for event in events(scan, block)]
    state = parameters.m_vec.copy()
    start = time.perf_counter()
    for amplitude, frequency, duration in played:
        solver.update_matrix(amplitude, 0.0, frequency)
        state = solver.solve_equation(state, duration)
    return time.perf_counter() - start


def events(scan: Scan, block) -> list[tuple[float, float, float]]:
    """(amplitude [Hz], frequency [Hz], duration [s]) of one image: recovery, pulses with tips and pauses, shots with pauses."""
    train, readout = scan.train, scan.readout
    length = block.t_sat_s / (train.n_pulses + (train.n_pulses - 1) * (1 / train.duty_cycle - 1))
    pulse = [(block.b1_ut * 42.576, block.offset_ppm * scan.larmor_hz_per_ppm, length)]
    tip = [(10.0, 0.0, 1e-3)] if train.spin_lock else []
    pause = [(0.0, 0.0, length * (1 / train.duty_cycle - 1))]
    played = [*tip, *pulse, *tip]
    shot = [(100.0, 0.0, 1e-3), (0.0, 0.0, max(readout.shot_spacing_s, 1e-3))]
    return [(0.0, 0.0, block.t_rec_s), *(played + pause) * (train.n_pulses - 1), *played, *shot * readout.n_shots]


def matmul_gflops() -> float:
    """Best rate of a float64 matrix product on all cores: what the machine can do at all."""
    a = np.random.default_rng(0).random((1024, 1024))
    return 2 * 1024**3 / best_time(lambda: a @ a, 8)[1] / 1e9


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
