"""What Claude Code sends is answered: its fields, its blocks, its billing header, its other routes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from serving import ENGINE, Serving, serving

MESSAGES = "/v1/messages"
BETAS = {"anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,context-management-2025-06-27"}
SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}
READ = {"name": "Read", "description": "Reads a file.",
        "input_schema": {"type": "object", "properties": {"path": {"type": "string"}}}}  # fmt: skip


def asked(hashed: str = "0df", **more: Any) -> dict[str, Any]:
    """A request as Claude Code 2.1 sends it, shortened."""
    billing = f"x-anthropic-billing-header: cc_version=2.1.197.{hashed}; cc_entrypoint=sdk-cli; cch={hashed};"
    cached = {"cache_control": {"type": "ephemeral"}}
    return {
        "model": "tiny", "max_tokens": 4, "temperature": 0,
        "system": [{"type": "text", "text": billing}, {"type": "text", "text": "Be of help. " * 8, **cached}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "a greeting", "signature": "s"},
                {"type": "redacted_thinking", "data": "d"}, {"type": "text", "text": "Hi!"},
            ]},
            {"role": "user", "content": [{"type": "text", "text": "hi", **cached}]},
            {"role": "system", "content": "Available agent types: none."},
        ],
        "tools": [READ, SEARCH], "metadata": {"user_id": "u"}, "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"}, "service_tier": "auto", "container": None, "betas": ["a"], **more,
    }  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_its_request(server: Serving, stream: bool) -> None:
    status, _, data = server.ask("POST", f"{MESSAGES}?beta=true", asked(stream=stream), BETAS)
    assert status == 200, data
    assert (b"event: message_stop" in data) == stream


def test_the_billing_header_leaves_the_prefix_cache_whole() -> None:
    with serving(sliding_window=None) as server:
        seen = [server.post(MESSAGES, asked(hashed))[1]["usage"] for hashed in ("0df", "9c1")]
        server.idle()
    prompt = seen[0]["input_tokens"]
    assert seen[0]["cache_read_input_tokens"] == 0
    assert seen[1]["cache_read_input_tokens"] == (prompt - 1) // ENGINE.page_size * ENGINE.page_size > 50
    assert seen[1]["input_tokens"] + seen[1]["cache_read_input_tokens"] == prompt


def test_it_asks_for_more_tokens_than_the_context_has() -> None:
    with serving(sliding_window=None, max_seq_len=256) as server:
        status, out = server.post(MESSAGES, asked(max_tokens=32000))
        assert status == 200, out
        assert out["usage"]["input_tokens"] + out["usage"]["output_tokens"] <= 256
        server.idle()


def test_tokens_are_counted_without_what_is_left_out(server: Serving) -> None:
    fields = ("model", "system", "messages", "tools", "thinking", "context_management", "output_config")
    body = {name: asked()[name] for name in fields}
    counted = server.post(f"{MESSAGES}/count_tokens?beta=true", body)[1]["input_tokens"]
    body["system"], body["tools"] = body["system"][1:], [READ]
    del body["messages"][1]["content"][:2]
    assert server.post(f"{MESSAGES}/count_tokens", body)[1]["input_tokens"] == counted > 50


@pytest.mark.parametrize(
    "choice", [{"type": "tool", "name": "web_search"}, {"type": "any"}], ids=["by its name", "any"]
)
def test_a_tool_that_cannot_run_is_refused_only_if_forced(server: Serving, choice: dict[str, str]) -> None:
    tools = [SEARCH] if choice["type"] == "any" else [READ, SEARCH]
    status, out = server.post(MESSAGES, asked(tools=tools, tool_choice=choice))
    assert (status, out["error"]["type"]) == (400, "invalid_request_error")
    assert server.post(MESSAGES, asked(tools=tools, tool_choice={"type": "auto"}))[0] == 200


def test_an_empty_answer_may_be_sent_back(server: Serving) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": []}]
    assert server.post(MESSAGES, asked(messages=messages))[0] == 200
    assert server.post(MESSAGES, asked(messages=[*messages, {"role": "user", "content": "b"}]))[0] == 200


@pytest.mark.parametrize("path", ["/api/event_logging/batch", "/api/event_logging/v2/batch"])
def test_its_statistics_are_taken_and_dropped(server: Serving, path: str) -> None:
    status, _, data = server.ask("POST", path, {"events": [{"event_type": "a"}]})
    assert (status, json.loads(data)) == (200, {})
    assert server.ask("HEAD", "/")[0] == 200
