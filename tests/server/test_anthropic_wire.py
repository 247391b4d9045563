"""Conversion of Anthropic's conversations: the same tokens as in OpenAI's format, or an error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from mistral_7b.errors import SamplingError, TokenizerError
from mistral_7b.sampling.params import SamplingParams, StructuredOutputs
from mistral_7b.server.anthropic.wire import (
    ConversationError,
    CountRequest,
    MessagesRequest,
    chosen,
    conversation,
    most_calls,
    offered,
)
from mistral_7b.text.tokenizer import Tokenizer

WEATHER = {
    "name": "weather",
    "description": "tells the weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
    "cache_control": {"type": "ephemeral"},
}
OPENAI_WEATHER = {
    "type": "function",
    "function": {
        "name": "weather", "description": "tells the weather", "parameters": WEATHER["input_schema"],
    },
}  # fmt: skip
SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}
USER = {"role": "user", "content": "hi"}
THOUGHTS = [
    {"type": "thinking", "thinking": "well", "signature": "s"}, {"type": "redacted_thinking", "data": "d"}
]  # fmt: skip
CALLS = {
    "role": "assistant",
    "content": [
        {"type": "text", "text": "Let me look."},
        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Köln"}},
        {"type": "tool_use", "id": "toolu_2", "name": "weather", "input": {}},
    ],
}


def text(*parts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": part} for part in parts]


def result(number: int, **fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": f"toolu_{number}", **fields}


def request(*messages: dict[str, Any], **fields: Any) -> MessagesRequest:
    return MessagesRequest.model_validate({"model": "m", "max_tokens": 8, "messages": list(messages), **fields})


def called(id: str, arguments: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "weather", "arguments": arguments}}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.v3()


@pytest.mark.parametrize(
    ("asked", "openai"),
    [
        (request(USER), [USER]),
        (request(USER, {"role": "assistant", "content": []}), [USER]),
        (request(USER, {"role": "assistant", "content": ""}), [USER]),
        (request(USER, {"role": "assistant", "content": THOUGHTS}), [USER]),
        (
            request(USER, {"role": "assistant", "content": [*THOUGHTS, *text("a")]}, USER, tools=[SEARCH]),
            [USER, {"role": "assistant", "content": "a"}, USER],
        ),
        (
            request(USER, {"role": "assistant", "content": []}, USER),
            [USER, {"role": "assistant", "content": ""}, USER],
        ),
        (
            request(USER, {"role": "system", "content": "late"}),
            [{"role": "user", "content": "hi\n\nlate"}],
        ),
        (request(USER, system="be brief"), [{"role": "system", "content": "be brief"}, USER]),
        (
            request({"role": "user", "content": text("a", "b")}, system=text("c", "d")),
            [{"role": "system", "content": "c\n\nd"}, {"role": "user", "content": "a\n\nb"}],
        ),
        (
            request(USER, {"role": "assistant", "content": text("The answer")}),
            [USER, {"role": "assistant", "content": "The answer", "prefix": True}],
        ),
        (
            request(
                USER, CALLS,
                {"role": "user", "content": [result(1, content="warm"), result(2, content=text("a", "b"))]},
            ),
            [
                USER,
                {"role": "assistant", "tool_calls": [
                    called("toolu_1", '{"city": "Köln"}'), called("toolu_2", "{}"),
                ]},
                {"role": "tool", "tool_call_id": "toolu_1", "content": "warm"},
                {"role": "tool", "tool_call_id": "toolu_2", "content": "a\n\nb"},
            ],
        ),
        (
            request(
                USER, CALLS,
                {"role": "user", "content": [
                    result(2, is_error=True, content="no net"), result(1, is_error=True), *text("and?"),
                ]},
            ),
            [
                USER,
                {"role": "assistant", "tool_calls": [
                    called("toolu_1", '{"city": "Köln"}'), called("toolu_2", "{}"),
                ]},
                {"role": "tool", "tool_call_id": "toolu_2", "content": "Error: no net"},
                {"role": "tool", "tool_call_id": "toolu_1", "content": "Error: "},
                {"role": "user", "content": "and?"},
            ],
        ),
    ],
)  # fmt: skip
def test_a_conversation_gives_the_tokens_of_the_same_in_openais_words(
    tokenizer: Tokenizer, asked: MessagesRequest, openai: list[dict[str, Any]]
) -> None:
    ours = conversation(asked).messages
    for tools in (None, [OPENAI_WEATHER]):
        assert tokenizer.encode_chat(ours, tools) == tokenizer.encode_chat(openai, tools)


@pytest.mark.parametrize(
    ("system", "left"),
    [
        ("x-anthropic-billing-header: cc_version=2.1; cch=1a2b;", []),
        ("x-anthropic-billing-header: cc_version=2.1; cch=1a2b;\n\nBe brief.", ["Be brief."]),
        (text("x-anthropic-billing-header: cch=1;", "Be brief."), ["Be brief."]),
        ("Be brief.\nx-anthropic-billing-header: cch=1;", ["Be brief.\nx-anthropic-billing-header: cch=1;"]),
    ],
)
def test_the_billing_header_is_left_out(system: Any, left: list[str]) -> None:
    messages = conversation(request(USER, system=system)).messages
    assert [m["content"] for m in messages if m["role"] == "system"] == left


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([USER, CALLS], "messages[1]"),
        ([USER, {"role": "user", "content": [result(1, content="x")]}], "messages[1]"),
        ([USER, CALLS, {"role": "user", "content": [result(3)]}], "messages[2]"),
        ([USER, CALLS, USER, {"role": "user", "content": [result(1)]}, CALLS], "messages[4]"),
        ([{"role": "user", "content": CALLS["content"]}], "messages[0]"),
        ([USER, {"role": "assistant", "content": [result(1)]}], "messages[1]"),
        ([USER, {"role": "assistant", "content": CALLS["content"][1:2] * 2}], "messages[1]"),
        ([{"role": "user", "content": []}], "messages[0].content"),
    ],
)
def test_what_anthropics_rules_forbid_is_refused(messages: list[dict[str, Any]], field: str) -> None:
    with pytest.raises(ConversationError) as refused:
        conversation(request(*messages))
    assert refused.value.field == field


@pytest.mark.wording
def test_it_is_said_which_rule_was_broken() -> None:
    with pytest.raises(ConversationError, match=r"messages\[1\] calls tools: their results must follow"):
        conversation(request(USER, CALLS))


def test_an_error_names_the_place_in_the_request(tokenizer: Tokenizer) -> None:
    odd = {"role": "system", "content": "late"}
    asked = conversation(
        request(USER, CALLS, {"role": "user", "content": [result(1), result(2)]}, odd, USER, system="s")
    )
    assert asked.labels == ["system", *(f"messages[{i}]" for i in (0, 1, 2, 2, 3, 4))]
    for labels, field in ((None, "messages[5]"), (asked.labels, "messages[3]")):
        with pytest.raises(TokenizerError) as refused:
            tokenizer.encode_chat(asked.messages, labels=labels)
        assert refused.value.field == field


@pytest.mark.parametrize(
    ("fields", "kind", "place"),
    [
        ({"thinking": 5}, "dict_type", "thinking"),
        ({"max_tokens": "8"}, "int_type", "max_tokens"),
        ({"max_tokens": 0}, "greater_than_equal", "max_tokens"),
        ({"max_tokens": 10**30}, "less_than_equal", "max_tokens"),
        ({"max_tokens": None}, "int_type", "max_tokens"),
        ({"temperature": True}, "float_type", "temperature"),
        ({"n": 2}, "extra_forbidden", "n"),
        ({"mcp_servers": []}, "extra_forbidden", "mcp_servers"),
        ({"messages": []}, "too_short", "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "literal_error", "messages.0.role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "union_tag_invalid", "messages.0.content.0",
        ),
        ({"tools": [{"name": "web_search"}]}, "missing", "tools.0.custom.input_schema"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "value_error", "tools.0.server.type"),
        ({"tools": [SEARCH], "tool_choice": {"type": "any"}}, "value_error", ""),
        ({"tools": [SEARCH, WEATHER], "tool_choice": {"type": "tool", "name": "web_search"}}, "value_error", ""),
        ({"tool_choice": {"type": "any"}}, "value_error", ""),
        ({"tool_choice": {"type": "tool", "name": "weather"}, "tools": []}, "value_error", ""),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(fields: dict[str, Any], kind: str, place: str) -> None:
    with pytest.raises(ValidationError) as refused:
        request(*fields.pop("messages", [USER]), **fields)
    error = refused.value.errors()[0]
    assert (error["type"], ".".join(map(str, error["loc"]))) == (kind, place)


def test_parameters_of_sampling() -> None:
    assert request(USER).params() == SamplingParams(max_tokens=8)
    asked = request(
        USER, temperature=0, top_p=0.5, top_k=3, seed=7, stop_sequences=["a", "b"], stream=None,
        metadata={"user_id": "u"}, service_tier="auto", thinking={"type": "disabled"},
    )  # fmt: skip
    wanted = SamplingParams(max_tokens=8, temperature=0, top_p=0.5, top_k=3, seed=7, stop=["a", "b"])
    assert asked.params() == wanted
    with pytest.raises(SamplingError) as refused:
        request(USER, top_p=2).params()
    assert refused.value.field == "top_p"


def test_a_format_is_a_schema_for_the_text() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    asked = request(USER, output_config={"effort": "low", "format": {"type": "json_schema", "schema": schema}})
    assert asked.params().structured_outputs == StructuredOutputs(json=schema)


@pytest.mark.parametrize(
    ("choice", "openai", "seen", "calls"),
    [
        (None, "auto", True, None),
        ({"type": "auto"}, "auto", True, None),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto", True, 1),
        ({"type": "any"}, "required", True, None),
        ({"type": "any", "disable_parallel_tool_use": True}, "required", True, 1),
        ({"type": "tool", "name": "weather"}, {"type": "function", "function": {"name": "weather"}}, True, None),
        ({"type": "none"}, "none", False, None),
    ],
)
def test_every_tool_choice(choice: Any, openai: Any, seen: bool, calls: int | None) -> None:
    asked = request(USER, tools=[WEATHER], tool_choice=choice)
    assert chosen(asked) == openai
    assert offered(asked) == ([OPENAI_WEATHER] if seen else None)
    assert most_calls(asked) == calls


def test_counting_takes_the_same_conversation_and_no_parameters() -> None:
    count = CountRequest.model_validate({"model": "m", "messages": [USER], "tools": [WEATHER], "system": "s"})
    assert conversation(count).messages == conversation(request(USER, system="s")).messages
    with pytest.raises(ValidationError) as refused:
        CountRequest.model_validate({"model": "m", "messages": [USER], "max_tokens": 3})
    assert [(e["type"], e["loc"]) for e in refused.value.errors()] == [("extra_forbidden", ("max_tokens",))]


def test_the_input_of_a_call_may_be_any_json(tokenizer: Tokenizer) -> None:
    value = {"ö": [1, 2.5, None, {"deep": [True, 'a"b\\']}]}
    use = {"type": "tool_use", "id": "x", "name": "f", "input": value}
    out = conversation(
        request(
            USER, {"role": "assistant", "content": [use]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]},
        )
    )  # fmt: skip
    assert json.loads(out.messages[1]["tool_calls"][0]["function"]["arguments"]) == value
    assert tokenizer.encode_chat(out.messages)
