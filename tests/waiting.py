"""Waiting in tests for what another thread or process brings about, and limits on how long something may take.

Other processes share the machine: they may pause this one, and a garbage collection or a first import may fall
into any single measurement. A wait therefore counts a pause as one look, and a limit on a duration holds for the
best of several attempts: code that is always slow fails at all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

LOOK = 0.002  # seconds between two looks
PAUSE = 0.1  # seconds that one look counts for at most


def until(true: Callable[[], object], seconds: float = 5.0) -> bool:
    """Whether it becomes true within so many seconds in which this process runs."""
    left, before = seconds, time.monotonic()
    while not true():
        if left < 0:
            return False
        time.sleep(LOOK)
        now = time.monotonic()
        left -= min(now - before, PAUSE)
        before = now
    return True


def less(limit: float, measured: Callable[[], float], attempts: int = 5) -> None:
    """Measure until a figure is less than the limit. AssertionError if no attempt gives one.

    `measured` starts anew each time: an attempt that finds what a former one cached measures nothing.
    """
    found: list[float] = []
    while not found or found[-1] >= limit:
        assert len(found) < attempts, f"never less than {limit:g}: {', '.join(f'{x:.3g}' for x in found)}"
        found.append(measured())


def soon(
    limit: float,
    action: Callable[[], Result],
    clock: Callable[[], float] = time.thread_time,
    attempts: int = 5,
) -> Result:
    """Return what an action returns that takes less than `limit` seconds by `clock`; repeat it until it does.

    AssertionError if it takes longer at every attempt.
    """
    results: list[Result] = []

    def seconds() -> float:
        began = clock()
        results.append(action())
        return clock() - began

    less(limit, seconds, attempts)
    return results[-1]
