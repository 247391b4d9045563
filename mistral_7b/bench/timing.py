"""Time the same workload for every engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from ..machine import peak_memory
from .jobs import PROMPTS, STEPS, WARM_UP, Job, Measured, Repetitions


class Engine(Protocol):
    """A loaded model with the rows of one Job."""

    weight_bytes: int  # read by one forward pass: all but the embedding table
    kv_token_bytes: int
    threads: int
    path: str
    versions: dict[str, str]

    def begin(self) -> None:
        """Clear the cache, prefill the prompt in every row, and compute the next logits."""

    def step(self) -> None:
        """Feed each row its most likely token, and compute the next logits."""


def measure(engine: Engine, job: Job) -> Measured:
    """Run and time a job, after a warmup."""
    if job.what == "prefill":
        engine.begin()
        seconds, tokens = repeat(engine.begin, PROMPTS[job.quick]), job.rows * job.prompt
    elif job.what == "load":
        engine.begin()
        seconds, tokens = [time.time() - (job.started or 0)], 1
    else:
        engine.begin()
        for _ in range(WARM_UP):
            engine.step()
        seconds, tokens = repeat(engine.step, STEPS[job.quick]), job.rows
    return Measured(
        seconds=seconds, tokens=tokens, weight_bytes=engine.weight_bytes, kv_token_bytes=engine.kv_token_bytes,
        peak_rss_bytes=peak_memory(), threads=engine.threads, path=engine.path, versions=engine.versions,
    )  # fmt: skip


def repeat(work: Callable[[], None], times: Repetitions) -> list[float]:
    """Return the seconds of each repetition."""
    out: list[float] = []
    end = time.perf_counter() + times.seconds
    while len(out) < times.least or (len(out) < times.most and time.perf_counter() < end):
        began = time.perf_counter()
        work()
        out.append(time.perf_counter() - began)
    return out
