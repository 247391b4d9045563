"""Responses conform to the OpenAPI schema for generated requests; needs schemathesis."""

from __future__ import annotations

import pytest
from serving import Serving

schemathesis = pytest.importorskip("schemathesis")

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
GENERATE = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses")
OLLAMA = ("/api/chat", "/api/generate")
FEW = settings(
    max_examples=10, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_every_answer_is_documented(server: Serving, mode: str) -> None:
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    seen = set()
    for found in document.get_all_operations():
        operation = found.ok()

        @FEW
        @given(operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
        def holds(case) -> None:
            if isinstance(case.body, dict) and case.path in GENERATE:
                limit = "max_output_tokens" if case.path == "/v1/responses" else "max_tokens"
                for name in {limit, *({"max_completion_tokens"} & case.body.keys())}:  # short responses
                    most = case.body.setdefault(name, 2)
                    case.body[name] = min(most, 2) if type(most) is int else most
                    if case.body[name] == -1:  # no limit
                        case.body[name] = 2
            if isinstance(case.body, dict) and case.path in OLLAMA:
                case.body.setdefault("options", {})
                if isinstance(case.body["options"], dict):
                    case.body["options"]["num_predict"] = 2
            seen.add(case.call_and_validate(checks=CHECKS, timeout=20).status_code)

        try:
            holds()
        except Exception as e:
            e.add_note(f"{operation.method} {operation.path}")
            if "Unsatisfiable" not in type(e).__name__:
                raise
    assert seen >= ({200, 400} if mode == "positive" else {400})
