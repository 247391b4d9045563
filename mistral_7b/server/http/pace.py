"""Starts a rush of requests over several iterations of the event loop, so that it delays no open stream."""

from __future__ import annotations

import asyncio
from collections import deque


class Pace:
    """Lets at most `n` callers start in one iteration of the event loop, in their order."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._started = 0  # in this iteration
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def turn(self) -> None:
        """Return when the caller may start."""
        loop = asyncio.get_running_loop()
        if self._started < self._n and not self._waiting:
            if not self._started:
                loop.call_soon(self._next)
            self._started += 1
            return
        future: asyncio.Future[None] = loop.create_future()
        self._waiting.append(future)
        await future

    def _next(self) -> None:
        """Begin the next iteration."""
        self._started = 0
        while self._waiting and self._started < self._n:
            future = self._waiting.popleft()
            if not future.done():  # a cancelled caller takes no turn
                future.set_result(None)
                self._started += 1
        if self._started:
            asyncio.get_running_loop().call_soon(self._next)
