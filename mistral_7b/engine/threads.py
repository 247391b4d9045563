"""Releases the OpenMP threads of a Python thread that no longer computes."""

from __future__ import annotations

import ctypes
from contextlib import suppress

SOFT = 1  # omp_pause_soft of OpenMP 5.0: release resources, keep the state


def release_openmp_threads() -> None:
    """Release the OpenMP threads of the calling thread, before another thread computes.

    OpenMP keeps a pool of threads for each thread that has run a parallel loop. When two pools together exceed the
    cores, GNU's threads sleep instead of spinning until the next loop, and each loop of a small model takes three
    times as long. The pool is recreated when this thread computes again.
    """
    with suppress(OSError, AttributeError):  # another OpenMP, or none: nothing to release
        ctypes.CDLL("libgomp.so.1").omp_pause_resource_all(SOFT)
