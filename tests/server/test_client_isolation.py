"""Large bodies do not block the event loop, and clients that disconnect or send garbage do not affect others."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time

import pytest
from pydantic_core import from_json
from serving import HELLO, TOOL, Serving, serving
from waiting import less

from mistral_7b.engine.config import EngineConfig
from mistral_7b.server.config import MIB

CHAT = "/v1/chat/completions"


@pytest.fixture
def slowest(monkeypatch: pytest.MonkeyPatch):
    """The CPU time in seconds of every event loop callback so far."""
    seconds: list[float] = []
    run = asyncio.events.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        begun = time.thread_time()
        run(handle)
        seconds.append(time.thread_time() - begun)

    monkeypatch.setattr(asyncio.events.Handle, "_run", timed)
    return seconds


def test_large_bodies_do_not_hold_up_the_event_loop(server: Serving, slowest):
    size = MIB - 200
    chat = {"messages": HELLO, "max_tokens": 1}
    bodies = [
        (CHAT, json.dumps({"messages": [{"role": "user", "content": "word " * (size // 5)}], "max_tokens": 1})),
        (CHAT, json.dumps({"messages": [{"role": "user", "content": "a"}] * (size // 33), "max_tokens": 1})),
        (CHAT, json.dumps({"messages": [{"role": "user", "content": "a"}] * 4000, "max_tokens": 1})),
        (CHAT, json.dumps({**chat, "stop_token_ids": ["a"] * (size // 6)})),
        (CHAT, json.dumps({**chat, "metadata": {str(i): [[]] for i in range(size // 16)}})),
        (CHAT, json.dumps({**chat, **{f"unknown{i}": 1 for i in range(size // 20)}})),
        (CHAT, json.dumps({**chat, "tools": [TOOL] * (size // 330)})),
        ("/v1/completions", json.dumps({"prompt": [1] * (size // 3), "max_tokens": 1})),
        ("/v1/completions", json.dumps({"prompt": ["a"] * (size // 5)})),
        ("/v1/completions", json.dumps({"prompt": [[1]] * (size // 5)})),
        ("/v1/embeddings", json.dumps({"input": [[1, "a"]] * (size // 10)})),
        (CHAT, "[" * size),
        (CHAT, '{"a":' * (size // 5)),
    ]  # fmt: skip
    for path, body in bodies:

        def longest(path: str = path, body: str = body) -> float:
            slowest.clear()
            status, _, data = server.ask("POST", path, body.encode()[:MIB])
            assert status in (200, 400, 422), data[:200]
            assert len(data) < 2000
            return max(slowest)

        less(max(0.05, 4 * parsing(body)), longest, attempts=10)
    server.idle(20)


def parsing(body: str) -> float:
    """CPU seconds that parsing this body takes, which is one callback: more than 10 ms on a slow machine."""
    seconds = []
    for _ in range(3):
        begun = time.thread_time()
        with contextlib.suppress(ValueError):
            from_json(body.encode()[:MIB], cache_strings=False)
        seconds.append(time.thread_time() - begun)
    return min(seconds)


async def _one(server: Serving, kind: str, seed: int) -> bytes:
    """Run one client; return what it received."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    body = json.dumps({"messages": HELLO, "max_tokens": 20, "seed": seed, "stream": True, "ignore_eos": True})
    if kind == "garbage":
        body = random.Random(seed).choice(["{", "[[[[", '{"messages": 1}', '{"x": 1}', body[:-2]])
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    if kind == "vanishes":
        await reader.read(1000)
        writer.transport.abort()
        return b""
    out = await reader.read(-1)
    writer.close()
    return out


def test_a_crowd_of_which_some_vanish_and_some_send_garbage(slowest):
    async def crowd(server: Serving) -> dict[str, list[bytes]]:
        kinds = ["well"] * 8 + ["vanishes", "garbage"]
        got = await asyncio.gather(*(_one(server, kinds[i % 10], i % 10) for i in range(60)))
        return {kind: [data for i, data in enumerate(got) if kinds[i % 10] == kind] for kind in kinds}

    def longest() -> float:
        slowest.clear()
        with serving(engine=engine) as server:
            got = asyncio.run(crowd(server))
            assert all(data.startswith(b"HTTP/1.1 200 ") for data in got["well"])
            assert all(b"data: [DONE]\n\n" in data for data in got["well"])
            assert len(got["well"]) == 48
            assert all(data.startswith(b"HTTP/1.1 400 ") for data in got["garbage"])
            server.idle(10)
            assert server.llm.engine.counts.finished["abort"] > 0
            assert "error" not in server.llm.engine.counts.finished
        return max(slowest)

    engine = EngineConfig(max_sequences=16, max_batch_tokens=64, page_size=4, max_waiting=100)
    less(0.05, longest)
