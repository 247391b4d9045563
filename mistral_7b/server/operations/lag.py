"""Measures the lag of the event loop, which delays every stream at once."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PERIOD = 0.01  # seconds between two measurements


async def watch(told: Callable[[float, float], None]) -> None:
    """Call `told(late, blocked)` every PERIOD, with both in seconds.

    late: how long after its due time the loop resumed this task. blocked: `late` without the time in which the
    thread was runnable but had no core. That part is caused by this process: work in the loop, or other threads
    that hold the GIL.
    """
    with _starvation() as starved:
        waited = starved()
        while True:
            due = time.perf_counter() + PERIOD
            await asyncio.sleep(PERIOD)
            late = max(0.0, time.perf_counter() - due)
            before, waited = waited, starved()
            told(late, max(0.0, late - (waited - before)))


@contextmanager
def _starvation() -> Iterator[Callable[[], float]]:
    """Yield a function for the seconds that this thread has spent runnable without a core.

    Always 0 where /proc/thread-self/schedstat is missing. The file stays open, because opening it costs more than
    the rest of a measurement.
    """
    try:
        file = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
    except OSError:
        yield lambda: 0.0
        return

    def starved() -> float:
        try:
            return int(os.pread(file, 100, 0).split()[1]) / 1e9
        except (OSError, IndexError, ValueError):
            return 0.0

    try:
        yield starved
    finally:
        os.close(file)
