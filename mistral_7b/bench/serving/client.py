"""Load generator: sends requests at their arrival times and records token times.

The loop is open: a request does not wait for earlier ones, and its latency counts from its drawn arrival time, not
from the time it was sent. The delay of an overloaded engine is therefore visible.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise
from typing import Protocol

from ...errors import BenchmarkError, Mistral7BError
from .traffic import CONTROLS, Arrival

LEAD = 0.05  # seconds to create tasks before the first arrival
WARM_UP = 8  # tokens of the warmup request


class Target(Protocol):
    """Something that answers requests."""

    def stream(self, prompt: list[int], output: int) -> AsyncIterator[int]:
        """Continue a prompt greedily by `output` tokens, ignoring EOS; yield numbers of new tokens."""
        ...


@dataclasses.dataclass(frozen=True)
class Trace:
    """The result of one request; all times in seconds after the first arrival.

    arrived   drawn arrival time
    tokens    arrival time of each token
    prompt    number of prompt tokens
    error     why the completion is incomplete, if it is
    """

    arrived: float
    tokens: list[float]
    prompt: int
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Served:
    """The result of an engine's traffic.

    alone   estimated seconds of the first request without other load
    cached  prompt tokens found in the prefix cache
    """

    traces: list[Trace]
    alone: float
    threads: int
    peak_rss_bytes: int
    path: str
    versions: dict[str, str]
    cached: int = 0

    @classmethod
    def from_dict(cls, fields: dict) -> Served:
        return cls(**{**fields, "traces": [Trace(**t) for t in fields["traces"]]})


async def drive(target: Target, arrivals: Sequence[Arrival]) -> list[Trace]:
    """Send every request at its arrival time. BenchmarkError if none is answered."""
    began = time.perf_counter() + LEAD
    traces = await asyncio.gather(*(_one(target, a, began) for a in arrivals))
    if all(t.error for t in traces):
        raise BenchmarkError(f"no request was answered; the first: {traces[0].error}")
    return traces


async def _one(target: Target, arrival: Arrival, began: float) -> Trace:
    await asyncio.sleep(began + arrival.at - time.perf_counter())
    tokens: list[float] = []
    error = None
    try:
        async for n in target.stream(arrival.prompt, arrival.output):
            tokens += [time.perf_counter() - began] * n
    except Mistral7BError as e:
        error = f"{type(e).__name__}: {e}"
    if error is None and len(tokens) != arrival.output:
        error = f"{len(tokens)} tokens came, not {arrival.output}"
    return Trace(arrival.at, tokens, len(arrival.prompt), error)


async def warm_up(target: Target, arrivals: Sequence[Arrival], vocabulary: int) -> float:
    """Send the first request with other tokens, so that one-time initialization is done.

    The completion is shortened; returns the estimated seconds of the whole request.
    """
    first, draw = arrivals[0], random.Random("warm up")
    prompt = draw.choices(range(min(CONTROLS, vocabulary - 1), vocabulary), k=len(first.prompt))
    times = [time.perf_counter()]
    async for _ in target.stream(prompt, min(WARM_UP, first.output)):
        times.append(time.perf_counter())
    steps = [after - before for before, after in pairwise(times[1:])]
    return times[1] - times[0] + (statistics.median(steps) * (first.output - 1) if steps else 0.0)
