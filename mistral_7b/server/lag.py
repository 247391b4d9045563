"""How long the event loop is kept from its work: whoever streams waits for it, all at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

PERIOD = 0.01  # seconds: shorter delays harm nobody


async def watch(told: Callable[[float, float], None]) -> None:
    """Sleep a moment, again and again; each time `told(late, blocked)`, in seconds.

    late: how much later than it was due the loop came round: everything that kept it away. blocked: that, less
    what its thread waited for a core that other processes had: what this process did to itself, by work in the
    loop or by other threads that kept Python's lock.
    """
    while True:
        due, starved = time.perf_counter() + PERIOD, _starved()
        await asyncio.sleep(PERIOD)
        late = max(0.0, time.perf_counter() - due)
        told(late, max(0.0, late - (_starved() - starved)))


def _starved() -> float:
    """Seconds for which this thread could have run and had no core, ever; 0 where the system does not say."""
    try:
        with open("/proc/thread-self/schedstat", "rb") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0
