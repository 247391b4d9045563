"""OpenTelemetry tracing: one span per HTTP request, exported with OTLP over HTTP.

Imported only if the environment configures an exporter (config.traces_wanted). A span is created after its request
has finished, so that tracing adds no work per token. Attributes follow OpenTelemetry's semantic conventions for
HTTP servers and generative AI; prompts are included only if `log_prompts` is set.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from opentelemetry import propagate
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanProcessor
from opentelemetry.trace import SpanKind, StatusCode
from starlette.types import Scope

from ... import __version__
from ...engine.request import Request
from ..state import NOTES, REQUESTS, Answered

OPERATIONS = {
    "/v1/chat/completions": "chat", "/v1/responses": "chat", "/v1/messages": "chat",
    "/v1/completions": "text_completion", "/v1/embeddings": "embeddings",
}  # fmt: skip
GOOD = ("stop", "length", "abort", "refused")  # reasons that are not server faults
UNTRACED = ("/health", "/health/live", "/health/ready", "/metrics")  # probes, polled every few seconds
LONGEST = 200  # characters of a client's path or user agent
FLUSH_TIMEOUT = 5.0  # seconds
SECOND = 1_000_000_000


class Spans:
    """Creates a span for each finished request; a value for State.trace."""

    def __init__(self, model_name: str, processor: SpanProcessor | None = None) -> None:
        """`processor`: receives the spans; None: an OTLP exporter configured by the OTEL_* variables."""
        self.model_name = model_name
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(processor or BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("mistral_7b", __version__)

    def __call__(self, request: Answered) -> None:
        """Create the span of a finished request, as a child of the trace in its `traceparent` header."""
        if request.route in UNTRACED:
            return
        end = time.time_ns()
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in request.scope["headers"]}
        span = self._tracer.start_span(
            f"{request.scope['method']} {request.route}".rstrip(), propagate.extract(headers), SpanKind.SERVER,
            _http(request, headers) | self._model(request), start_time=end - int(request.seconds * SECOND),
        )  # fmt: skip
        if span.is_recording() and (fault := _fault(request)):
            span.set_attribute("error.type", fault)
            span.set_status(StatusCode.ERROR)
        span.end(end)

    def close(self) -> None:
        """Export the remaining spans, for at most FLUSH_TIMEOUT seconds."""
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(FLUSH_TIMEOUT)

    def _model(self, answered: Answered) -> dict[str, Any]:
        """The generative AI attributes; empty for a request that did not reach the engine."""
        requests: list[Request] = answered.scope.get(REQUESTS, [])
        if not requests:
            return {}
        notes, params, name = answered.scope[NOTES], requests[0].params, requests[0].adapter or self.model_name
        reasons = [c.finish_reason for r in requests for c in r.completions if c.finish_reason is not None]
        firsts = [r.metrics.first_token for r in requests if r.metrics.first_token is not None]
        waits = [r.metrics.queue_time for r in requests if r.metrics.queue_time is not None]
        known = {
            "gen_ai.operation.name": OPERATIONS.get(answered.route), "gen_ai.provider.name": "mistral_7b",
            "gen_ai.request.model": name, "gen_ai.response.model": name,
            "gen_ai.usage.input_tokens": notes["prompt_tokens"],
            "gen_ai.usage.cache_read.input_tokens": sum(r.cached or 0 for r in requests),
            "mistral_7b.prompts": notes.get("prompts"),
        }  # fmt: skip
        if firsts:
            known["gen_ai.response.time_to_first_chunk"] = min(firsts) - answered.began
        if waits:
            known["gen_ai.latency.time_in_queue"] = max(waits)
        if requests[0].pooling is None:
            known |= {
                "gen_ai.usage.output_tokens": notes["completion_tokens"],
                "gen_ai.response.finish_reasons": reasons, "gen_ai.request.temperature": params.temperature,
                "gen_ai.request.top_p": params.top_p, "gen_ai.request.max_tokens": params.max_tokens,
                "gen_ai.request.choice.count": params.n,
            }  # fmt: skip
        return {key: value for key, value in known.items() if value is not None}


def _http(request: Answered, headers: dict[str, str]) -> dict[str, Any]:
    scope: Scope = request.scope
    known = {
        "http.request.method": scope["method"], "http.route": request.route or None,
        "url.path": scope["path"][:LONGEST], "url.scheme": scope["scheme"],
        "http.response.status_code": request.status,
        "network.protocol.version": scope["http_version"], "http.response.header.x-request-id": [request.id],
        "user_agent.original": headers.get("user-agent", "")[:LONGEST] or None,
    }  # fmt: skip
    if scope.get("client"):
        known["client.address"] = scope["client"][0]
    if scope.get("server"):
        known["server.address"], known["server.port"] = scope["server"]
    return {key: value for key, value in known.items() if value is not None}


def _fault(request: Answered) -> str | None:
    """The value of `error.type`: a 5xx status, or the finish reason of a failed stream; None without a fault."""
    if request.status >= 500:
        return str(request.status)
    reason: str | None = request.scope.get(NOTES, {}).get("reason")
    return reason if reason is not None and reason not in GOOD else None


def _resource() -> Resource:
    """The resource from OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES; the default name is mistral-7b."""
    resource = Resource.create({"service.version": __version__})
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        return resource.merge(Resource({SERVICE_NAME: "mistral-7b"}))
    return resource
