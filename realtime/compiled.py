"""Ready in seconds: what was compiled once is kept on disk."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import jax

from scansteer.core.errors import InputError

_MAX_BYTES = 2**30
"""A scan takes a few MB; beyond this all is compiled anew (JAX's own bound would need another library)."""


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
