"""Measure what `serve --ray --replicas 1` costs over `serve`, on the same cores. Writes JSON.

    python experiments/ray_overhead.py --rounds 3 --json FILE

The two servers run in turn and never together: Ray's own processes count as its cost.

first token    REQUESTS single requests one after another: median seconds to the first event of a stream
throughput     STREAMS concurrent streams of several responses each: tokens per second
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import time
from pathlib import Path
from typing import Any

from serving_clients import Client, Server, place, post

REQUESTS, STREAMS, ANSWERS, TOKENS = 60, 32, 3, 96
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.pop("RAY_ADDRESS", None)


def question(number: int, tokens: int) -> bytes:
    """A request for a stream of `tokens` tokens, with a prompt of its own."""
    prompt = [1, *(10 + (number * 7919 + i * 104729) % 4000 for i in range(31))]
    body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": True}
    return post("/v1/completions", body)


async def measure(port: int) -> dict[str, float]:
    """The median time to the first token in seconds, and tokens per second of concurrent streams."""
    client = await Client.connect(port)
    first = []
    for number in range(-5, REQUESTS):  # the first five are not counted
        began = time.perf_counter()
        await client.ask(question(number + 5, 1))
        first.append(time.perf_counter() - began)
    clients = [await Client.connect(port) for _ in range(STREAMS)]

    async def stream(n: int) -> None:
        for answer in range(ANSWERS):
            done = await clients[n].ask(question(1000 + n * ANSWERS + answer, TOKENS))
            assert done.whole, done
            assert not done.failed, done.body

    began = time.perf_counter()
    await asyncio.gather(*map(stream, range(STREAMS)))
    rate = STREAMS * ANSWERS * TOKENS / (time.perf_counter() - began)
    return {"first_token": statistics.median(first[5:]), "tokens_per_second": rate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="starter")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    options = (args.model, "--quantization", "int8", "--kv-cache-bytes", "400000000", "--quiet")
    ways = {"serve": (), "serve --ray": ("--ray", "--replicas", "1")}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, flags in ways.items():
            server = Server(*options, *flags)
            try:
                rounds[name].append(asyncio.run(measure(server.port)))
            finally:
                server.end(signal.SIGTERM)
            print(name, rounds[name][-1], flush=True)
    middle: dict[str, Any] = {
        name: {key: statistics.median(r[key] for r in several) for key in several[0]}
        for name, several in rounds.items()
    }
    bare, ray = middle["serve"], middle["serve --ray"]
    result = {
        **place(), "command": f"python experiments/ray_overhead.py --model {args.model} --rounds {args.rounds}",
        "first_token_overhead_ms": round(1e3 * (ray["first_token"] - bare["first_token"]), 2),
        "throughput_ratio": round(ray["tokens_per_second"] / bare["tokens_per_second"], 4),
        "medians": middle, "rounds": rounds,
    }  # fmt: skip
    print(json.dumps({key: result[key] for key in ("first_token_overhead_ms", "throughput_ratio")}))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
