"""Signals that ask a running program to end."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def obeyed(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` at SIGTERM, SIGINT, and SIGHUP unless that is ignored (`nohup`); within, and only from the main thread."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous = [(number, signal.signal(number, lambda *_: stop())) for number in numbers]
    try:
        yield
    finally:
        for number, handler in previous:
            signal.signal(number, handler)
