"""Requests sent at their time, and the time of every token that comes back.

The loop is open: who arrives does not wait for who came before, and time is counted from the moment that was
drawn for a request, not from when somebody got round to sending it. So an engine that falls behind shows it.
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

LEAD = 0.05  # seconds in which tasks are made before the first request arrives
WARM_UP = 8  # tokens of the request that nobody times


class Target(Protocol):
    """What answers requests."""

    def stream(self, prompt: list[int], output: int) -> AsyncIterator[int]:
        """Continue a prompt greedily by `output` tokens, whatever they are: how many have come, as they come."""
        ...


@dataclasses.dataclass(frozen=True)
class Trace:
    """What became of one request; all times in seconds after the first arrival.

    arrived   as it was drawn
    tokens    when each came
    prompt    how many tokens were sent
    error     why no more came, if there should have
    """

    arrived: float
    tokens: list[float]
    prompt: int
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Served:
    """What an engine made of its traffic.

    alone   seconds that the first request would take if it were alone, nearly
    cached  tokens of prompts that had not to be computed
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
    """Send every request at its time. BenchmarkError if none of them is answered."""
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
    """The first request with other tokens: whatever is made at first use is there afterwards.

    It is cut short; returns the seconds that the whole of it would take.
    """
    first, draw = arrivals[0], random.Random("warm up")
    prompt = draw.choices(range(min(CONTROLS, vocabulary - 1), vocabulary), k=len(first.prompt))
    times = [time.perf_counter()]
    async for _ in target.stream(prompt, min(WARM_UP, first.output)):
        times.append(time.perf_counter())
    steps = [after - before for before, after in pairwise(times[1:])]
    return times[1] - times[0] + (statistics.median(steps) * (first.output - 1) if steps else 0.0)
