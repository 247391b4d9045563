"""How long the event loop is kept from its work: whoever streams waits for it, all at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

PERIOD = 0.01  # seconds: shorter delays harm nobody


async def watch(told: Callable[[float, float], None]) -> None:
    """Sleep a moment, again and again; each time `told(late, worked)`, in seconds.

    late: how much later than it was due the loop came round: everything that kept it away, other threads and
    other processes too. worked: what the loop's own thread computed meanwhile, the part that is the server's own.
    """
    while True:
        due, worked = time.perf_counter() + PERIOD, time.thread_time()
        await asyncio.sleep(PERIOD)
        told(max(0.0, time.perf_counter() - due), time.thread_time() - worked)
