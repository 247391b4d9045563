"""Runs a real server on a free port, on its own thread, with a small model of random weights."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tiny import tiny_args, tiny_model

from mistral_7b.engine.async_llm import AsyncLLM
from mistral_7b.engine.config import EngineConfig
from mistral_7b.model import Mistral7B
from mistral_7b.server.app import build
from mistral_7b.server.config import ServerConfig
from mistral_7b.server.serve import Server, bind, url_of
from mistral_7b.server.state import State
from mistral_7b.text.tokenizer import Tokenizer

ENGINE = EngineConfig(max_sequences=12, max_batch_tokens=48, page_size=4, max_waiting=8)
TOOL = {
    "type": "function",
    "function": {
        "name": "weather", "description": "How the weather will be",
        "parameters": {
            "type": "object", "required": ["city", "days"], "additionalProperties": False,
            "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}, "days": {"type": "integer"}},
        },
    },
}  # fmt: skip
HELLO = [{"role": "user", "content": "How will the weather be?"}]


_v3 = functools.cache(Tokenizer.v3)
_tiny = functools.cache(tiny_model)


@dataclass
class Serving:
    """A running server."""

    url: str
    llm: AsyncLLM
    state: State
    server: Server
    thread: threading.Thread

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Send one request; return status, headers and body. A body that is not bytes is sent as JSON."""
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, data, {"content-type": "application/json", **(headers or {})})
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """Send a POST request; return its status and parsed JSON."""
        status, _, data = self.ask("POST", path, body, headers)
        return status, json.loads(data)

    def raw(self, data: bytes, seconds: float = 5.0) -> bytes:
        """Send bytes; return what arrives until the server closes, or for `seconds` without data."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as sock:
            sock.sendall(data)
            out = b""
            with contextlib.suppress(TimeoutError, ConnectionError):
                while part := sock.recv(65536):
                    out += part
            return out

    def idle(self, seconds: float = 5.0) -> None:
        """Wait until no request runs; then check that no page is leaked."""
        end = time.monotonic() + seconds
        while (not self.llm.engine.idle or self.state.active) and time.monotonic() < end:
            time.sleep(0.005)
        assert not self.state.active
        assert not self.state.held
        assert not self.state.running
        self.llm.engine.check()


@contextlib.contextmanager
def serving(
    config: ServerConfig | None = None,
    engine: EngineConfig = ENGINE,
    trained: Mistral7B | None = None,
    tokenizer: Tokenizer | None = None,
    **model: Any,
) -> Iterator[Serving]:
    """Run a server for the block, with the model `trained` or a tiny one of random weights."""
    args = tiny_args(**{"vocab_size": 32768, "sliding_window": 64, "max_seq_len": 1024, **model})
    config = config or ServerConfig(port=0)
    sock = bind(config)
    llm = AsyncLLM(trained or copy.deepcopy(_tiny(args)), engine, tokenizer=tokenizer or _v3())
    server = Server(build(llm, config, "tiny"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.005)
        yield Serving(url_of(sock), llm, server.state, server, thread)
    finally:
        server.stop()
        server.state.config.__dict__["drain_timeout"] = 0.0
        thread.join(10)
        asyncio.run(llm.close())
        assert not thread.is_alive()
