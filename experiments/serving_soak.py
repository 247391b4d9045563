"""Soak test of the server with misbehaving clients: errors, memory, pages, event loop. Writes JSON.

    python experiments/serving_soak.py --clients 200 --minutes 10 --json FILE

All clients stream from the bundled model concurrently. Of fifteen, one repeatedly disconnects during a response,
one sends garbage, and three are greedy: with one API key they send large requests, as many as they can, and open
idle connections. The others have keys of their own and must not be affected.

    errors              responses to well-behaved clients that were refused, cut off or incomplete
    memory              resident memory, and the slope of its linear fit after a fifth of the time
    pages               KV pages held after all clients have disconnected
    event loop          its lag; "blocked": without the time its thread waited for a core
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving_clients import Client, Server, place, post, read_metrics, slope

CHAT = "/v1/chat/completions"
KEYS, GREEDY = ("one", "two", "three", "four"), "greedy"
WORDS = ["def", "class", "return", "import", "for", "while", "print", "open", "read", "write", "list", "sum"]
GARBAGE = [
    b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x00" * 300 + b"\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    b"GET /" + b"a" * 90_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", post(CHAT, b'{"messages": [{"role"'),
    b"GET /" + b"a" * 90_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", post(CHAT, b"{\"messages\": [{"),
    post("/v1/messages", {"model": "m", "messages": [], "max_tokens": 10**30}), post("/nowhere", b"{}"),
]  # fmt: skip


@dataclass
class Tally:
    """The results of the clients, and the server's metrics."""

    answers: int = 0
    events: int = 0
    vanished: int = 0
    greedy: Counter[int] = field(default_factory=Counter)  # statuses
    seconds: list[float] = field(default_factory=list)  # to the last token, of well-behaved clients
    garbage: Counter[int] = field(default_factory=Counter)  # statuses
    errors: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # minutes
    rss: list[float] = field(default_factory=list)  # MB
    first: dict[str, float] = field(default_factory=dict)  # metrics after the warm-up


def bearer(key: str) -> list[str]:
    return [f"Authorization: Bearer {key}"]


def question(dice: random.Random, tokens: int, key: str) -> bytes:
    """Return a streaming request for `tokens` tokens with a random prompt."""
    text = " ".join(dice.choices(WORDS, k=dice.randint(3, 40)))
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "stream": True,
            "ignore_eos": True, "temperature": dice.choice([0.0, 0.8])}  # fmt: skip
    return post(CHAT, body, bearer(key))


async def behave(port: int, tally: Tally, end: float, dice: random.Random) -> None:
    """Send requests and read complete responses over one connection."""
    client = await Client.connect(port)
    while time.monotonic() < end:
        sent = time.monotonic()
        answer = await client.ask(question(dice, dice.randint(16, 96), dice.choice(KEYS)))
        if answer.status == 200 and answer.whole and not answer.failed and answer.body:
            tally.answers += 1
            tally.events += answer.events
            tally.seconds.append(time.monotonic() - sent)
        else:
            tally.errors.append(f"status {answer.status}, whole {answer.whole}, {answer.body[-200:]!r}")
            await asyncio.sleep(0.5)
            client = await Client.connect(port)
    client.leave()


async def vanish(port: int, tally: Tally, end: float, dice: random.Random) -> None:
    """Send requests and disconnect before or during the response."""
    while time.monotonic() < end:
        client = await Client.connect(port)
        answer = client.ask(question(dice, 200, dice.choice(KEYS)), leave_after=dice.randint(1, 60))
        await asyncio.wait([answer], timeout=dice.choice([0.01, 0.3, 3, 30]))
        client.leave()
        tally.vanished += 1
        await asyncio.sleep(dice.random())


async def babble(port: int, tally: Tally, end: float, dice: random.Random) -> None:
    """Send garbage."""
    while time.monotonic() < end:
        client = await Client.connect(port)
        answer = client.ask(dice.choice([*GARBAGE, dice.randbytes(200) + b"\r\n\r\n"]))
        await asyncio.wait([answer], timeout=5)
        tally.garbage[client.answer.status] += 1
        client.leave()
        await asyncio.sleep(dice.random())


async def grab(port: int, tally: Tally, end: float, dice: random.Random) -> None:
    """Send large requests without a pause, and hold idle connections, all with one key."""
    large = [
        ("/v1/completions", {"prompt": ["import "] * 16, "n": 8, "max_tokens": 128, "ignore_eos": True}),
        ("/v1/completions", {"prompt": "def ", "n": 16, "max_tokens": 512, "ignore_eos": True, "stream": True}),
        ("/v1/embeddings", {"input": ["word " * 400] * 16}),
        (CHAT, {"messages": [{"role": "user", "content": "list " * 1500}], "max_tokens": 200}),
    ]
    idle = [await Client.connect(port) for _ in range(10)]
    while time.monotonic() < end:
        client = await Client.connect(port)
        answer = client.ask(post(*dice.choice(large), bearer(GREEDY)))
        await asyncio.wait([answer], timeout=max(0.1, min(60, end - time.monotonic())))
        tally.greedy[client.answer.status] += 1
        client.leave()
        if client.answer.status in (429, 503):
            await asyncio.sleep(0.05)
    for each in idle:
        each.leave()


async def watch(server: Server, tally: Tally, began: float, end: float) -> None:
    """Record the server's memory every second, and its metrics after the warmup."""
    warm = began + (end - began) / 5
    while (now := time.monotonic()) < end:
        if now >= warm:
            if not tally.first:
                tally.first = await scrape(server.port)
            tally.times.append((now - began) / 60)
            tally.rss.append(server.rss)
        await asyncio.sleep(min(1.0, (end - began) / 60))


async def scrape(port: int) -> dict[str, float]:
    """Read /metrics without blocking the clients."""
    client = await Client.connect(port)
    head = f"GET /metrics HTTP/1.1\r\nHost: localhost\r\n{bearer(KEYS[0])[0]}\r\n\r\n"
    answer = await client.ask(head.encode())
    client.leave()
    return read_metrics(answer.body)


async def soak(server: Server, clients: int, seconds: float, seed: int = 0) -> tuple[Tally, dict[str, float]]:
    """Run all clients for `seconds`; return the tally and the final metrics."""
    tally, began = Tally(), time.monotonic()
    end, odd = began + seconds, max(1, clients // 15)
    kinds = [vanish] * odd + [babble] * odd + [grab] * 3 * odd + [behave] * (clients - 5 * odd)
    await asyncio.gather(
        watch(server, tally, began, end),
        *(kind(server.port, tally, end, random.Random(seed + i)) for i, kind in enumerate(kinds)),
    )
    return tally, await scrape(server.port)


def summary(server: Server, tally: Tally, last: dict[str, float], seconds: float) -> dict[str, Any]:
    """Return the record."""
    idle = server.idle()
    ran = seconds * 4 / 5

    def since(name: str) -> float:
        return last[name] - tally.first[name]

    def over(what: str) -> dict[str, float]:
        total = since(f"event_loop_{what}_seconds_count")
        bounds = ("0.01", "0.025", "0.05", "0.1", "0.25")
        return {f"over {b} s": total - since(f'event_loop_{what}_seconds_bucket{{le="{b}"}}') for b in bounds}

    return {
        "answers": tally.answers, "errors": len(tally.errors), "first_errors": tally.errors[:5],
        "greedy_statuses": {str(k): n for k, n in sorted(tally.greedy.items())},
        "seconds_median": statistics.median(tally.seconds), "seconds_longest": max(tally.seconds),
        "vanished": tally.vanished, "garbage_statuses": {str(k): n for k, n in sorted(tally.garbage.items())},
        "requests_a_second": since("requests_total") / ran,
        "tokens_a_second": since("generation_tokens_total") / ran,
        "rss_mb": [round(mb, 1) for mb in tally.rss[:: max(1, len(tally.rss) // 32)]],
        "rss_most_mb": max(tally.rss),
        "rss_slope_mb_a_minute": slope(tally.times, tally.rss),
        "pages_held_at_the_end": idle["kv_cache_pages_held"], "running_at_the_end": idle["requests_running"],
        "sockets_at_the_end": server.sockets, "preemptions": last["preemptions_total"],
        "loop_looked_at": since("event_loop_lag_seconds_count"), "loop_late": over("lag"),
        "loop_blocked": over("blocked"),
        "loop_longest_late_seconds": last["event_loop_longest_lag_seconds"],
        "loop_longest_block_seconds": last["event_loop_longest_block_seconds"],
        "mishaps_in_the_log": server.mishaps()[:5],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    where = place()
    keys = [option for key in (*KEYS, GREEDY) for option in ("--api-key", key)]
    with Server(*keys, key=KEYS[0]) as server:
        seconds = args.minutes * 60
        tally, last = asyncio.run(soak(server, args.clients, seconds))
        record = summary(server, tally, last, seconds)
        record["seconds_until_ready"] = server.seconds
        server.end(signal.SIGTERM)
    head = {**where, "load_after": place()["load"], "clients": args.clients, "minutes": args.minutes}
    args.json.write_text(json.dumps({**head, **record}, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
