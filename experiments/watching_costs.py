"""Measure what recording and steering cost in the running batch, and that their seam costs nothing unused. JSON.

    python experiments/watching_costs.py --model starter --tokens 32 --rounds 30 --json FILE

Sixteen requests decode together, in int8, in three ways that take turns, in the opposite order every other round;
ratios are medians of the pairs of a round, beside their quartiles:

without    the engine with the check of watching.py taken out
unused     the engine as it is, with no request that records or steers
recording  one of the sixteen records the residual stream of every layer
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from typing import Any

from commits import commit_of

import mistral_7b.engine.forward as room
from mistral_7b import LLM, SamplingParams
from mistral_7b.engine.config import EngineConfig
from mistral_7b.engine.inputs import RequestOptions
from mistral_7b.machine import cores, cpu_name

PROMPTS = [[1, *range(100 + i, 116 + i)] for i in range(16)]


def seconds(llm: LLM, tokens: int, asked: list[RequestOptions]) -> float:
    """Seconds of one batch."""
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    began = time.perf_counter()
    llm.generate(PROMPTS, params, asked=asked)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", required=True)
    args = parser.parse_args()
    llm = LLM(args.model, EngineConfig(prefix_caching=False, kv_cache_bytes=1 << 28), quantization="int8")
    plain = [RequestOptions()] * len(PROMPTS)
    seam, times = room.watched, {"without": [], "unused": [], "recording": []}
    for i in range(args.rounds + 1):
        for way, found in list(times.items())[:: 1 - i % 2 * 2]:
            room.watched = (lambda model, plan, batch: model) if way == "without" else seam  # type: ignore[assignment]
            asked = [RequestOptions(record="residual"), *plain[1:]] if way == "recording" else plain
            found.append(seconds(llm, args.tokens, asked))
    rates = {way: len(PROMPTS) * args.tokens / statistics.median(found[1:]) for way, found in times.items()}

    def ratio(a: str, b: str) -> list[float]:
        pairs = [x / y for x, y in zip(times[a][1:], times[b][1:], strict=True)]
        lower, median, upper = statistics.quantiles(pairs, n=4)
        return [round(median, 4), round(lower, 4), round(upper, 4)]

    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "commit": commit_of(),
        "hardware": f"{cpu_name()}, {cores()} cores",
        "command": f"python experiments/watching_costs.py --model {args.model} --tokens {args.tokens} "
                   f"--rounds {args.rounds}",
        "tokens_per_second": {way: round(rate, 1) for way, rate in rates.items()},
        "seconds_unused_over_without": ratio("unused", "without"),
        "seconds_recording_over_unused": ratio("recording", "unused"),
    }  # fmt: skip
    print(json.dumps(record, indent=1))
    with open(args.json, "w", encoding="utf-8") as f:
        json.dump(record, f, indent=1)


if __name__ == "__main__":
    main()
