"""A client connection that cannot be held open without progress.

uvicorn's h11 protocol, with a limit of connections, timeouts for the request head and for stalled readers, small
write buffers, and errors in the server's JSON shape.
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

from ..config import ServerConfig
from ..state import RESERVED, State
from .errors import HttpError, too_many_connections

BUFFER = 1 << 16  # bytes of unsent output, in the process and in the kernel each
RESERVE = 64  # connections beyond the limit, which are answered health probes alone
PIECE = 1 << 14  # bytes parsed at once: h11 checks the size of a head only after each piece


class Connection(H11Protocol):
    """One connection. `serving` is the server's state."""

    serving: State
    _idle_since = 0.0
    _head: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None
    _closing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=BUFFER)
        if (sock := transport.get_extra_info("socket")) is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        self._idle_since = self.loop.time()
        if len(self.connections) > self.limits.max_connections and not self._make_room():
            if len(self.connections) > self.limits.max_connections + RESERVE:
                self.serving.rejected += 1
                self._reject(too_many_connections())
                return
            self.app_state = {**self.app_state, RESERVED: True}
        self._start_head_timer(self.limits.body_timeout)

    @property
    def limits(self) -> ServerConfig:
        """The server's configuration."""
        return self.serving.config

    def _make_room(self) -> bool:
        """Close the connection that has been idle for the longest time; False: all are in use."""
        others = [c for c in self.connections if c is not self and not c.transport.is_closing()]
        if len(others) < self.limits.max_connections:
            return True
        idle = [c for c in others if isinstance(c, Connection) and not c._busy]  # or with an answered, unread body
        if not idle:
            return False
        min(idle, key=lambda c: c._idle_since).transport.close()
        self.serving.evicted += 1
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head, self._stuck, self._closing):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        vars(self.transport).pop("_read_ready_cb", None)  # a cycle of asyncio's own

    def data_received(self, data: bytes) -> None:
        for at in range(0, len(data), PIECE):
            if not self.transport.is_closing():
                super().data_received(data[at : at + PIECE])
        if self._busy and self._head is not None:
            self._head.cancel()
            self._head = None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._idle_since = self.loop.time()
        if self.transport.is_closing():
            self._abort_later()
        elif not self._busy:
            self._start_head_timer(self.limits.keep_alive + self.limits.body_timeout)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._abort_later()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck = self.loop.call_later(self.limits.idle_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def send_400_response(self, msg: str) -> None:
        """Reject malformed input. uvicorn calls this while it handles h11's error."""
        error = sys.exception()
        if error is not None:  # h11's frames hold the error, and its traceback them: a cycle with this connection
            error.__traceback__ = None
        if self._busy and self.cycle.response_started:
            self.transport.close()
        elif isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
            self._reject(HttpError(431, f"the request head is larger than {HEAD} bytes", code="head_too_large"))
        else:
            self._reject(HttpError(400, "the request is not valid HTTP", code="bad_http"))

    @property
    def _busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_head_timer(self, seconds: float) -> None:
        if self._head is not None:
            self._head.cancel()
        self._head = self.loop.call_later(seconds, self._head_timeout)

    def _head_timeout(self) -> None:
        self._head = None
        if self.transport.is_closing() or self._busy:
            return
        if self.conn.their_state is h11.SEND_BODY:  # already answered from its head; the body is still arriving
            self._close()
        else:
            self._reject(HttpError(408, "no complete request head arrived in time", code="head_timeout"))

    def _abort_later(self) -> None:
        """Abort the closing connection if its remaining output is not read in time."""
        if self._closing is None:
            self._closing = self.loop.call_later(self.limits.idle_timeout, self.transport.abort)

    def _reject(self, why: HttpError) -> None:
        """Send an error without an HTTP request, and close."""
        self.transport.write(_raw(why))
        self._close()

    def _close(self) -> None:
        self.transport.close()
        self._abort_later()


def connection_class(state: State) -> type[Connection]:
    """The protocol class for a server with this state."""
    return type("Connection", (Connection,), {"serving": state})


def _raw(why: HttpError) -> bytes:
    """A complete HTTP/1.1 error response."""
    body = json.dumps(why.body())
    headers: dict[str, Any] = {
        "content-type": "application/json", "content-length": len(body), "connection": "close", **why.headers,
    }  # fmt: skip
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {why.status} {HTTPStatus(why.status).phrase}\r\n{lines}\r\n{body}".encode()
