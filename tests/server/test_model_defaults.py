"""A model's own sampling defaults apply to what a request leaves out, in every API."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from serving import HELLO, Serving, serving

from mistral_7b.engine.request import Request

DEFAULTS = {"temperature": 0.0, "repetition_penalty": 1.5, "top_k": 7, "max_tokens": 3}


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(sliding_window=None, max_seq_len=256) as it:
        it.llm.inputs.model_defaults = DEFAULTS
        yield it
        it.idle()


@pytest.fixture
def seen(server: Serving, monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The requests that reach the engine."""
    requests: list[Request] = []
    checked = server.llm.inputs._checked

    def check(request: Request, *rest: Any) -> Request:
        requests.append(request)
        return checked(request, *rest)

    monkeypatch.setattr(server.llm.inputs, "_checked", check)
    return requests


CHAT: dict[str, Any] = {"model": "tiny", "messages": HELLO}
ASKS: list[tuple[str, dict[str, Any], dict[str, Any], int | None]] = [
    ("/v1/chat/completions", CHAT, {"max_tokens": 2}, 3),
    ("/v1/completions", {"model": "tiny", "prompt": "x"}, {"max_tokens": 2}, 3),
    ("/v1/responses", {"model": "tiny", "input": "x"}, {"max_output_tokens": 2}, 3),
    ("/v1/messages", {**CHAT, "max_tokens": 2}, {}, 2),
    ("/api/chat", {**CHAT, "stream": False}, {"options": {"num_predict": 2}}, 3),
    ("/api/generate", {"model": "tiny", "prompt": "x", "stream": False}, {"options": {"num_predict": 2}}, 3),
]


@pytest.mark.parametrize(("path", "body", "limit", "usual"), ASKS, ids=[ask[0] for ask in ASKS])
def test_defaults_and_fields(
    server: Serving, seen: list[Request], path: str, body: dict[str, Any], limit: dict[str, Any], usual: int
) -> None:
    status, _ = server.post(path, body)
    assert status == 200
    params = seen[-1].params
    assert (params.temperature, params.repetition_penalty, params.top_k) == (0.0, 1.5, 7)
    assert params.max_tokens == usual
    hotter = {"temperature": 0.5, "top_k": 2}
    options = {**limit.get("options", {}), **hotter}
    fields = {"options": options} if path.startswith("/api/") else {**limit, **hotter}
    if path == "/v1/responses":
        del fields["top_k"]
    status, _ = server.post(path, {**body, **fields})
    assert status == 200
    params = seen[-1].params
    assert (params.temperature, params.repetition_penalty, params.max_tokens) == (0.5, 1.5, 2)
    assert params.top_k == (7 if path == "/v1/responses" else 2)


def test_a_limit_that_does_not_fit_is_the_models_and_not_the_requests(
    server: Serving, seen: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.llm.inputs, "model_defaults", {"max_tokens": 10**6})
    status, _ = server.post("/v1/chat/completions", {**CHAT, "stop": ["a", "e", "i", "o", "u", "t"]})
    assert status == 200
    assert (seen[-1].params.max_tokens or 0) < 10**6
    status, _ = server.post("/v1/chat/completions", {**CHAT, "max_tokens": 10**6})
    assert status == 400


def test_a_response_names_the_temperature_that_was_used(server: Serving) -> None:
    _, answer = server.post("/v1/responses", {"model": "tiny", "input": "x", "max_output_tokens": 2})
    assert (answer["temperature"], answer["top_p"]) == (0.0, 1.0)
