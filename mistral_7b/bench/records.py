"""Benchmark records, one for each engine, scheme and workload."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from ..files import atomic_write
from . import work
from .jobs import Job, Measured
from .roofline import Ceilings


@dataclasses.dataclass(frozen=True)
class Record:
    """One measurement. Rates are medians over all repetitions and rounds.

    tokens_per_s      of all rows together; for load, loads per second (1 / seconds to the first token)
    bytes_per_s       required reads of weights and cache, divided by the measured time
    ceiling_fraction  time at this machine's ceilings, divided by the measured time
    context           tokens in each row's cache at the start; for prefill, the prompt length
    spread            (90th percentile - 10th percentile) / median of the seconds
    """

    engine: str
    scheme: str
    what: str
    tokens_per_s: float
    bytes_per_s: float
    ceiling_fraction: float
    peak_rss_bytes: int
    context: int
    threads: int
    cpu: str
    date: str
    commit: str | None
    versions: dict[str, str]
    model: str
    rows: int
    operations_per_s: float
    read_bandwidth: float  # ceilings measured in the same run
    matrix_peak: float
    seconds: float  # median
    spread: float
    repetitions: int
    path: str
    generate_tokens_per_s: float | None = None

    @property
    def intensity(self) -> float:
        """Arithmetic intensity: operations per byte read."""
        return self.operations_per_s / self.bytes_per_s


def record(
    job: Job, found: list[Measured], ceilings: Ceilings, *, cpu: str, date: str, commit: str | None, model: str
) -> Record:
    """Combine the measurements of one job by several processes into a Record."""
    times = [s for m in found for s in m.seconds]
    seconds, last = statistics.median(times), found[-1]
    ops, size = demand(job, last)
    peak = ceilings.peak(job.scheme)
    rates = [m.generate_tokens_per_s for m in found if m.generate_tokens_per_s]
    return Record(
        engine=job.engine, scheme=job.scheme, what=job.what,
        tokens_per_s=last.tokens / seconds, bytes_per_s=size / seconds,
        ceiling_fraction=work.least_seconds(ops, size, peak, ceilings.read_bandwidth) / seconds,
        peak_rss_bytes=max(m.peak_rss_bytes for m in found), context=job.prompt, threads=last.threads,
        cpu=cpu, date=date, commit=commit, versions=last.versions, model=model, rows=job.rows,
        operations_per_s=ops / seconds, read_bandwidth=ceilings.read_bandwidth, matrix_peak=peak,
        seconds=seconds, spread=spread(times), repetitions=len(times), path=last.path,
        generate_tokens_per_s=statistics.median(rates) if rates else None,
    )  # fmt: skip


def demand(job: Job, found: Measured) -> tuple[int, int]:
    """Return the minimum operations and bytes of one repetition of a job."""
    if job.what in ("prefill", "load"):
        new, held = job.prompt, 0
    else:
        new, held = 1, job.prompt + len(found.seconds) // 2  # context at the middle of the timed steps
    ops = work.operations(job.args, job.rows, held, new)
    size = work.bytes_read(job.args, found.weight_bytes, found.kv_token_bytes, job.rows, held + new)
    return ops, size


def spread(times: list[float]) -> float:
    """Return (90th percentile - 10th percentile) / median; 0 for a single time."""
    if len(times) < 2:
        return 0.0
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return (deciles[-1] - deciles[0]) / statistics.median(times)


def write_json(path: str | os.PathLike[str], records: Sequence[Any]) -> None:
    """Write records (dataclasses) as JSON, atomically. Raises WriteError if writing fails."""
    text = json.dumps([dataclasses.asdict(r) for r in records], indent=1) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> list[Record]:
    """Read records written by `write_json`."""
    data: list[dict[str, Any]] = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    return [Record(**fields) for fields in data]
