"""Spans: attributes, status, absence of prompts, and no OpenTelemetry import without configuration."""

from __future__ import annotations

import importlib
import pkgutil
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from serving import HELLO, Serving, serving

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

import mistral_7b
from mistral_7b.errors import ConfigError
from mistral_7b.server.config import ServerConfig, traces_wanted
from mistral_7b.server.operations.tracing import Spans

CHAT = "/v1/chat/completions"
ASK = {"messages": HELLO, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.fixture(scope="module")
def traced() -> Iterator[tuple[Serving, InMemorySpanExporter]]:
    with serving(ServerConfig(port=0, api_keys=("key",), request_timeout=0.5)) as server:
        kept = InMemorySpanExporter()
        server.state.trace = Spans("tiny", SimpleSpanProcessor(kept))
        yield server, kept


def span_of(traced: tuple[Serving, InMemorySpanExporter], method: str, path: str, body=None, **headers: str):
    """Send a request; return its only span, the span's attributes, and the response status."""
    server, kept = traced
    kept.clear()
    status, _, _ = server.ask(method, path, body, {"authorization": "Bearer key", **headers})
    end = time.monotonic() + 5
    while not kept.get_finished_spans() and time.monotonic() < end:
        time.sleep(0.002)
    (span,) = kept.get_finished_spans()
    return span, dict(span.attributes or {}), status


def test_a_span_says_what_a_request_was_and_took(traced) -> None:
    before = time.time_ns()
    span, said, _ = span_of(
        traced, "POST", CHAT, {**ASK, "n": 2, "stream": True}, traceparent=f"00-{TRACE}-{PARENT}-01",
        **{"x-request-id": "mine", "user-agent": "a test"},
    )  # fmt: skip
    assert (span.name, span.kind, span.status.status_code) == (f"POST {CHAT}", SpanKind.SERVER, StatusCode.UNSET)
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    assert before <= span.start_time < span.end_time <= time.time_ns()
    assert said["http.route"] == said["url.path"] == CHAT
    assert (said["http.request.method"], said["http.response.status_code"]) == ("POST", 200)
    assert said["http.response.header.x-request-id"] == ("mine",)
    assert said["user_agent.original"] == "a test"
    assert (said["gen_ai.operation.name"], said["gen_ai.request.model"]) == ("chat", "tiny")
    assert said["gen_ai.usage.input_tokens"] > 4
    assert said["gen_ai.usage.output_tokens"] == 8
    assert said["gen_ai.response.finish_reasons"] == ("length", "length")
    assert (said["gen_ai.request.temperature"], said["gen_ai.request.max_tokens"]) == (0, 4)
    assert said["gen_ai.request.choice.count"] == 2
    seconds = (span.end_time - span.start_time) / 1e9
    assert 0 <= said["gen_ai.latency.time_in_queue"] < said["gen_ai.response.time_to_first_chunk"] < seconds
    assert "weather" not in str(said)


@pytest.mark.parametrize(
    ("path", "body", "operation"),
    [
        ("/v1/completions", {"prompt": ["one", "two"], "max_tokens": 2}, "text_completion"),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 2, "model": "tiny"}, "chat"),
        ("/v1/embeddings", {"input": "one"}, "embeddings"),
    ],
)
def test_each_kind_of_answer_has_its_operation(traced, path: str, body, operation: str) -> None:
    span, said, status = span_of(traced, "POST", path, body)
    assert (status, span.parent) == (200, None)
    assert (said["gen_ai.operation.name"], said["http.route"]) == (operation, path)
    assert said["gen_ai.usage.input_tokens"] > 0
    assert ("gen_ai.usage.output_tokens" in said) == (operation != "embeddings")


def test_spans_of_what_did_not_go_well(traced) -> None:
    span, said, _ = span_of(traced, "GET", "/nowhere/" + "x" * 500)
    assert (span.name, said["http.response.status_code"]) == ("GET", 404)
    assert len(said["url.path"]) == 200
    span, said, _ = span_of(traced, "GET", "/v1/models", authorization="Bearer wrong")
    assert (span.status.status_code, said["http.response.status_code"]) == (StatusCode.UNSET, 401)
    assert not any(name.startswith("gen_ai") for name in said)
    for stream, fault in ((False, "504"), (True, "timeout")):
        span, said, _ = span_of(traced, "POST", CHAT, {**ASK, "max_tokens": 100_000, "stream": stream})
        assert (span.status.status_code, said["error.type"]) == (StatusCode.ERROR, fault)
        assert said["gen_ai.usage.output_tokens"] > 0


def test_what_is_asked_every_few_seconds_has_none(traced) -> None:
    server, kept = traced
    kept.clear()
    for path in ("/health/live", "/health/ready", "/metrics"):
        assert server.ask("GET", path, headers={"authorization": "Bearer key"})[0] == 200
    span, *_ = span_of(traced, "GET", "/v1/models")
    assert span.name == "GET /v1/models"


def test_prompts_are_there_where_they_are_logged(traced) -> None:
    server, _ = traced
    server.state.config.__dict__["log_prompts"] = True
    try:
        _, said, _ = span_of(traced, "POST", "/v1/completions", {"prompt": "one", "max_tokens": 1})
    finally:
        server.state.config.__dict__["log_prompts"] = False
    assert said["mistral_7b.prompts"] == ("one",)


def test_variables_ask_for_traces() -> None:
    there = {ENDPOINT: "http://127.0.0.1:4318"}
    assert traces_wanted(there)
    assert traces_wanted({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318/v1/traces"})
    for off in (
        {},
        {ENDPOINT: ""},
        {**there, "OTEL_SDK_DISABLED": "true"},
        {**there, "OTEL_TRACES_EXPORTER": "none"},
    ):
        assert not traces_wanted(off)
    with pytest.raises(ConfigError) as refused:
        traces_wanted({**there, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
    assert refused.value.field == "OTEL_EXPORTER_OTLP_PROTOCOL"


class _Collector(BaseHTTPRequestHandler):
    """A minimal OTLP collector."""

    got: list[ExportTraceServiceRequest]

    def do_POST(self) -> None:
        assert (self.path, self.headers["content-type"]) == ("/v1/traces", "application/x-protobuf")
        body = self.rfile.read(int(self.headers["content-length"]))
        self.got.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def test_spans_reach_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    _Collector.got = []
    collector = HTTPServer(("127.0.0.1", 0), _Collector)
    threading.Thread(target=collector.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv(ENDPOINT, f"http://127.0.0.1:{collector.server_port}")
    try:
        with serving() as server:
            spans = server.state.trace = Spans("tiny")
            assert server.post(CHAT, ASK, {"traceparent": f"00-{TRACE}-{PARENT}-01"})[0] == 200
            server.idle()
        spans.close()
    finally:
        collector.shutdown()
        collector.server_close()
    (sent,) = [r for export in _Collector.got for r in export.resource_spans]
    whose = {a.key: a.value.string_value for a in sent.resource.attributes}
    assert whose["service.name"] == "mistral-7b"
    (span,) = sent.scope_spans[0].spans
    assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == (f"POST {CHAT}", TRACE, PARENT)
    said = {a.key: a.value for a in span.attributes}
    assert said["gen_ai.usage.output_tokens"].int_value == 4


def test_nothing_of_it_is_loaded_where_nobody_asked() -> None:
    """Only one module imports it, in turn imported by one function. FastAPI may import the API, not the SDK."""
    package = Path(mistral_7b.__file__).parent
    line = re.compile(r"^( *)(?:from|import) .*(?:opentelemetry|tracing)", re.M)
    found = {
        (path.relative_to(package).as_posix(), bool(indent))
        for path in package.rglob("*.py")
        for indent in line.findall(path.read_text(encoding="utf-8"))
    }
    assert found == {("server/operations/tracing.py", False), ("cli/serve.py", True)}


def test_names_of_attributes_are_those_of_the_conventions(traced) -> None:
    from opentelemetry.semconv import attributes as stable
    from opentelemetry.semconv._incubating import attributes as others

    def names(package) -> set[str]:
        found = [
            importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)
        ]
        return {v for module in found for v in vars(module).values() if isinstance(v, str)}

    known = names(stable) | names(others)
    _, said, _ = span_of(traced, "POST", CHAT, ASK)
    ours = {"gen_ai.latency.time_in_queue", "http.response.header.x-request-id"}  # vLLM's name, and a template's
    assert set(said) - known == ours
