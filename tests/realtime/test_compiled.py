"""What was compiled is found again by the next process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from scansteer.core.errors import InputError
from scansteer.realtime import compiled

PROGRAM = """
import sys
from pathlib import Path
import jax
from scansteer.realtime.compiled import keep_compiled

found = []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event))
keep_compiled(Path(sys.argv[1]))
jax.jit(lambda x: 2 * x + 1)(1.0)
print(sum(event.endswith("/cache_hits") for event in found))
"""


def run(folder) -> int:
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(folder)]
    return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    folder = tmp_path / "sessions" / ".compiled"
    assert run(folder) == 0
    assert run(folder) > 0
    assert folder.stat().st_mode & 0o077 == 0
    assert folder.parent.stat().st_mode & 0o077 == 0


def test_a_folder_that_has_grown_large_is_emptied(tmp_path, monkeypatch):
    (tmp_path / "entry").write_bytes(bytes(10))
    compiled._empty_if_large(tmp_path)
    assert (tmp_path / "entry").exists()
    monkeypatch.setattr(compiled, "_MAX_BYTES", 9)
    compiled._empty_if_large(tmp_path)
    assert not (tmp_path / "entry").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Cannot use data folder"):
        compiled.keep_compiled(tmp_path / "file" / ".compiled")


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_may_write_into_is_refused(tmp_path, monkeypatch, mode):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    folder = tmp_path / ".compiled"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(InputError, match=r"What lies in .*\.compiled is executed, and it is d.* of user \d+: remove it"):
        compiled.keep_compiled(folder)


def test_a_folder_that_belongs_to_somebody_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(InputError, match=f"of user {me}: remove it, or make it a folder of user {me + 1}"):
        compiled.keep_compiled(tmp_path / ".compiled")


def test_a_link_in_its_place_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / ".compiled").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is executed"):
        compiled.keep_compiled(tmp_path / ".compiled")
