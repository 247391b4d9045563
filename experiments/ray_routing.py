"""Compare prefix routing with round robin and the power of two choices, on conversations of several turns.

    python experiments/ray_routing.py --conversations 24 --turns 5 --replicas 2 --json FILE

CONCURRENT conversations run at a time, with random pauses; each has its own system prompt, and each turn sends all
before it. Same seeds for each policy, new replicas for each. Per policy: the share of prompt tokens found in a
prefix cache, and the time to the first token of all turns but the first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import secrets
import statistics
import time
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from commits import commit_of

CONCURRENT = 6
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
os.environ.pop("RAY_ADDRESS", None)

from ray.serve.request_router import RunningReplica  # noqa: E402

from mistral_7b.engine.config import EngineConfig  # noqa: E402
from mistral_7b.machine import cores, cpu_name  # noqa: E402
from mistral_7b.sampling.params import SamplingParams  # noqa: E402
from mistral_7b.server.config import ServerConfig  # noqa: E402
from mistral_7b.server.ray_app import Options, _open, start  # noqa: E402
from mistral_7b.server.ray_app.remote import RemoteLLM  # noqa: E402
from mistral_7b.server.ray_app.router import PrefixRouter  # noqa: E402
from mistral_7b.server.ray_app.wire import Route  # noqa: E402


class RoundRobin(PrefixRouter):
    """The replicas in turn."""

    turn = 0

    def ranked(self, replicas: list[RunningReplica], route: Route | None) -> list[RunningReplica]:
        self.turn += 1
        ordered = sorted(replicas, key=lambda r: str(r.replica_id))
        at = self.turn % len(ordered)
        return ordered[at:] + ordered[:at]


class PowerOfTwo(PrefixRouter):
    """The less loaded of two random replicas."""

    def ranked(self, replicas: list[RunningReplica], route: Route | None) -> list[RunningReplica]:
        shuffled = random.sample(replicas, len(replicas))
        return sorted(shuffled[:2], key=self.load) + shuffled[2:]


POLICIES = {"prefix": PrefixRouter, "round-robin": RoundRobin, "power-of-two": PowerOfTwo}


async def measure(llm: RemoteLLM, conversations: int, turns: int) -> dict[str, Any]:
    """Run the conversations; return the hit rate and times to the first token in seconds."""
    dice, free = random.Random(1), asyncio.Semaphore(CONCURRENT)
    found = total = 0
    first: list[float] = []

    async def conversation(number: int) -> None:
        nonlocal found, total
        facts = " ".join(f"item {dice.randrange(10**6)}" for _ in range(60))
        messages = [{"role": "system", "content": f"You are clerk {number}. {facts}"}]
        for turn in range(turns):
            await asyncio.sleep(dice.uniform(0, 1))
            messages.append({"role": "user", "content": f"Question {turn} of {number}: what comes next?"})
            async with free:
                began, text, cached = time.perf_counter(), "", None
                async for output in llm.chat(messages, SamplingParams(temperature=0, max_tokens=24)):
                    if cached is None:
                        cached, size = output.num_cached_tokens, len(output.prompt_token_ids)
                        seconds = time.perf_counter() - began
                    text = output.outputs[0].text
            found, total = found + (cached or 0), total + size
            if turn:
                first.append(seconds)
            messages.append({"role": "assistant", "content": text or "Nothing."})

    await asyncio.gather(*map(conversation, range(conversations)))
    spread = statistics.quantiles(first, n=20)
    return {"hit_rate": round(found / total, 4), "prompt_tokens": total, "first_token_median": round(spread[9], 4),
            "first_token_p95": round(spread[18], 4)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--conversations", type=int, default=24)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    engine = EngineConfig(max_waiting=256, kv_cache_bytes=256 << 20)
    options = Options(model=args.model, quantization="int8", threads=max(1, cores() // args.replicas))
    results = {}
    for name, router in POLICIES.items():
        opened = partial(_open, options, engine)
        llm, end = start(opened, engine, ServerConfig(), str(args.replicas), options.threads or 1, 1, "cpu", {},
                         request_router_class=router)  # fmt: skip
        try:
            results[name] = asyncio.run(measure(llm, args.conversations, args.turns))
        finally:
            end()
        print(name, results[name], flush=True)
    if args.json:
        record = {
            "date": str(date.today()), "hardware": f"{cores()} cores, {cpu_name()}", "commit": commit_of(),
            "command": f"python experiments/ray_routing.py --conversations {args.conversations} "
            f"--turns {args.turns} --replicas {args.replicas} --model {args.model}",
            "concurrent": CONCURRENT, "policies": results,
        }  # fmt: skip
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
