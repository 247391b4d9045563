"""What is written to many sockets in small pieces, gathered: one call of the kernel for all of a moment.

Each call lets go of Python's lock and has to get it back from the engine's thread. With 32 streams of a small
model, a call for every token takes more time than all else that the server does. So what is written waits for the
next tick, unless a connection has been quiet or an answer ends.
"""

from __future__ import annotations

import asyncio
from typing import Any

TICK = 0.02  # seconds: the pace of a stream that nobody can tell from an even one
MOST = 1 << 14  # bytes that wait


class Ticker:
    """Flushes all connections that have something, together."""

    def __init__(self) -> None:
        self._waiting: dict[Gathered, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, transport: Gathered, loop: asyncio.AbstractEventLoop) -> None:
        """Flush it with the next tick."""
        self._waiting[transport] = None
        if self._timer is None:
            now = loop.time()
            self._timer = loop.call_at(now + TICK - now % TICK, self._tick)

    def _tick(self) -> None:
        self._timer, waiting = None, self._waiting
        self._waiting = {}
        for transport in waiting:
            transport.flush()


class Gathered:
    """A transport whose small writes are gathered."""

    def __init__(self, transport: asyncio.Transport, ticker: Ticker) -> None:
        self._transport, self._ticker = transport, ticker
        self._loop = asyncio.get_running_loop()
        self._parts: list[bytes] = []
        self._size, self._flushed, self._planned = 0, 0.0, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Have it written soon: at once, if nothing was for a tick; so an answer's head goes with its body."""
        self._parts.append(data)
        self._size += len(data)
        if self._size > MOST:
            self.flush()
        elif not self._planned:
            self._planned = True
            if self._loop.time() - self._flushed > TICK:
                self._loop.call_soon(self.flush)
            else:
                self._ticker.add(self, self._loop)

    def flush(self) -> None:
        """Write what waits."""
        self._planned = False
        if self._parts:
            data, self._parts, self._size = b"".join(self._parts), [], 0
            self._flushed = self._loop.time()
            self._transport.write(data)

    def close(self) -> None:
        """Write what waits, and hang up."""
        self.flush()
        self._transport.close()

    def abort(self) -> None:
        """Hang up."""
        self._parts, self._size = [], 0
        self._transport.abort()
