"""Server-sent events with backpressure: events are written no faster than the client reads.

Unwritten pieces wait in the engine's mailbox, which holds at most one response per request. connection.py closes
connections whose client stops reading.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ANTHROPIC, CLIENT_GONE, OLLAMA, HttpError, refusal

logger = logging.getLogger("mistral_7b.server")

Frames = AsyncGenerator[bytes, None]
DONE = b"data: [DONE]\n\n"


def frame(data: Any, event: str | None = None) -> bytes:
    """Encode one event; `event` is its type, by default none."""
    head = f"event: {event}\n".encode() if event else b""
    return b"%sdata: %s\n\n" % (head, to_json(data))


def error_frame(error: HttpError, path: str) -> bytes:
    """Encode an error as an event, for a stream that has started."""
    if path.startswith(OLLAMA):
        return to_json(error.body(path)) + b"\n"
    return frame(error.body(path), "error" if path.startswith(ANTHROPIC) else None)


async def event_stream(
    frames: Frames, failed: Callable[[HttpError], bytes] | None = None, kind: type[EventStream] | None = None
) -> Response:
    """Return a streaming response. The first event is awaited here, so that earlier errors set the status.

    `failed`: encodes the events of an error that ends the stream; by default error_frame does.
    """
    try:
        first = await anext(frames)
    except BaseException:
        await frames.aclose()
        raise
    return (kind or EventStream)(first, frames, failed)


class EventStream(Response):
    """A streaming response of server-sent events, whose first event is available."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, frames: Frames, failed: Callable[[HttpError], bytes] | None = None) -> None:
        self.first, self.frames, self.status_code, self.background = first, frames, 200, None
        self.failed = failed
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._frames(scope["path"])) as frames:
            async for data in frames:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _frames(self, path: str) -> Frames:
        """All events; an error that ends the stream becomes the last one."""
        yield self.first
        try:
            async with aclosing(self.frames) as frames:
                async for data in frames:
                    yield data
        except Exception as e:
            why = refusal(e)
            if why.status >= 500 and why is not e:
                logger.exception("a stream ended with an error")
            last = b"" if why.status == CLIENT_GONE else (self.failed or partial(error_frame, path=path))(why)
            del why  # its traceback has this frame: a cycle
            if last:
                yield last


class LineStream(EventStream):
    """The same as lines of JSON, as in Ollama's API."""

    media_type = "application/x-ndjson"
