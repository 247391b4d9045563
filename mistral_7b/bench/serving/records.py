"""Serving records: throughput, latency percentiles, and whether the engine kept up."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from itertools import pairwise

from ..records import spread
from .client import Served, Trace
from .traffic import ServingJob, Span

PERCENTILES = (50, 95, 99)
FEW = 10  # minimum arrivals for `kept_up`
Times = dict[str, float]  # "p50", "p95", "p99" -> seconds


@dataclasses.dataclass(frozen=True)
class ServingRecord:
    """One engine at one rate. Rates are medians over rounds; times cover the requests of all rounds.

    rate              arrivals per second, None: all at once
    requests_per_s    completed requests, from the first arrival to the last token
    tokens_per_s      of completions; total_tokens_per_s includes prompts
    first_token       seconds from the arrival to the first token
    between_tokens    seconds between consecutive tokens of a request
    latency           seconds from the arrival to the last token
    unfinished        requests not completed at the last arrival, in the worst round
    kept_up           whether completions matched arrivals, apart from chance; None: unknown, or all at once
    failed            requests that were never completed
    max_batch_tokens  of this package's engine; the peer sets its own
    cached_tokens     prompt tokens found in the prefix cache
    """

    engine: str
    scheme: str
    what: str
    rate: float | None
    requests: int
    requests_per_s: float
    tokens_per_s: float
    total_tokens_per_s: float
    first_token: Times
    between_tokens: Times
    latency: Times
    unfinished: int
    kept_up: bool | None
    failed: int
    prompt: Span
    output: Span
    shared: float
    seed: int
    cached_tokens: int
    max_sequences: int
    max_batch_tokens: int
    seconds: float
    spread: float
    rounds: int
    peak_rss_bytes: int
    threads: int
    cpu: str
    date: str
    commit: str | None
    command: str
    versions: dict[str, str]
    model: str
    path: str

    @property
    def name(self) -> str:
        """Number and rate of requests, for display."""
        return f"{self.requests} at once" if self.rate is None else f"{self.requests} at {self.rate:g}/s"


@dataclasses.dataclass(frozen=True)
class Circumstances:
    """Fields common to all records of a run."""

    cpu: str
    date: str
    commit: str | None
    command: str
    model: str


def record(job: ServingJob, rounds: Sequence[Served], here: Circumstances) -> ServingRecord:
    """Combine several rounds of one job."""
    answered = [[t for t in served.traces if not t.error] for served in rounds]
    complete, t, last = [t for traces in answered for t in traces], job.traffic, rounds[-1]
    seconds = [max(t.tokens[-1] for t in traces) for traces in answered]
    generated = [sum(len(t.tokens) for t in traces) for traces in answered]
    prompts = [sum(t.prompt for t in traces) for traces in answered]
    verdicts = [kept_up(s) if t.rate is not None else None for s in rounds]
    return ServingRecord(
        engine=job.engine, scheme=job.scheme, what="serving", rate=t.rate, requests=t.requests,
        requests_per_s=statistics.median(len(a) / s for a, s in zip(answered, seconds, strict=True)),
        tokens_per_s=statistics.median(n / s for n, s in zip(generated, seconds, strict=True)),
        total_tokens_per_s=statistics.median(
            (n + p) / s for n, p, s in zip(generated, prompts, seconds, strict=True)
        ),
        first_token=percentiles([t.tokens[0] - t.arrived for t in complete]),
        between_tokens=percentiles([after - before for t in complete for before, after in pairwise(t.tokens)]),
        latency=percentiles([t.tokens[-1] - t.arrived for t in complete]),
        unfinished=max(unfinished(s.traces) for s in rounds),
        kept_up=None if None in verdicts else all(verdicts),
        failed=sum(bool(t.error) for s in rounds for t in s.traces),
        prompt=t.prompt, output=t.output, shared=t.shared, seed=t.seed, cached_tokens=last.cached,
        max_sequences=job.max_sequences, max_batch_tokens=job.max_batch_tokens,
        seconds=statistics.median(seconds), spread=spread(seconds), rounds=len(rounds),
        peak_rss_bytes=max(s.peak_rss_bytes for s in rounds), threads=last.threads, versions=last.versions,
        path=last.path, **dataclasses.asdict(here),
    )  # fmt: skip


def percentiles(seconds: Sequence[float]) -> Times:
    """Return percentiles, linearly interpolated; 0 without data."""
    if len(seconds) < 2:
        return {f"p{p}": seconds[0] if seconds else 0.0 for p in PERCENTILES}
    hundredths = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"p{p}": hundredths[p - 1] for p in PERCENTILES}


def unfinished(traces: Sequence[Trace]) -> int:
    """Return the number of requests not completed at the last arrival, including the last one."""
    last = max(t.arrived for t in traces)
    return sum(t.error is not None or t.tokens[-1] > last for t in traces)


def kept_up(served: Served) -> bool | None:
    """Return whether completions matched arrivals in the second half of the arrival time.

    The queue grows without bound if it has grown by more than a tenth of the arrivals and by more than chance
    explains: two standard deviations of the difference of two Poisson counts, each at least the mean number of
    requests in the system (by Little's law: arrival rate times the latency of a single request). None if there are
    too few arrivals, or if a single request takes more than half of the time.
    """
    traces = served.traces
    last = max(t.arrived for t in traces)
    arrivals = sum(t.arrived > last / 2 for t in traces)
    alone = min(served.alone, *(t.tokens[-1] - t.arrived for t in traces if not t.error))
    if arrivals < FEW or alone > last / 2:
        return None
    completions = sum(not t.error and last / 2 < t.tokens[-1] <= last for t in traces)
    in_system = arrivals * alone / (last / 2)
    return arrivals - completions <= max(0.1 * arrivals, 2 * math.sqrt(2 * in_system))
