"""Send ten kinds of malformed HTTP, a thousand each: check status and error shape, and measure leaks.

    python experiments/serving_malformed.py --each 1000 --json FILE

truncated JSON · wrong types · huge numbers · invalid UTF-8 · a body of 100 MB · a slow body · header bombs ·
unknown fields · deep nesting · closed early

After each kind, the server's memory, sockets and pages are measured. Slow bodies are sent all at once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving_clients import Server, place, post

HUGE = 100 << 20
ASKED = [{"role": "user", "content": "def"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": ASKED,
        "max_tokens": 2,
        "temperature": 0.5,
        "stop": ["x"],
        "tools": TOOLS,
    },
    "/v1/completions": {"prompt": "def", "max_tokens": 2, "n": 1, "logit_bias": {"5": 1.0}},
    "/v1/embeddings": {"input": ["def", "class"]},
    "/v1/messages": {"model": "demo", "messages": ASKED, "max_tokens": 2},
    "/v1/messages/count_tokens": {"model": "demo", "messages": ASKED},
    "/tokenize": {"prompt": "def"},
    "/detokenize": {"tokens": [1, 2, 3]},
}
WRONG: dict[str, tuple[Any, ...]] = {  # field -> invalid values
    "messages": (3, "x", {}, None, [3], [{"role": 4, "content": "x"}], [{"role": "king", "content": "x"}]),
    "prompt": (True, {"a": 1}, [None], [[{}]]), "input": (True, {"a": 1}, [None], 5),
    "max_tokens": ("2", 2.5, [2], True, -2), "temperature": ("hot", [0.5], True, {}),
    "stop": (5, [5], {"a": 1}, ""), "tools": ("f", [3], {}), "n": ("1", 1.5, True, 0),
    "logit_bias": ([5], {"5": "x"}, "x"), "tokens": ("x", ["x"], {}, 5), "model": (3, [], {}),
}  # fmt: skip
INFINITE = ("1e999", "-1e999", "1" + "0" * 400, "NaN", "-Infinity", "9" * 5000)  # a temperature may be large
NUMBERS = (*INFINITE, str(2**63), str(-(2**63) - 1), "1e308")


@dataclass
class Case:
    """The parts of a request, sent with a pause in between, and the correct statuses.

    Without statuses the client disconnects without waiting.
    """

    parts: Iterator[bytes]
    statuses: tuple[int, ...] = (400,)
    pause: float = 0.0
    code: str | None = None
    linger: float = 0.0  # seconds until a client that does not wait disconnects


Kind = Callable[[random.Random], Case]


def whole(data: bytes, *statuses: int, code: str | None = None) -> Case:
    """Return a request sent in one part."""
    return Case(iter([data]), statuses or (400,), code=code)


def pick(dice: random.Random) -> tuple[str, dict[str, Any]]:
    """Return a random route and a valid body for it."""
    path = dice.choice(list(BODIES))
    return path, dict(BODIES[path])


def truncated(dice: random.Random) -> Case:
    path, body = pick(dice)
    data = json.dumps(body).encode()
    return whole(post(path, data[: dice.randrange(len(data))]))


def wrong_types(dice: random.Random) -> Case:
    path, body = pick(dice)
    names = [name for name in body if name in WRONG and not (name == "model" and path.startswith("/v1/messages"))]
    name = dice.choice(names)
    return whole(post(path, {**body, name: dice.choice(WRONG[name])}))


def huge_numbers(dice: random.Random) -> Case:
    path = dice.choice(["/v1/chat/completions", "/v1/completions", "/v1/messages", "/detokenize"])
    body = dict(BODIES[path])
    name = "tokens" if path == "/detokenize" else dice.choice(["max_tokens", "temperature", "top_k", "top_p"])
    number = dice.choice(INFINITE if name == "temperature" else NUMBERS)
    body.pop(name, None)
    value = f"[{number}]" if name == "tokens" else number
    text = f'{json.dumps(body)[:-1]}{", " if body else ""}"{name}": {value}}}'
    return whole(post(path, text.encode()), 400, 422)


def invalid_utf8(dice: random.Random) -> Case:
    path, body = pick(dice)
    data = json.dumps(body).encode()
    at = data.index(b"def") if b"def" in data else data.index(b'"') + 1
    bad = dice.choice(
        [b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe2\x82", b"\x80", b"\\ud800"]
    )
    return whole(post(path, data[:at] + bad + data[at:]))


def huge_body(dice: random.Random) -> Case:
    path, _ = pick(dice)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    block = b'"' + b"a" * 65535
    if dice.random() < 0.5:
        parts = [f"{head}Content-Length: {HUGE}\r\n\r\n".encode(), *[block] * (HUGE // len(block))]
    else:
        parts = [f"{head}Transfer-Encoding: chunked\r\n\r\n".encode(), *[b"10000\r\n%s\r\n" % block] * 1600]
    return Case(iter(parts), (413,), code="body_too_large")


def slow_body(dice: random.Random) -> Case:
    path, body = pick(dice)
    data = post(path, body)
    at = data.index(b"\r\n\r\n") + 4 if dice.random() < 0.7 else dice.randrange(4, 40)  # or a slow head
    rest = data[at:]
    return Case(iter([data[:at], *(rest[i : i + 1] for i in range(len(rest)))]), (408,), pause=0.5)


def header_bomb(dice: random.Random) -> Case:
    line = "GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"
    size = dice.randint(90_000, 400_000)
    large = (
        f"{line}X-Bomb: {'a' * size}\r\n\r\n", line + "".join(f"X-{i}: b\r\n" for i in range(size // 8)) + "\r\n",
        f"{line}Cookie: {'a=b; ' * (size // 5)}\r\n\r\n", f"GET /{'a' * size} HTTP/1.1\r\nHost: localhost\r\n\r\n",
        f"{line}{'a' * size}: b\r\n\r\n",
    )  # fmt: skip
    wrong = (
        f"{line}{' folded' * 20}\r\nno colon\r\n\r\n",
        f"{line}Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef", f"{line}Content-Length: -5\r\n\r\n",
        f"{line}X: a\x00b\r\n\r\n", f"{line}Transfer-Encoding: squeezed\r\n\r\n", "GET / HTTP/1.1\r\n\r\n",
    )  # fmt: skip
    bomb = dice.choice(large + wrong)
    return whole(bomb.encode(), 431 if bomb in large else 400)


def unknown_fields(dice: random.Random) -> Case:
    path, body = pick(dice)
    name = "".join(dice.choices("abcdefghijklmnopqrstuvwxyz_", k=dice.randint(8, 300)))
    return whole(post(path, {**body, name: dice.choice([1, "x", None, {}, []])}), code="unknown_field")


def deep_nesting(dice: random.Random) -> Case:
    path, body = pick(dice)
    depth = dice.randint(300, 60_000)
    left, right = dice.choice([("[", "]"), ('{"a":', "}"), ('[{"properties":', "}]")])
    name = dice.choice(["messages", "tools", "metadata", "prompt", "input", "x"])
    body.pop(name, None)
    nested = left * depth + "1" + (right * depth if dice.random() < 0.8 else "")
    text = f'{json.dumps(body)[:-1]}{", " if body else ""}"{name}": {nested}}}'
    return whole(post(path, text.encode()))


def closed_early(dice: random.Random) -> Case:
    path = dice.choice(list(BODIES))
    body = {**BODIES[path], "max_tokens": 200} if "max_tokens" in BODIES[path] else BODIES[path]
    if path in ("/v1/chat/completions", "/v1/completions", "/v1/messages") and dice.random() < 0.7:
        body = {**body, "stream": True}
    data = post(path, body)
    cut = dice.choice([len(data), len(data), dice.randrange(len(data))])
    return Case(iter([data[:cut]]), (), linger=dice.choice([0, 0.001, 0.05, 0.3]))


KINDS: dict[str, Kind] = {
    "truncated JSON": truncated, "wrong types": wrong_types, "huge numbers": huge_numbers,
    "invalid UTF-8": invalid_utf8, "100 MB body": huge_body, "slow body": slow_body, "header bombs": header_bomb,
    "unknown fields": unknown_fields, "deep nesting": deep_nesting, "closed early": closed_early,
}  # fmt: skip


# ---------------------------------------------------------------------- sending


@dataclass
class Outcome:
    """The results of one kind."""

    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slowest: float = 0.0


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def send(port: int, case: Case) -> tuple[int, bytes]:
    """Send a request; return status and body of the response, or status 0 if it is not awaited."""
    async with connected(port) as (reader, writer):
        if not case.statuses:
            writer.write(b"".join(case.parts))
            await asyncio.sleep(case.linger)
            return 0, b""
        sender = asyncio.create_task(feed(writer, case))
        try:
            return await asyncio.wait_for(receive(reader), 60)
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)


async def feed(writer: asyncio.StreamWriter, case: Case) -> None:
    for part in case.parts:
        writer.write(part)
        await writer.drain()
        await asyncio.sleep(case.pause)


async def receive(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: (\d+)", head.lower())
    return int(head[9:12]), await reader.readexactly(int(length[1])) if length else b""


def fault(case: Case, status: int, body: bytes) -> str | None:
    """Return what is wrong with a response; None if it is correct."""
    if not case.statuses:
        return None
    if status not in case.statuses:
        return f"status {status} instead of {case.statuses}: {body[:200]!r}"
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return f"no error in the body: {body[:200]!r}"
    if list(error) != ["message", "type", "param", "code"] or not isinstance(error["message"], str):
        return f"invalid shape of an error: {body[:200]!r}"
    if not error["message"] or "Traceback" in error["message"] or len(body) > 2000:
        return f"invalid message of an error: {body[:200]!r}"
    if case.code is not None and error["code"] != case.code:
        return f"code {error['code']!r} instead of {case.code!r}"
    return None


async def bombard(port: int, kind: Kind, count: int, at_once: int, seed: int = 0) -> Outcome:
    """Send `count` requests of a kind, `at_once` concurrently."""
    outcome, numbers = Outcome(), iter(range(count))

    async def sender() -> None:
        for number in numbers:
            case, began = kind(random.Random(seed * count + number)), time.perf_counter()
            try:
                status, body = await send(port, case)
                wrong = fault(case, status, body)
            except (OSError, asyncio.IncompleteReadError, TimeoutError) as e:
                status, wrong = -1, f"no answer: {e!r}"
            outcome.statuses[status] += 1
            outcome.slowest = max(outcome.slowest, time.perf_counter() - began)
            if wrong is not None:
                outcome.wrong.append(f"number {number}: {wrong}")

    await asyncio.gather(*(sender() for _ in range(at_once)))
    return outcome


def measure(server: Server, name: str, each: int) -> dict[str, Any]:
    """Send one kind and return its record."""
    slow = name == "slow body"
    asyncio.run(bombard(server.port, KINDS[name], max(4, each // 20), 8, seed=1))  # warmup
    server.idle()
    rss, sockets, began = server.rss, server.sockets, time.perf_counter()
    outcome = asyncio.run(bombard(server.port, KINDS[name], each, each if slow else 8))
    took, idle = time.perf_counter() - began, server.idle()
    return {
        "kind": name, "sent": each, "wrong": len(outcome.wrong), "first_wrong": outcome.wrong[:3],
        "statuses": {str(k): n for k, n in sorted(outcome.statuses.items())},
        "slowest_seconds": outcome.slowest, "seconds": took,
        "rss_before_mb": rss, "rss_grown_mb": server.rss - rss,
        "sockets_grown": server.sockets - sockets, "pages_held": idle["kv_cache_pages_held"],
        "running": idle["requests_running"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--each", type=int, default=1000)
    parser.add_argument("--only", default="", help="only kinds whose name contains this text")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    room = ["--max-concurrent", "1200", "--max-connections", "2000", "--body-timeout", "5"]
    records, where = [], place()
    with Server(*room) as server:
        for name in KINDS:
            if args.only in name:
                records.append(measure(server, name, args.each))
                print(json.dumps(records[-1]), flush=True)
        mishaps = server.mishaps()
    print(f"mishaps in the log: {len(mishaps)}", *mishaps[:3], sep="\n")
    record = {**where, "options": room, "kinds": records, "mishaps_in_the_log": mishaps[:5]}
    args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
