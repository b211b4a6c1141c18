"""How XLA turns programs into machine code, where its default is slow: options of `jax.jit`."""

from __future__ import annotations

from functools import cache

import jax


@cache
def for_large_programs() -> dict[str, bool | int | str]:
    """For programs of hundreds of operations: XLA's older code generator for fused loops.

    With jaxlib 0.10.2 such a program compiles in less than half the time. Empty where XLA does not know the option.
    """
    return if_known({"xla_cpu_use_fusion_emitters": False})


@cache
def with_barriers() -> dict[str, bool | int | str]:
    """For the encoder: on a CPU an `optimization_barrier` stays one.

    XLA (jaxlib 0.10.2) else drops barriers before it fuses loops. What was to be computed once is then computed anew in each of its
    readers: the encoder's answer takes several times as long. Empty where XLA does not know the option.
    """
    return {} if jax.default_backend() != "cpu" else if_known({"xla_disable_hlo_passes": "cse_barrier_expander"})


@cache
def for_blocks_of_voxels() -> dict[str, bool | int | str]:
    """The same for a program that runs in several threads at once, each on its own block of voxels: no threads within it."""
    if jax.default_backend() != "cpu":
        return {}
    return if_known({"xla_cpu_multi_thread_eigen": False, "xla_disable_hlo_passes": "cse_barrier_expander,cpu-parallel-task-assigner"})


def if_known(options: dict[str, bool | int | str]) -> dict[str, bool | int | str]:
    """The options, or none where this XLA refuses them."""
    try:
        jax.jit(lambda x: x + 1, compiler_options=options)(0.0)
    except jax.errors.JaxRuntimeError:
        return {}
    return options
