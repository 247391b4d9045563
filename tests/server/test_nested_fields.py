"""Extra fields in parts of a body: those that would change the response are supported or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from serving import HELLO, TOOL, Serving

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
SCHEMA = {
    "type": "object", "required": ["name", "n"], "additionalProperties": False,
    "properties": {"name": {"enum": ["Ada", "Bo"]}, "n": {"enum": [1, 23]}},
}  # fmt: skip
NAMED = {"name": "s", "schema": SCHEMA}
ASK: dict[str, Any] = {"max_tokens": 200, "seed": 3}
ANTHROPIC_TOOL = {"name": "weather", "input_schema": {"type": "object"}}


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_object", "schema": SCHEMA},  # Together, Fireworks, llama.cpp
        {"type": "json_schema", "schema": SCHEMA},
        {"type": "json_schema", "schema": SCHEMA, "name": "s", "strict": True, "json_schema": None},
        {"type": "json_schema", "json_schema": {**NAMED, "description": "d", "strict": True}},
    ],
)
@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_a_schema_is_obeyed_wherever_it_stands(server: Serving, form: Any, tools: Any) -> None:
    body = {**ASK, "messages": HELLO, "response_format": form, "tools": tools, "logit_bias": {"5": -100}}
    status, out = server.post(CHAT, body)
    assert status == 200, out
    answer = json.loads(out["choices"][0]["message"]["content"])
    assert answer.keys() == {"name", "n"}
    assert answer["n"] in (1, 23)


def test_an_object_without_a_schema(server: Serving) -> None:
    for form in ({"type": "json_object"}, {"type": "json_object", "schema": None},
                 {"type": "json_object", "schema": {}}):  # fmt: skip
        out = server.post(CHAT, {**ASK, "messages": HELLO, "response_format": form})[1]
        assert out["choices"][0]["message"]["content"].lstrip().startswith("{")


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": HELLO, "max_tokens": 2, **fields}


def said(**message: Any) -> tuple[str, dict[str, Any]]:
    return chat(messages=[*HELLO, {"role": "assistant", "content": "Fair.", **message}, *HELLO])


def offered(tool: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return chat(tools=[{"type": "function", "function": {"name": "f", **tool}}])


def anthropic(**fields: Any) -> tuple[str, dict[str, Any]]:
    return MESSAGES, {"model": "tiny", "messages": HELLO, "max_tokens": 2, **fields}


CALL = {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (chat(response_format={"type": "text", "schema": SCHEMA}), "response_format"),
        (chat(response_format={"type": "text", "json_schema": NAMED}), "response_format"),
        (chat(response_format={"type": "json_object", "json_schema": NAMED}), "response_format"),
        (chat(response_format={"type": "json_schema", "schema": SCHEMA, "json_schema": NAMED}), "response_format"),
        (chat(response_format={"type": "json_schema"}), "response_format"),
        (chat(response_format={"type": "json_object", "grammar": "x"}), "response_format.grammar"),
        (chat(response_format={"type": "json_object", "regex": "x"}), "response_format.regex"),
        (said(function_call={"name": "f", "arguments": "{}"}), "messages.1.function_call"),
        (said(audio={"id": "a"}), "messages.1.audio"),
        (said(refusal="No."), "messages.1.refusal"),
        (chat(messages=[{**HELLO[0], "prefix": True}]), "messages.0"),
        (chat(messages=[{**HELLO[0], "tool_calls": [CALL]}]), "messages.0"),
        (offered({"input_schema": SCHEMA}), "tools.0.function.input_schema"),
        (offered({"inputSchema": SCHEMA}), "tools.0.function.inputSchema"),
        (offered({"parametersJsonSchema": SCHEMA}), "tools.0.function.parametersJsonSchema"),
        (anthropic(output_config={"format": {"type": "json_schema", "schema": SCHEMA, "grammar": ""}}),
         "output_config.format.grammar"),
        (anthropic(output_config={"task_budget": {"type": "tokens", "total": 9}}), "output_config.task_budget"),
        (anthropic(tools=[ANTHROPIC_TOOL], tool_choice={"type": "any", "max_calls": 1}),
         "tool_choice.max_calls"),
        (anthropic(tools=[{**ANTHROPIC_TOOL, "input_examples": [{"city": "Rome"}]}]), "tools.0.input_examples"),
        (anthropic(tools=[{**ANTHROPIC_TOOL, "allowed_callers": ["code_execution_20260120"]}]),
         "tools.0.allowed_callers.0"),
    ],
)  # fmt: skip
def test_what_would_change_the_answer_is_refused_by_name(
    server: Serving, asked: tuple[str, dict[str, Any]], field: str
) -> None:
    status, out = server.post(*asked)
    assert (status, out["error"]["param"]) == (400, field), out


CALLED = {"role": "assistant", "content": None, "tool_calls": [{**CALL, "index": 0, "extra": {}}], "refusal": None}
RESULT = {"role": "tool", "tool_call_id": "123456789", "content": "sunny", "name": "f", "artifact": None}


@pytest.mark.parametrize(
    "asked",
    [
        chat(messages=[{**HELLO[0], "name": "Ada", "tool_calls": [], "prefix": False, "function_call": None}]),
        said(refusal=None, audio=None, function_call=None, annotations=[], tool_calls=None, id="msg_1",
             reasoning_content="Hm.", reasoning=None, name="Bo"),
        chat(messages=[*HELLO, CALLED, RESULT]),
        chat(messages=[{"role": "user", "content": [
            {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]}]),
        offered({"strict": True, "return": {"type": "string"}, "cache_control": {"type": "ephemeral"}}),
        chat(tools=[{**TOOL, "cache_control": {"type": "ephemeral"}, "defer_loading": False}]),
        anthropic(tools=[{**ANTHROPIC_TOOL, "strict": True, "defer_loading": False, "allowed_callers": ["direct"],
                          "eager_input_streaming": True, "cache_control": {"type": "ephemeral"}}]),
        anthropic(tools=[ANTHROPIC_TOOL], tool_choice={"type": "none", "disable_parallel_tool_use": False}),
        anthropic(messages=[{"role": "user", "content": [
            {"type": "text", "text": "Hi", "citations": None, "cache_control": {"type": "ephemeral"}}]}]),
    ],
)  # fmt: skip
def test_what_clients_add_is_passed_over(server: Serving, asked: tuple[str, dict[str, Any]]) -> None:
    status, out = server.post(*asked)
    assert status == 200, out
