"""Interrupts: Ctrl-C, and what asks a process to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupts_to(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Let ``handler`` take SIGINT and SIGTERM. In other threads than the main one signals are left alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A signal that is ignored (nohup, a job in the background) stays so.
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)
