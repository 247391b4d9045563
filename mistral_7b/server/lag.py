"""How long the event loop is kept from its work: whoever streams waits for it, all at once."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PERIOD = 0.01  # seconds: shorter delays harm nobody


async def watch(told: Callable[[float, float], None]) -> None:
    """Sleep a moment, again and again; each time `told(late, blocked)`, in seconds.

    late: how much later than it was due the loop came round: everything that kept it away. blocked: that, less
    what its thread waited for a core that other processes had: what this process did to itself, by work in the
    loop or by other threads that kept Python's lock.
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
    """A function: for how many seconds this thread could have run and had no core, ever.

    0 where the system does not say. The file stays open, as to open it takes longer than all else here.
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
