"""Responses validate strictly against the clients' own types, except for extra fields that are listed here."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError
from serving import HELLO, TOOL, Serving

pytest.importorskip("openai")
pytest.importorskip("anthropic")
pytest.importorskip("mistralai.client")

from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from mistralai.client.models import ChatCompletionResponse, CompletionChunk, EmbeddingResponse
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

CALLS = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 300, "seed": 2}
LOGPROBS = {"max_tokens": 6, "n": 2, "seed": 1, "logprobs": True, "top_logprobs": 2}
SHORT = {"max_tokens": 4}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
USAGE = {"usage.prompt_tokens_details"}  # Mistral's client has no field for cached tokens
OTHERS = {  # fields of vLLM, Mistral and Anthropic, and this server's own
    "root", "parent", "max_model_len", "type", "capabilities", "max_context_length", "display_name", "created_at",
    "precision", "chat_template", "tokenizer", "sampling_defaults",
}  # fmt: skip


def strange(part: Any, path: str = "") -> Iterator[str]:
    """Fields that a client's type does not define."""
    if isinstance(part, BaseModel):
        yield from (f"{path}{name}" for name in part.model_extra or {})
        for name in type(part).model_fields:
            yield from strange(getattr(part, name), f"{path}{name}.")
    elif isinstance(part, dict):
        for value in part.values():
            yield from strange(value, path)
    elif isinstance(part, list):
        for value in part:
            yield from strange(value, path)


_validator = functools.cache(TypeAdapter)  # of some types it takes long to build


def seen_by(kind: Any, data: Any) -> set[str]:
    """Fields that a client's type does not define, and "field: null" for an unexpected null."""
    try:
        return set(strange(_validator(kind).validate_json(json.dumps(data), strict=True)))
    except ValidationError as e:
        wrong = [(".".join(p for p in error["loc"] if isinstance(p, str)), error["input"]) for error in e.errors()]
        return {f"{name}: {json.dumps(value)}" for name, value in wrong}


def events(
    server: Serving, path: str, body: dict[str, Any], headers: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    status, _, data = server.ask("POST", path, {**body, "stream": True}, headers)
    assert status == 200, data
    return [json.loads(line) for line in re.findall(r"^data: (\{.*)$", data.decode(), re.M)]


@pytest.mark.parametrize("asked", [CALLS, LOGPROBS, SHORT])
def test_chat_completions(server: Serving, asked: dict[str, Any]) -> None:
    body = {"messages": HELLO, **asked}
    _, whole = server.post("/v1/chat/completions", body)
    assert bool(whole["choices"][0]["message"].get("tool_calls")) == (asked is CALLS)
    assert (whole["choices"][0]["logprobs"] is not None) == (asked is LOGPROBS)
    assert seen_by(ChatCompletion, whole) == set()
    assert seen_by(ChatCompletionResponse, whole) == USAGE
    chunks = events(server, "/v1/chat/completions", {**body, **STREAM})
    assert len(chunks) > 2
    for chunk in chunks:
        assert seen_by(ChatCompletionChunk, chunk) == set()
    for chunk in events(server, "/v1/chat/completions", {**body, **STREAM}, {"user-agent": "mistral-client/1"}):
        assert seen_by(CompletionChunk, chunk) == (USAGE if chunk["usage"] else set())
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


def test_completions(server: Serving) -> None:
    body = {"prompt": ["one", "two"], "max_tokens": 4, "n": 2, "seed": 1}
    assert seen_by(Completion, server.post("/v1/completions", body)[1]) == set()
    scored = server.post("/v1/completions", {**body, "logprobs": 2, "echo": True})[1]
    # OpenAI's server also sends null for the first token and, in a stream, before the finish reason.
    first = {"choices.logprobs.token_logprobs: null", "choices.logprobs.top_logprobs: null"}
    assert seen_by(Completion, scored) == first
    chunks = events(server, "/v1/completions", {**body, "logprobs": 2, **STREAM})
    assert {c["index"] for chunk in chunks for c in chunk["choices"]} == {0, 1, 2, 3}
    for chunk in chunks:
        last = not chunk["choices"] or chunk["choices"][0]["finish_reason"]
        assert seen_by(Completion, chunk) == (set() if last else {"choices.finish_reason: null"})


def test_embeddings_and_models(server: Serving) -> None:
    _, out = server.post("/v1/embeddings", {"input": ["one", "two"], "model": "tiny"})
    assert seen_by(CreateEmbeddingResponse, out) == {"id"}  # required by Mistral's client
    assert seen_by(EmbeddingResponse, out) == set()
    models = json.loads(server.ask("GET", "/v1/models")[2])["data"]
    assert [seen_by(Model, model) for model in models] == [OTHERS] * 2


@pytest.mark.parametrize("choice", [None, "any"])
def test_messages(server: Serving, choice: str | None) -> None:
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 300 if choice else 4, "messages": HELLO, "seed": 2}
    if choice:
        schema = TOOL["function"]["parameters"]
        body |= {"tool_choice": {"type": choice}, "tools": [{"name": "weather", "input_schema": schema}]}
    whole = server.post("/v1/messages", body)[1]
    assert {block["type"] for block in whole["content"]} == {"tool_use" if choice else "text"}
    assert seen_by(Message, whole) == set()
    told = events(server, "/v1/messages", body)
    assert told[0]["type"] == "message_start"
    assert [seen_by(RawMessageStreamEvent, event) for event in told] == [set()] * len(told)
    counted = server.post("/v1/messages/count_tokens", {"model": "tiny", "messages": HELLO})[1]
    assert seen_by(MessageTokensCount, counted) == set()
