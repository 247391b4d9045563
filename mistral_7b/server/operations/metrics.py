"""GET /metrics: Prometheus metrics of the engine, the event loop and HTTP.

    source         metrics                                                               updated
    engine         requests running and waiting, pages, tokens, preemptions, drafts      at each scrape
    event loop     lag                                                                   100 times per second
    `answer`       time to first token, inter-token latency, queue time, finish reasons  by Observer calls
    guard          HTTP requests by route, method and status                             by an Observer call

Label values are bounded: routes are path templates of the application, and unknown methods become "other".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import Response

from ... import __version__
from ...engine.async_llm import AsyncLLM
from ...engine.request import Request
from ..state import State

PREFIX = "mistral_7b_"
REASONS = ("stop", "length", "abort", "timeout", "shutdown", "refused", "error")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10)
TO_FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 20, 30, 45, 60, 90, 120, 240, 480, 960)
LAG = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


class Metrics:
    """An Observer that records metrics, in one registry with the engine's counters."""

    def __init__(self, state: State) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(state))
        self.registry.register(_ServerCollector(state))
        ProcessCollector(registry=self.registry)
        self._arrived = Counter(PREFIX + "requests", "Requests received", registry=self.registry)
        self._finished = Counter(
            PREFIX + "requests_finished", "Finished requests, by reason", ["reason"], registry=self.registry
        )
        for reason in REASONS:  # export 0 from the start: rate() needs a first sample
            self._finished.labels(reason)
        self._first = self._histogram(
            "time_to_first_token_seconds", "Time from arrival to the first token", TO_FIRST_TOKEN
        )
        self._inter = self._histogram(
            "inter_token_latency_seconds", "Time between two tokens of one response", BETWEEN_TOKENS
        )
        self._whole = self._histogram("request_latency_seconds", "Time from arrival to the last token", WHOLE)
        self._queued = self._histogram(
            "request_queue_time_seconds", "Time from arrival to the first step", TO_FIRST_TOKEN
        )
        self._prompt = self._histogram("request_prompt_tokens", "Prompt tokens per request", TOKENS)
        self._answer = self._histogram("request_generation_tokens", "Generated tokens per request", TOKENS)
        self._lag = self._histogram("event_loop_lag_seconds", "Lag of the event loop", LAG)
        self._blocked = self._histogram(
            "event_loop_blocked_seconds", "Lag of the event loop, without waits for a core", LAG
        )
        self._longest = [
            Gauge(PREFIX + name, help, registry=self.registry)
            for name, help in (
                ("event_loop_longest_lag_seconds", "Maximum lag of the event loop since the start"),
                ("event_loop_longest_block_seconds", "Maximum lag since the start, without waits for a core"),
            )
        ]
        self._most = [0.0, 0.0]
        self._answered = Counter(
            PREFIX + "http_requests", "Finished HTTP requests", ["route", "method", "status"],
            registry=self.registry,
        )  # fmt: skip
        self._took = Histogram(
            PREFIX + "http_request_duration_seconds", "From a request's head to the end of its answer",
            ["route", "method"], buckets=WHOLE, registry=self.registry,
        )  # fmt: skip

        by_key = ["key", "adapter"]
        self._key_requests = Counter(
            PREFIX + "key_requests", "Finished requests, by key and adapter", by_key, registry=self.registry
        )
        self._key_tokens = Counter(
            PREFIX + "key_tokens", "Prompt and generated tokens of finished requests, by key and adapter",
            [*by_key, "kind"], registry=self.registry,
        )  # fmt: skip

    def _histogram(self, name: str, help: str, buckets: Iterable[float]) -> Histogram:
        return Histogram(PREFIX + name, help, buckets=tuple(buckets), registry=self.registry)

    def arrived(self, request: Request) -> None:
        self._arrived.inc()
        self._prompt.observe(len(request.ids))

    def first_token(self, request: Request, seconds: float) -> None:
        self._first.observe(seconds)

    def inter_token(self, seconds: float, tokens: int) -> None:
        for _ in range(tokens):  # a piece of a busy server has many
            self._inter.observe(seconds)

    def ended(self, request: Request, reason: str, seconds: float) -> None:
        self._finished.labels(reason if reason in REASONS else "error").inc()
        if reason == "refused":  # rejected at once: it would lower the latency statistics
            return
        self._whole.observe(seconds)
        generated = sum(len(c.token_ids) for c in request.completions) if request.pooling is None else 0
        labels = request.client, request.adapter or ""
        self._key_requests.labels(*labels).inc()
        self._key_tokens.labels(*labels, "prompt").inc(len(request.ids))
        self._key_tokens.labels(*labels, "generation").inc(generated)
        if (queued := request.metrics.queue_time) is not None:
            self._queued.observe(queued)
        if request.pooling is None:
            self._answer.observe(generated)

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        route, method = route or "none", method if method in METHODS else "other"
        self._answered.labels(route, method, str(status)).inc()
        self._took.labels(route, method).observe(seconds)

    def lagged(self, late: float, blocked: float) -> None:
        self._lag.observe(late)
        self._blocked.observe(blocked)
        for i, seconds in enumerate((late, blocked)):
            if seconds > self._most[i]:
                self._most[i] = seconds
                self._longest[i].set(seconds)


class _EngineCollector(Collector):
    """Exports the engine's counters, or those of the engines elsewhere with a label `replica`."""

    def __init__(self, state: State) -> None:
        self.state = state

    def collect(self) -> Iterator[Metric]:
        info = {"version": __version__, "model": self.state.model_name}
        yield InfoMetricFamily(PREFIX + "build", "Version and model", info)
        if self.state.replicas is None:
            yield from engine_metrics(self.state.llm)
            return
        families: dict[str, Metric] = {}
        for replica, metrics in self.state.replicas():
            for metric in metrics:
                family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                family.samples += [s._replace(labels={**s.labels, "replica": replica}) for s in metric.samples]
        yield from families.values()


def engine_metrics(llm: AsyncLLM) -> Iterator[Metric]:
    """An engine's counters. The engine keeps running meanwhile, so values may be a step apart."""
    engine = llm.engine
    for name, help, value in (
        (
            "requests_running",
            "Running requests",
            len({s.request for s in list(engine.scheduler.running)}),
        ),
        ("sequences_running", "Running sequences", len(engine.scheduler.running)),
        ("requests_waiting", "Requests in the queue, preempted ones included", engine.scheduler.waiting),
        ("kv_cache_usage_ratio", "Fraction of the KV pages in use", engine.pool.held / engine.pool.n_pages),
        ("kv_cache_pages_held", "KV pages in use by requests", engine.pool.held),
        ("kv_cache_pages", "KV pages in total", engine.pool.n_pages),
        ("adapters_loaded", "Loaded LoRA adapters", len(engine.adapters.names)),
        ("engine_broken", "1 after an engine failure, else 0", int(llm.broken is not None)),
    ):
        yield GaugeMetricFamily(PREFIX + name, help, value)
    counts = engine.counts
    for name, help, value in (
        ("steps", "Engine steps", counts.steps),
        ("prompt_tokens", "Prompt tokens of started requests", counts.prompt_tokens),
        ("generation_tokens", "Generated tokens", counts.generated_tokens),
        (
            "computed_tokens",
            "Tokens fed to the model, recomputed and rejected included",
            counts.computed_tokens,
        ),
        ("preemptions", "Preemptions of sequences", counts.preemptions),
        ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", counts.prompt_tokens),
        ("prefix_cache_hits", "Prompt tokens found in the prefix cache", counts.cached_tokens),
        *(
            (f"prefix_cache_disk_{name}", help, value)
            for name, help, value in (
                ("queries", "Prompt tokens not in memory, looked up on disk", counts.disk_queries),
                ("hits", "Prompt tokens found on disk", counts.disk_hits),
                ("read_bytes", "Bytes read from the prefix cache on disk", counts.disk_read_bytes),
                ("written_bytes", "Bytes written to the prefix cache on disk", counts.disk_written_bytes),
                ("dropped_pages", "Pages not written because the disk was too slow", counts.disk_dropped),
            )
        ),
        ("drafted_tokens", "Draft tokens of speculative decoding", counts.drafted_tokens),
        ("accepted_tokens", "Accepted draft tokens", counts.accepted_tokens),
    ):
        yield CounterMetricFamily(PREFIX + name, help, value)


class _ServerCollector(Collector):
    """Exports the server's connections, limits and log."""

    def __init__(self, state: State) -> None:
        self.state = state

    def collect(self) -> Iterator[Metric]:
        state = self.state
        for name, help, value in (
            ("connections", "Open connections", len(state.connections)),
            ("connections_max", "Maximum number of open connections", state.config.max_connections),
            ("http_requests_active", "HTTP requests in progress", state.active),
            ("http_requests_active_max", "Maximum number of them", state.config.max_concurrent),
            ("request_body_bytes", "Bytes of request bodies in memory", state.held),
        ):
            yield GaugeMetricFamily(PREFIX + name, help, value)
        for name, help, value in (
            ("connections_evicted", "Idle connections closed for new ones", state.evicted),
            ("connections_rejected", "Connections refused beyond the maximum", state.rejected),
            (
                "log_lines_dropped",
                "Log lines dropped because stderr was not read",
                state.log.dropped if state.log else 0,
            ),
        ):
            yield CounterMetricFamily(PREFIX + name, help, value)
        active = GaugeMetricFamily(
            PREFIX + "key_requests_active", "HTTP requests in progress by key", labels=["key"]
        )
        limited = CounterMetricFamily(
            PREFIX + "key_limited", "Requests refused by a key's limit", labels=["key", "limit"]
        )
        for account in state.accounts.all:
            active.add_metric([account.name], account.active)
            for limit, n in account.refused.items():
                limited.add_metric([account.name, limit], n)
        yield active
        yield limited


def router(state: State) -> APIRouter:
    """The route. Installs the Metrics observer as `state.metrics`."""
    routes = APIRouter(tags=["operations"])
    state.metrics = metrics = Metrics(state)

    @routes.get("/metrics", response_class=Response)
    async def scrape() -> Response:
        """All metrics in Prometheus' text format."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    return routes
