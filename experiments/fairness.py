"""How long a small request waits while another client keeps the server busy.

    python experiments/fairness.py [--json FILE] [--rounds 20]

A server of the bundled model gets one of three loads with the key "greedy", and one after another requests of one
token with the key "modest". As the control, the same requests are sent with the key "greedy".

    requests     500 concurrent requests of 128 tokens
    completions  one request of 128 prompts with n=16, of 128 tokens each
    embeddings   100 concurrent requests to embed 2,000 tokens
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Any

from serving_clients import Client, Server, place, post

GREEDY, MODEST = "Authorization: Bearer greedy", "Authorization: Bearer modest"
SMALL = {"prompt": "def ", "max_tokens": 1}
LOADS: dict[str, tuple[str, dict[str, Any], int]] = {
    "requests": ("/v1/completions", {"prompt": "import ", "max_tokens": 128, "ignore_eos": True}, 500),
    "completions": (
        "/v1/completions",
        {"prompt": ["import "] * 128, "n": 16, "max_tokens": 128, "ignore_eos": True},
        1,
    ),
    "embeddings": ("/v1/embeddings", {"input": "word " * 1000}, 100),
}


async def small_requests(port: int, key: str, rounds: int, limit: float) -> list[float]:
    """Seconds that each of up to `rounds` small requests took; those after `limit` seconds are not sent."""
    took: list[float] = []
    end = time.perf_counter() + limit
    while len(took) < rounds and time.perf_counter() < end:
        began = time.perf_counter()
        answer = await (await Client.connect(port)).ask(post("/v1/completions", SMALL, [key]))
        if answer.status != 200:
            raise RuntimeError(f"the small request got status {answer.status}: {answer.body[:300]!r}")
        took.append(time.perf_counter() - began)
    return took


async def measure(port: int, name: str, key: str, rounds: int) -> dict[str, Any]:
    """Send one of the LOADS, and small requests with `key` beside it."""
    path, body, n = LOADS[name]
    clients = [await Client.connect(port) for _ in range(n)]
    began = time.perf_counter()
    answers = [client.ask(post(path, body, [GREEDY])) for client in clients]
    await asyncio.sleep(1.0)
    took = await small_requests(port, key, rounds, 120)
    busy = sum(not a.done() for a in answers)  # else there was nothing to wait for
    for client in clients:
        client.leave()
    statuses = {a.result().status for a in answers if a.done()}
    return {
        "load": name, "key": key.rpartition(" ")[2], "rounds": len(took), "longest_s": max(took),
        "median_s": statistics.median(took), "load_in_progress_at_the_end": busy,
        "seconds": time.perf_counter() - began, "statuses_of_the_load": sorted(statuses),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument("--rounds", type=int, default=20, help="small requests beside each load")
    options = parser.parse_args()
    record: dict[str, Any] = {**place(), "rows": []}
    for name in LOADS:
        for key, rounds in ((MODEST, options.rounds), (GREEDY, 1)):
            with Server("--api-key", "greedy", "--api-key", "modest", "--max-waiting", "4096") as server:
                row = asyncio.run(measure(server.port, name, key, rounds))
            record["rows"].append(row)
            print(f"{name:12} as {row['key']:7} longest {row['longest_s']:6.2f} s  median {row['median_s']:6.2f} s"
                  f"  still in progress {row['load_in_progress_at_the_end']}", flush=True)  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
