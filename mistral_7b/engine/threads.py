"""Threads of the CPU's parallel loops, which belong to whoever computes."""

from __future__ import annotations

import ctypes
from contextlib import suppress

SOFT = 1  # omp_pause_soft, of OpenMP 5.0: what can be made again is let go of


def release() -> None:
    """Let go of the threads that this thread's parallel loops have used, before another thread computes.

    OpenMP keeps them for the thread that made them. Where they and another thread's own are more than there are
    cores, GNU's no longer wait for the next loop but sleep, and each of a small model's loops takes three times as
    long. They come back when this thread computes again.
    """
    with suppress(OSError, AttributeError):  # another OpenMP, or none: nothing is lost
        ctypes.CDLL("libgomp.so.1").omp_pause_resource_all(SOFT)
