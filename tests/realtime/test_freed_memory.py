import platform
import subprocess
import sys

import pytest

COUNT = """
import ctypes, sys, threading
from scansteer.realtime.freed_memory import allocate_in_one_arena

if sys.argv[2] == "one":
    allocate_in_one_arena()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
together = threading.Barrier(4)

def allocate():
    together.wait()
    libc.malloc(1000)
    together.wait()

threads = [threading.Thread(target=allocate) for _ in range(4)]
[each.start() for each in threads]
[each.join() for each in threads]
libc.fopen.restype = ctypes.c_void_p
stream = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"w"))
libc.malloc_info(0, stream)
libc.fclose(stream)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="arenas are glibc's")
@pytest.mark.parametrize("how", ["one", "as usual"])
def test_threads_allocate_in_one_arena_where_that_is_asked_for(how, tmp_path):
    report = tmp_path / "malloc.xml"
    subprocess.run([sys.executable, "-c", COUNT, str(report), how], check=True)
    n_arenas = report.read_text().count("<heap nr=")
    assert n_arenas == 1 if how == "one" else n_arenas > 1
