"""Server-sent events: written as they come, and no faster than they are read.

What is not written yet is little: the rest waits in the engine's mailbox, which holds no more than an answer, and
connection.py hangs up on who takes nothing at all.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .problems import CLIENT_GONE, Refusal, refusal

logger = logging.getLogger("mistral_7b.server")

Frames = AsyncGenerator[bytes, None]
TICK = 0.02  # seconds: a stream in steps of this length looks even
AHEAD = 1 << 14  # bytes that wait to be written
DONE = b"data: [DONE]\n\n"


def frame(data: Any, event: str | None = None) -> bytes:
    """One event."""
    head = f"event: {event}\n".encode() if event else b""
    return b"%sdata: %s\n\n" % (head, to_json(data))


def error_frame(error: Refusal, path: str) -> bytes:
    """An error in the middle of a stream."""
    return frame(error.body(path), "error" if path.startswith("/v1/messages") else None)


async def event_stream(frames: Frames) -> Response:
    """A response of these events. The first is awaited here: what goes wrong before it has a status of its own."""
    try:
        first = await anext(frames)
    except BaseException:
        await frames.aclose()
        raise
    return EventStream(first, frames)


class EventStream(Response):
    """Events whose first has come.

    Each write goes through five layers and ends in a call of the kernel that lets go of Python's lock, which the
    engine's thread then has: so a fast stream is written a tick at a time.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, frames: Frames) -> None:
        self.frames, self.status_code, self.background = frames, 200, None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})
        self._ready, self._size = [first], len(first)  # to be written
        self._news, self._room = asyncio.Event(), asyncio.Event()
        self._over = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        pump = asyncio.create_task(self._pump(scope["path"]))
        try:
            while self._ready or not self._over:
                if self._ready:
                    data, self._ready, self._size = b"".join(self._ready), [], 0
                    self._room.set()
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                    await asyncio.sleep(0 if self._over else TICK)
                else:
                    self._news.clear()
                    await self._news.wait()
        finally:
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pump(self, path: str) -> None:
        """Make events ready as they come, and no more than are soon written."""
        try:
            async with aclosing(self.frames) as frames:
                async for data in frames:
                    self._put(data)
                    while self._size > AHEAD:
                        self._room.clear()
                        await self._room.wait()
        except Exception as e:
            told = refusal(e)
            if told.status >= 500 and told is not e:
                logger.exception("a stream ended with an error")
            if told.status != CLIENT_GONE:
                self._put(error_frame(told, path))
        finally:
            self._over = True
            self._news.set()

    def _put(self, data: bytes) -> None:
        self._ready.append(data)
        self._size += len(data)
        self._news.set()
