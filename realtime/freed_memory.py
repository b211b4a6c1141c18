"""Memory that a session leaves behind goes back to the system at once, so that a service that runs for months stays as large as it is."""

from __future__ import annotations

import contextlib
import ctypes
import gc


def return_freed_memory() -> None:
    """Collect what is only held in circles (a session's arrays are), and give freed pages back; without effect outside glibc."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def allocate_in_one_arena() -> None:
    """Keep all threads' allocations in one pool; without effect outside glibc, and on pools that threads have already.

    What sessions compile and free leaves gaps in every thread's pool. With glibc's eight pools a core the service grew by 8 MB a session though
    no more was in use (20 sessions: 877 to 1 039 MiB).
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


_M_ARENA_MAX = -8
"""From glibc's malloc.h."""
