"""Server-sent events: written as they come, and no faster than they are read.

What is not written yet waits in the engine's mailbox, which holds no more than an answer, and connection.py hangs
up on who takes nothing at all.
"""

from __future__ import annotations

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
    """Events whose first has come."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, frames: Frames) -> None:
        self.first, self.frames, self.status_code, self.background = first, frames, 200, None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._told(scope["path"])) as frames:
            async for data in frames:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _told(self, path: str) -> Frames:
        """The events; an error that ends them is one, too."""
        yield self.first
        try:
            async with aclosing(self.frames) as frames:
                async for data in frames:
                    yield data
        except Exception as e:
            told = refusal(e)
            if told.status >= 500 and told is not e:
                logger.exception("a stream ended with an error")
            if told.status != CLIENT_GONE:
                yield error_frame(told, path)
