"""Every field of the clients' request types is classified as supported, ignored or refused.

A new client version with an unclassified field fails here: add the field to its table, and to docs/serving.md.
"""

from __future__ import annotations

import re
import typing
from pathlib import Path
from typing import Any

import pytest
from serving import HELLO, TOOL, Serving

pytest.importorskip("openai")
pytest.importorskip("anthropic")
pytest.importorskip("mistralai.client")

from anthropic.types.message_count_tokens_params import MessageCountTokensParams
from anthropic.types.message_create_params import MessageCreateParamsStreaming
from mistralai.client.models import ChatCompletionRequest, EmbeddingRequest
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsStreaming as TextParams
from openai.types.embedding_create_params import EmbeddingCreateParams
from openai.types.responses.response_create_params import ResponseCreateParamsStreaming

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"
CHAT, TEXT, EMBED, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/messages"
RESPONSES = "/v1/responses"
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
ASK: dict[str, dict[str, Any]] = {
    CHAT: {"model": "tiny", "messages": HELLO, "max_tokens": 3, "temperature": 0},
    TEXT: {"model": "tiny", "prompt": "one", "max_tokens": 3, "temperature": 0},
    EMBED: {"model": "tiny", "input": "one"},
    RESPONSES: {"model": "tiny", "input": "one", "max_output_tokens": 3, "temperature": 0},
    MESSAGES: {"model": "tiny", "messages": HELLO, "max_tokens": 3, "temperature": 0},
    f"{MESSAGES}/count_tokens": {"model": "tiny", "messages": HELLO},
}  # fmt: skip
RESPONSES_TOOL = {"type": "function", **TOOL["function"]}
ANTHROPIC_TOOL = {"name": "weather", "input_schema": {"type": "object"}}

# A value for each field: supported, then ignored, then refused. FRIENDS: other fields that a field requires.
SAMPLING = {"temperature": 0.5, "top_p": 0.5, "stop": ["a"], "presence_penalty": 0.5, "frequency_penalty": 0.5}
OPENAI_SAMPLING = {
    **SAMPLING, "seed": 1, "n": 2, "logit_bias": {"7": 1}, "model": "tiny", "max_tokens": 2,
    "stream": True, "stream_options": {"include_usage": True},
}  # fmt: skip
CALLING = {"tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": False, "response_format": FORMAT}
ENDPOINTS: dict[str, tuple[str, Any, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "openai chat.completions.create": (
        CHAT, ChatParams,
        {**OPENAI_SAMPLING, **CALLING, "messages": HELLO, "max_completion_tokens": 2, "logprobs": True,
         "top_logprobs": 2, "modalities": ["text"]},
        {"metadata": {"a": "b"}, "prediction": {"type": "content", "content": "x"}, "prompt_cache_key": "k",
         "prompt_cache_options": {"mode": "explicit"}, "prompt_cache_retention": "24h", "user": "u",
         "reasoning_effort": "low", "safety_identifier": "s", "service_tier": "auto", "store": True,
         "verbosity": "low"},
        {"audio": {"voice": "alloy", "format": "wav"}, "function_call": "auto", "functions": [{"name": "f"}],
         "moderation": {"model": "omni-moderation-latest"}, "web_search_options": {}},
    ),
    "openai responses.create": (
        RESPONSES, ResponseCreateParamsStreaming,
        {"model": "tiny", "input": "two", "instructions": "Be brief.", "previous_response_id": None,
         "store": False, "stream": True, "stream_options": {"include_obfuscation": False},
         "tools": [RESPONSES_TOOL], "tool_choice": "auto", "parallel_tool_calls": False,
         "text": {"format": {"type": "json_object"}}, "max_output_tokens": 2, "temperature": 0.5,
         "top_p": 0.5, "top_logprobs": 2, "include": ["message.output_text.logprobs"]},
        {"metadata": {"a": "b"}, "user": "u", "reasoning": {"effort": "low"}, "truncation": "auto",
         "max_tool_calls": 3, "prompt_cache_key": "k", "safety_identifier": "s", "service_tier": "auto",
         "prompt_cache_options": {"mode": "explicit"}, "prompt_cache_retention": "24h",
         "context_management": [{"type": "compaction"}], "access_programs": {"cyber": "standard"},
         "background_options": {"completion_window": "soonest"}, "image": {"context_compression": "auto"}},
        {"background": True, "conversation": "conv_1", "prompt": {"id": "pmpt_1"},
         "moderation": {"model": "omni-moderation-latest"}},
    ),
    "openai completions.create": (
        TEXT, TextParams,
        {**OPENAI_SAMPLING, "prompt": "two", "echo": True, "logprobs": 2},
        {"user": "u"},
        {"best_of": 2, "suffix": "x"},
    ),
    "openai embeddings.create": (
        EMBED, EmbeddingCreateParams,
        {"model": "tiny", "input": "two", "dimensions": 40, "encoding_format": "base64"},
        {"user": "u"},
        {},
    ),
    "mistral chat.complete": (
        CHAT, ChatCompletionRequest,
        {**SAMPLING, **CALLING, "model": "tiny", "messages": HELLO, "max_tokens": 2, "stream": True,
         "random_seed": 1, "min_tokens": 1, "repetition_penalty": 1.1, "top_k": 3, "logprobs": True,
         "top_logprobs": 2, "n": 2, "safe_prompt": True},
        {"metadata": {"a": "b"}, "prediction": {"type": "content", "content": "x"}, "prompt_cache_key": "k",
         "reasoning_effort": "high", "service_tier": "auto", "prompt_mode": "reasoning"},
        {"guardrails": [{"block_on_error": True}], "prompt_logprobs": True, "top_prompt_logprobs": 2},
    ),
    "mistral embeddings.create": (
        EMBED, EmbeddingRequest,
        {"model": "tiny", "input": ["two"], "output_dimension": 40, "output_dtype": "float",
         "encoding_format": "float"},
        {"metadata": {"a": "b"}},
        {},
    ),
    "anthropic messages.create": (
        MESSAGES, MessageCreateParamsStreaming,
        {"model": "tiny", "messages": HELLO, "max_tokens": 2, "stop_sequences": ["a"], "stream": True,
         "system": "Be brief.", "tools": [ANTHROPIC_TOOL], "tool_choice": {"type": "auto"},
         "output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
        {"cache_control": {"type": "ephemeral"}, "diagnostics": {"previous_message_id": None},
         "inference_geo": "eu", "metadata": {"user_id": "u"}, "service_tier": "auto", "speed": "fast",
         "user_profile_id": "u", "workspace_id": "w", "container": "c",
         "thinking": {"type": "enabled", "budget_tokens": 1024}},
        {},
    ),
    "anthropic messages.count_tokens": (
        f"{MESSAGES}/count_tokens", MessageCountTokensParams,
        {"model": "tiny", "messages": HELLO, "system": "Be brief.", "tools": [ANTHROPIC_TOOL],
         "tool_choice": {"type": "auto"}},
        {"cache_control": {"type": "ephemeral"}, "speed": "fast", "user_profile_id": "u", "workspace_id": "w",
         "output_config": {"effort": "low"}, "thinking": {"type": "enabled", "budget_tokens": 1024}},
        {},
    ),
}  # fmt: skip
FRIENDS: dict[str, dict[str, Any]] = {
    "top_logprobs": {"logprobs": True}, "tool_choice": {"tools": [TOOL]}, "stream_options": {"stream": True},
}  # fmt: skip
each = pytest.mark.parametrize("name", ENDPOINTS)


def fields_of(params: Any) -> set[str]:
    """The fields' names in JSON."""
    if hasattr(params, "model_fields"):
        return {field.alias or name for name, field in params.model_fields.items()}
    return set(typing.get_type_hints(params))


def friends_of(path: str, field: str) -> dict[str, Any]:
    if path.startswith(MESSAGES) and field == "tool_choice":
        return {"tools": [ANTHROPIC_TOOL]}
    if path == RESPONSES:
        return {"tools": [RESPONSES_TOOL]} if field == "tool_choice" else {}
    return FRIENDS.get(field, {})


def told(out: Any) -> Any:
    """A response without the fields that differ between calls."""
    if out.get("object") == "response":  # it repeats the fields of the request
        return out["status"], [part["text"] for item in out["output"] for part in item["content"]]
    return {k: v for k, v in out.items() if k not in ("id", "created", "usage")}


@each
def test_no_field_is_forgotten(name: str) -> None:
    _, params, *fates = ENDPOINTS[name]
    known = [field for fate in fates for field in fate]
    assert len(known) == len(set(known))
    assert set(known) == fields_of(params)


@each
def test_served(server: Serving, name: str) -> None:
    path, _, served, _, _ = ENDPOINTS[name]
    for field, value in served.items():
        body = {**ASK[path], **friends_of(path, field), field: value}
        status, _, data = server.ask("POST", path, body)
        assert status == 200, (field, data)


@each
def test_passed_over(server: Serving, name: str) -> None:
    path, _, _, passed_over, _ = ENDPOINTS[name]
    _, plain = server.post(path, ASK[path])
    for field, value in passed_over.items():
        status, out = server.post(path, {**ASK[path], field: value})
        assert status == 200, (field, out)
        assert told(out) == told(plain), field


@each
def test_refused(server: Serving, name: str) -> None:
    path, _, _, _, refused = ENDPOINTS[name]
    for field, value in refused.items():
        status, out = server.post(path, {**ASK[path], field: value})
        error = out["error"]
        assert (status, error["param"], error["code"]) == (400, field, None)  # by name, and not as unknown
        assert server.post(path, {**ASK[path], field: None})[0] == 200  # clients send null for unset fields


def test_the_documentation_names_them() -> None:
    text = DOCS.read_text()
    table = text[text.index("| client's method |") : text.index("## OpenAI's Responses API")]
    rows = {row.split("|")[1].strip(" `"): row for row in table.splitlines()[2:] if row.startswith("|")}
    assert rows.keys() == ENDPOINTS.keys()
    for name, (*_, passed_over, refused) in ENDPOINTS.items():
        _, _, over, no, _ = rows[name].split("|")
        assert set(re.findall(r"`(\w+)`", over)) == passed_over.keys()
        assert set(re.findall(r"`(\w+)`", no)) == refused.keys()
