"""Ready in seconds: what was compiled once is kept on disk, and what compiles for long is compiled more simply."""

from __future__ import annotations

import os
import stat
from functools import cache
from pathlib import Path

import jax

from scansteer.core.errors import InputError

_MAX_BYTES = 2**30
"""A scan takes a few MB; beyond this all is compiled anew (JAX's own bound would need another library)."""


@cache
def for_large_programs() -> dict[str, bool | int | str]:
    """Options of `jax.jit` for programs of hundreds of operations: XLA's older code generator for fused loops.

    With jaxlib 0.10.2 such a program compiles in less than half the time. Empty where XLA does not know the option.
    """
    return _if_known({"xla_cpu_use_fusion_emitters": False})


@cache
def with_barriers() -> dict[str, bool | int | str]:
    """Options of `jax.jit` for the encoder: on a CPU an `optimization_barrier` stays one.

    XLA (jaxlib 0.10.2) else drops barriers before it fuses loops. What was to be computed once is then computed anew in each of its
    readers: the encoder's answer takes five times as long, and as long again to compile. Empty where XLA does not know the option.
    """
    return {} if jax.default_backend() != "cpu" else _if_known({"xla_disable_hlo_passes": "cse_barrier_expander"})


@cache
def for_blocks_of_voxels() -> dict[str, bool | int | str]:
    """The same for a program that runs in several threads at once, each on its own block of voxels: no threads within it."""
    if jax.default_backend() != "cpu":
        return {}
    return _if_known({"xla_cpu_multi_thread_eigen": False, "xla_disable_hlo_passes": "cse_barrier_expander,cpu-parallel-task-assigner"})


def _if_known(options: dict[str, bool | int | str]) -> dict[str, bool | int | str]:
    try:
        jax.jit(lambda x: x + 1, compiler_options=options)(0.0)
    except jax.errors.JaxRuntimeError:
        return {}
    return options


def keep_compiled(folder: Path) -> None:
    """Let JAX write what it compiles into a folder, and find it there the next time; see its persistent compilation cache.

    Nothing is changed where `JAX_COMPILATION_CACHE_DIR` names a folder already. What lies in the folder is executed: nobody else
    may write into it.

    Raises
    ------
    InputError
        The folder cannot be made, or others may write into it.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        _make_private(folder)
        _empty_if_large(folder)
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _make_private(folder: Path) -> None:
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise InputError(f"Cannot use data folder {folder.parent}: {error.strerror}.") from error
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise InputError(
            f"What lies in {folder} is executed, and it is {stat.filemode(found.st_mode)} of user {found.st_uid}: remove it, or make it "
            f"a folder of user {os.geteuid()} that nobody else can write into."
        )


def _empty_if_large(folder: Path) -> None:
    files = [path for path in folder.iterdir() if path.is_file()]
    if sum(path.stat().st_size for path in files) > _MAX_BYTES:
        for path in files:
            path.unlink(missing_ok=True)
