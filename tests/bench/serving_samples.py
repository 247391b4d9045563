"""Sample serving jobs and results for the tests."""

from __future__ import annotations

from typing import Any

from bench_samples import ARGS

from mistral_7b.bench.serving.client import Served, Trace
from mistral_7b.bench.serving.records import Circumstances
from mistral_7b.bench.serving.traffic import ServingJob, Traffic

HERE = Circumstances("a CPU", "2026-01-02", "abc", "mistral-7b bench --serving", "small")


def job_of(engine: str, scheme: str = "int4", **changes: Any) -> ServingJob:
    usual = {
        "args": ARGS, "source": None, "traffic": Traffic(2, None, (5, 5), (3, 3)), "max_sequences": 4,
        "max_batch_tokens": 64,
    }  # fmt: skip
    return ServingJob(engine, scheme, **{**usual, **changes})


def served(*traces: Trace, **changes: Any) -> Served:
    facts = {"alone": 1.0, "threads": 2, "peak_rss_bytes": 10**8, "path": "somewhere", "versions": {"torch": "2"}}
    return Served(list(traces), **{**facts, **changes})
