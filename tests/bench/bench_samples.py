"""Sample jobs and results for the benchmark tests."""

from __future__ import annotations

import dataclasses
from typing import Any

from mistral_7b.bench.jobs import OURS, Job, Measured
from mistral_7b.bench.records import Record, record
from mistral_7b.bench.roofline import Ceilings
from mistral_7b.model import ModelArgs

SHAPE = ModelArgs(
    dim=64, n_layers=2, head_dim=16, hidden_dim=96, n_heads=4, n_kv_heads=2, vocab_size=160, sliding_window=8
)
ARGS: dict[str, Any] = dataclasses.asdict(SHAPE)
CEILINGS = Ceilings(read_bandwidth=1e9, fp32=1e10, bf16=2e10, int8=4e10, threads=2)


def job_of(engine: str = OURS, scheme: str = "bf16", what: str = "decode", **changes: Any) -> Job:
    return Job(engine, scheme, what, ARGS, **{"prompt": 6, **changes})


def measured(seconds: list[float], tokens: int = 1, **changes: Any) -> Measured:
    facts = {
        "weight_bytes": 10**6,
        "kv_token_bytes": 100,
        "peak_rss_bytes": 10**8,
        "threads": 2,
        "path": "somewhere",
    }
    return Measured(seconds, tokens, **{**facts, "versions": {"torch": "2"}, **changes})  # type: ignore[arg-type]


def record_of(job: Job, found: list[Measured]) -> Record:
    return record(job, found, CEILINGS, cpu="a CPU", date="2026-01-02", commit="abc", model="small")
