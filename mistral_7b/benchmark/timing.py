"""Every engine under the same work, and the clock on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from .jobs import PROMPTS, STEPS, WARM_UP, Job, Measured, Repetitions
from .machine import peak_memory


class Engine(Protocol):
    """A model that is ready to work on the rows of one Job."""

    weight_bytes: int  # that one pass reads: all but the embedding table
    kv_token_bytes: int
    threads: int
    path: str
    versions: dict[str, str]

    def begin(self) -> None:
        """Forget everything, read the prompt into every row, and have the logits that follow it."""

    def step(self) -> None:
        """Feed every row the token its logits were highest for, and have the next logits."""


def measure(engine: Engine, job: Job) -> Measured:
    """Time what the job asks for, after warming up."""
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
    """Seconds of each repetition."""
    out: list[float] = []
    end = time.perf_counter() + times.seconds
    while len(out) < times.least or (len(out) < times.most and time.perf_counter() < end):
        began = time.perf_counter()
        work()
        out.append(time.perf_counter() - began)
    return out
