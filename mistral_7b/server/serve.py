"""The server process: listen, serve, and shut down gracefully.

SIGTERM, SIGHUP or Ctrl-C starts draining: new requests get 503 with Retry-After, and so does /health/ready.
Running requests have `drain_timeout` seconds to finish; the rest end with an error. A second signal exits at once.
After SIGTERM and SIGHUP, /health/ready alone answers 503 for the first `drain_grace` seconds.

A failed engine also ends the process, after all open requests got an error, so that a supervisor restarts it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import signal
import socket
import threading
import time
from collections.abc import Generator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ..errors import ConfigError, EngineError
from .config import ServerConfig
from .http.connection import connection_class
from .http.errors import HttpError
from .operations.lag import watch
from .state import State

logger = logging.getLogger("mistral_7b.server")

# Thresholds of the garbage collector. A collection of 5,000 new objects blocks the loop for some 5 ms, a full one
# of a busy server for 60 ms and more. Few objects are in cycles, so full ones run while the server is idle, and
# under load only after millions of new objects.
COLLECT = (5_000, 3, 1_000)
COLLECT_IDLE = 20  # collections of the middle generation after which an idle server runs a full one
OTHER_FILES = 256
ACCEPTED = 16  # connections accepted per event loop iteration: more would delay the open ones
FINAL_ERRORS_TIMEOUT = 2  # seconds to send the final errors of aborted requests


def bind(config: ServerConfig) -> socket.socket:
    """Bind the configured address, before the model is loaded. ConfigError if that fails."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # By its protocol asyncio knows TCP: without, Nagle delays the second packet of an answer by 40 ms.
        sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as e:
        raise ConfigError(f"cannot listen at {config.host}:{config.port}: {e.strerror or e}") from e
    return sock


def url_of(sock: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _raise_file_limit(n: int) -> None:
    """Raise the soft limit of open files to `n`, or to the hard limit if that is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = n if hard == resource.RLIM_INFINITY else min(n, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _not_cancelled(record: logging.LogRecord) -> bool:
    """A filter that drops the tracebacks of cancelled tasks."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


class Server(uvicorn.Server):
    """A uvicorn server that drains before it exits."""

    def __init__(self, app: FastAPI) -> None:
        self.state: State = app.state.serving
        config = self.state.config
        super().__init__(uvicorn.Config(
            app, loop="asyncio", http=connection_class(self.state), ws="none", lifespan="off", log_config=None,
            access_log=False, server_header=False, proxy_headers=False, timeout_keep_alive=int(config.keep_alive),
            timeout_graceful_shutdown=FINAL_ERRORS_TIMEOUT, backlog=ACCEPTED,
        ))  # fmt: skip
        self.broken: EngineError | None = None  # the engine failure that ended the server
        self._signals = 0
        self._refuse_at: float | None = None  # when draining begins
        self._limit, self._deadline = 0.0, 0.0

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal or `stop`.

        Objects that exist now live until exit. They are frozen, because a full collection over them would block
        the event loop for 0.2 seconds. A process that has frozen its objects itself keeps them so.
        """
        _raise_file_limit(self.state.config.max_connections + OTHER_FILES)
        ours = not gc.get_freeze_count()
        if ours:
            gc.freeze()
        previous = gc.get_threshold()
        gc.set_threshold(*COLLECT)
        try:
            super().run(sockets)
        finally:
            gc.set_threshold(*previous)
            if ours:
                gc.unfreeze()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and start to measure the event loop's lag."""
        await super().startup(sockets)
        self.state.connections = self.server_state.connections
        for sock in sockets or ():
            sock.listen(self.state.config.max_connections)  # the kernel's backlog; uvicorn set ACCEPTED
        self._watch = asyncio.create_task(watch(self.state.metrics.lagged))

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handle SIGHUP as SIGTERM, unless it is ignored, as under nohup."""
        with super().capture_signals():
            main = threading.current_thread() is threading.main_thread()
            if not main or signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
                yield
                return
            previous = signal.signal(signal.SIGHUP, self.handle_exit)
            try:
                yield
            finally:
                signal.signal(signal.SIGHUP, previous)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close. At a forced exit the responses are cancelled, which is meant and no error to log."""
        if self.force_exit:
            logging.getLogger("uvicorn.error").addFilter(_not_cancelled)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal: the first starts draining, the second exits immediately."""
        if self._signals and sig == signal.SIGHUP:  # a closing terminal may send it twice
            return
        if not self._signals and sig != signal.SIGINT:
            self._refuse_at = time.monotonic() + self.state.config.drain_grace
        self._signals += 1
        if self._signals > 1:
            self.should_exit = self.force_exit = True

    def stop(self) -> None:
        """Start draining, as a signal does, for a server that runs on a thread."""
        self._signals += 1

    async def on_tick(self, counter: int) -> bool:
        """Check for draining, engine failure and the drain deadline; uvicorn calls this ten times a second."""
        if self._signals and not self.state.draining:
            self.state.stopping = True
            if self._refuse_at is None or time.monotonic() >= self._refuse_at:
                self._drain(self.state.config.drain_timeout)
        if not self.state.active and gc.get_count()[2] >= COLLECT_IDLE:
            gc.collect()
        if self.broken is None and self.state.llm.broken is not None:
            self.broken = self.state.llm.broken
            self._drain(FINAL_ERRORS_TIMEOUT)
        if self.state.draining and not self.should_exit:
            if not self.state.active:
                self.should_exit = True
            elif time.monotonic() > self._deadline:
                self._abort_all()
        return await super().on_tick(counter)

    def _drain(self, seconds: float) -> None:
        """Refuse new requests, and exit once all running ones have finished, or after `seconds`."""
        self.state.stopping = self.state.draining = True
        self._limit, self._deadline = seconds, time.monotonic() + seconds
        logger.info("shutting down", extra={"fields": {"running": self.state.active}})

    def _abort_all(self) -> None:
        limit = self._limit
        why = HttpError(503, f"the server is shutting down; this request did not finish within {limit:g} seconds",
                      code="shutting_down", retry_after=5)  # fmt: skip
        aborted = self.state.abort_all(why)
        logger.warning("requests were cut", extra={"fields": {"answers": aborted, "seconds": limit}})
        self.should_exit = True
