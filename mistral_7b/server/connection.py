"""A connection that nobody can hold for nothing.

uvicorn's, with time limits for a head that does not come and for a reader who takes nothing, small buffers, and
errors in the shape that all others have.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import DEFAULT_MAX_INCOMPLETE_EVENT_SIZE as HEAD
from uvicorn.protocols.http.h11_impl import H11Protocol

from .config import ServerConfig
from .problems import Refusal

BUFFER = 1 << 16  # bytes written and not yet taken, in the process and in the kernel each
PIECE = 1 << 14  # bytes that are read at once: a head is held to its limit only where a piece ends


class Connection(H11Protocol):
    """One connection; `limits` are those of its server."""

    limits: ServerConfig
    _head: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None
    _ending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=BUFFER)
        if (sock := transport.get_extra_info("socket")) is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        if len(self.connections) > self.limits.max_connections:
            self._say(Refusal(503, "too many connections are open", hint="try again later", retry_after=1))
        else:
            self._await_head(self.limits.body_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head, self._stuck, self._ending):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        for at in range(0, len(data), PIECE):
            if not self.transport.is_closing():
                super().data_received(data[at : at + PIECE])
        if self._busy and self._head is not None:
            self._head.cancel()
            self._head = None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._end_soon()
        elif not self._busy:
            self._await_head(self.limits.keep_alive + self.limits.body_timeout)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._end_soon()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck = self.loop.call_later(self.limits.idle_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def send_400_response(self, msg: str) -> None:
        """What came is not to be had: called where h11's error about it is being handled."""
        if self._busy and self.cycle.response_started:
            self.transport.close()
        else:
            error = sys.exception()
            if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
                self._say(Refusal(431, f"the request's head is larger than {HEAD} bytes", code="head_too_large"))
            else:
                self._say(Refusal(400, "this is no HTTP that can be understood", code="bad_http"))

    @property
    def _busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_head(self, seconds: float) -> None:
        if self._head is not None:
            self._head.cancel()
        self._head = self.loop.call_later(seconds, self._no_head)

    def _no_head(self) -> None:
        self._head = None
        if self.transport.is_closing() or self._busy:
            return
        if self.conn.their_state is h11.SEND_BODY:  # it was answered by its head, and its body goes on coming
            self._hang_up()
        else:
            self._say(Refusal(408, "no request came in time", code="head_timeout"))

    def _end_soon(self) -> None:
        """What lies ready may still be taken, for a while."""
        if self._ending is None:
            self._ending = self.loop.call_later(self.limits.idle_timeout, self.transport.abort)

    def _say(self, why: Refusal) -> None:
        """Answer without having understood the question, and hang up."""
        self.transport.write(_raw(why))
        self._hang_up()

    def _hang_up(self) -> None:
        self.transport.close()
        self._end_soon()


def connection_class(config: ServerConfig) -> type[Connection]:
    """The protocol of a server with these limits."""
    return type("Connection", (Connection,), {"limits": config})


def _raw(why: Refusal) -> bytes:
    body = json.dumps(why.body())
    headers: dict[str, Any] = {
        "content-type": "application/json", "content-length": len(body), "connection": "close", **why.headers,
    }  # fmt: skip
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {why.status} {HTTPStatus(why.status).phrase}\r\n{lines}\r\n{body}".encode()
