"""The process: listening, and ending well.

SIGTERM or Ctrl-C: no request is taken any more (503 and Retry-After; /health/ready says 503), running answers get
`drain_timeout` seconds, and what has not ended then is told why it was cut. A second signal ends at once.

An engine that broke ends the process too, once open requests have been told: a supervisor starts it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ..errors import ConfigError, EngineError
from .config import ServerConfig
from .connection import connection_class
from .lag import watch
from .problems import Refusal
from .state import State

logger = logging.getLogger("mistral_7b.server")

COLLECT = (5_000, 3, 20)  # a young collection of so many takes 5 ms, and as long as it takes nobody is answered
OTHER_FILES = 256
ACCEPTED = 16  # connections in one round of the event loop: more, and those that are open wait for them
LAST_WORDS = 2  # seconds for what was cut, or lost its engine, to say so


def bind(config: ServerConfig) -> socket.socket:
    """The address, taken before the model is loaded. ConfigError if it cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as e:
        raise ConfigError(f"cannot listen at {config.host}:{config.port}: {e.strerror or e}") from e
    return sock


def url_of(sock: socket.socket) -> str:
    """Where a bound socket is reached."""
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _allow_files(n: int) -> None:
    """Raise the process's own limit of open files, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = n if hard == resource.RLIM_INFINITY else min(n, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class Server(uvicorn.Server):
    """uvicorn's, that drains before it ends."""

    def __init__(self, app: FastAPI) -> None:
        self.state: State = app.state.serving
        config = self.state.config
        super().__init__(uvicorn.Config(
            app, loop="asyncio", http=connection_class(config), ws="none", lifespan="off", log_config=None,
            access_log=False, server_header=False, proxy_headers=False, timeout_keep_alive=int(config.keep_alive),
            timeout_graceful_shutdown=LAST_WORDS, backlog=ACCEPTED,
        ))  # fmt: skip
        self.broken: EngineError | None = None  # why it ended by itself
        self._told = 0
        self._limit, self._until = 0.0, 0.0

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until it is told to stop.

        What is there by now is there to stay, and the collector need not look at it, which would take a fifth of a
        second in which nobody is answered.
        """
        _allow_files(self.state.config.max_connections + OTHER_FILES)
        gc.freeze()
        usual = gc.get_threshold()
        gc.set_threshold(*COLLECT)
        try:
            super().run(sockets)
        finally:
            gc.set_threshold(*usual)
            gc.unfreeze()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and look after the event loop from now on."""
        await super().startup(sockets)
        for sock in sockets or ():
            sock.listen(self.state.config.max_connections)  # may wait in the kernel
        self._watch = asyncio.create_task(watch(self.state.metrics.lagged))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come: begin to end; the second time, end."""
        self._told += 1
        if self._told > 1:
            self.should_exit = self.force_exit = True

    def stop(self) -> None:
        """What a signal does, for whoever runs the server in a thread."""
        self._told += 1

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if self._told and not self.state.draining:
            self._drain(self.state.config.drain_timeout)
        if self.broken is None and self.state.llm.broken is not None:
            self.broken = self.state.llm.broken
            self._drain(LAST_WORDS)
        if self.state.draining and not self.should_exit:
            if not self.state.active:
                self.should_exit = True
            elif time.monotonic() > self._until:
                self._cut()
        return await super().on_tick(counter)

    def _drain(self, seconds: float) -> None:
        """Take no requests any more, and end when all answers have, or after so long."""
        self.state.draining = True
        self._limit, self._until = seconds, time.monotonic() + seconds
        logger.info("shutting down", extra={"fields": {"running": self.state.active}})

    def _cut(self) -> None:
        limit = self._limit
        why = Refusal(503, f"the server shuts down, and this answer was not complete after {limit:g} seconds",
                      code="shutting_down", retry_after=5)  # fmt: skip
        cut = self.state.cut(why)
        logger.warning("answers were cut", extra={"fields": {"answers": cut, "seconds": limit}})
        self.should_exit = True
