"""OpenAI's client and its Responses API against a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from caller import WEATHER
from serving import TOOL, Serving

openai = pytest.importorskip("openai")

from pydantic import BaseModel  # noqa: E402

ASK = {"model": "tiny", "input": "How will the weather be?", "max_output_tokens": 8, "temperature": 0}
FUNCTION = {"type": "function", **TOOL["function"], "strict": True}
SIMPLE = {"type": "function", **WEATHER["function"], "strict": True}
SEARCH = {"type": "web_search"}


class Person(BaseModel):
    name: Literal["Ada", "Bo"]
    old: bool


@pytest.fixture
def client(server: Serving) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20) as it:
        yield it


@pytest.fixture
def caller(taught: Serving) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{taught.url}/v1", api_key="none", max_retries=0, timeout=20) as it:
        yield it


def chat(client: Any, messages: list[Any], **more: Any) -> Any:
    """The same request as a chat completion."""
    return client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0, **more)


def test_a_response(client: Any) -> None:
    more = {
        "instructions": "Be brief.", "metadata": {"a": "b"}, "user": "u", "truncation": "auto", "store": False,
        "reasoning": {"effort": "low"}, "prompt_cache_key": "k", "safety_identifier": "s", "service_tier": "auto",
        "top_p": 0.5, "parallel_tool_calls": False, "background": False,
    }  # fmt: skip
    out = client.responses.create(**ASK, **more)
    same = chat(client, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ASK["input"]}])
    assert out.output_text == same.choices[0].message.content != ""
    assert (out.status, out.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert [item.status for item in out.output] == ["incomplete"]
    assert (out.usage.input_tokens, out.usage.output_tokens) == (same.usage.prompt_tokens, 8)
    assert out.usage.total_tokens == out.usage.input_tokens + 8
    assert out.usage.output_tokens_details.reasoning_tokens == 0
    again = client.responses.create(**ASK, **more)
    assert again.usage.input_tokens_details.cached_tokens > 0
    for name, value in more.items():
        if name not in ("reasoning", "service_tier"):
            assert getattr(out, name) == value, name
    assert (out.reasoning.effort, out.service_tier, out.temperature) == ("low", "default", 0)


def test_a_response_that_ends(client: Any) -> None:
    whole = client.responses.create(**ASK).output_text
    stop = whole[4:7]
    out = client.responses.create(**ASK, extra_body={"stop": [stop]})
    assert (out.status, out.incomplete_details) == ("completed", None)
    assert out.output_text == whole[: whole.index(stop)]
    assert out.completed_at >= out.created_at


@pytest.mark.parametrize("role", ["system", "developer"])
def test_items_of_every_kind(client: Any, role: str) -> None:
    items = [
        {"role": role, "content": [{"type": "input_text", "text": "Be brief."}]},
        {"type": "message", "role": "user", "content": "one"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x", "content": None},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "two", "annotations": []}]},
        {"role": "user", "content": [{"type": "input_text", "text": "three"}, {"type": "text", "text": "four"}]},
        {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call", "call_id": "call_2", "name": "weather", "arguments": "{}", "id": "fc_1"},
        {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "rain"}]},
        {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "six"},
    ]  # fmt: skip
    calls = [
        {"id": name, "type": "function", "function": {"name": "weather", "arguments": arguments}}
        for name, arguments in (("call_1", '{"city": "Rome"}'), ("call_2", "{}"))
    ]
    messages = [
        {"role": role, "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": [{"type": "text", "text": "three"}, {"type": "text", "text": "four"}]},
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_2", "content": "rain"},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        {"role": "user", "content": "six"},
    ]
    out = client.responses.create(**{**ASK, "input": items}, tools=[FUNCTION, SEARCH], tool_choice="auto")
    same = chat(client, messages, tools=[TOOL])
    assert out.output_text == same.choices[0].message.content
    assert out.usage.input_tokens == same.usage.prompt_tokens
    assert [tool.type for tool in out.tools] == ["function", "web_search"]


def test_a_conversation_is_the_chat_with_its_whole_history(client: Any) -> None:
    first = client.responses.create(**ASK, instructions="Be brief.")
    second = client.responses.create(**{**ASK, "input": "And then?"}, previous_response_id=first.id)
    third = client.responses.create(
        **{**ASK, "input": [{"role": "user", "content": "And?"}]},
        previous_response_id=second.id,
        instructions="Be long.",
    )
    client.responses.delete(first.id)  # later responses do not need it
    assert client.responses.create(**ASK, previous_response_id=second.id).output_text
    messages = [
        {"role": "system", "content": "Be long."},  # the instructions of one response are not those of the next
        {"role": "user", "content": ASK["input"]},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": second.output_text},
        {"role": "user", "content": "And?"},
    ]
    same = chat(client, messages)
    assert third.output_text == same.choices[0].message.content
    assert third.usage.input_tokens == same.usage.prompt_tokens
    assert third.previous_response_id == second.id


def test_items_by_reference(client: Any) -> None:
    first = client.responses.create(**ASK)
    asked = {"role": "user", "content": ASK["input"]}
    whole = [asked, first.output[0].model_dump(), {"role": "user", "content": "And?"}]
    by_name = [asked, {"type": "item_reference", "id": first.output[0].id}, {"role": "user", "content": "And?"}]
    bare = [asked, {"id": first.output[0].id}, {"role": "user", "content": "And?"}]
    texts = {client.responses.create(**{**ASK, "input": items}).output_text for items in (whole, by_name, bare)}
    assert len(texts) == 1
    with pytest.raises(openai.NotFoundError, match="Item with id 'msg_0' not found") as error:
        client.responses.create(**{**ASK, "input": [asked, {"type": "item_reference", "id": "msg_0"}]})
    assert error.value.param == "input[1]"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}, {
    "type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]}])  # fmt: skip
def test_a_call_can_be_required(client: Any, choice: Any) -> None:
    ask = {**ASK, "max_output_tokens": 300, "temperature": 1, "tool_choice": choice, "extra_body": {"seed": 4}}
    other = {"type": "function", "name": "other", "parameters": {"type": "object", "properties": {}}}
    tools = [FUNCTION] if choice == "required" else [other, FUNCTION]
    out = client.responses.create(**ask, tools=[SEARCH, *tools], parallel_tool_calls=False)
    (call,) = out.output
    assert (call.type, call.name, call.status) == ("function_call", "weather", "completed")
    assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")
    assert out.model_dump()["tool_choice"] == choice
    many = client.responses.create(**{**ask, "extra_body": {"seed": 2}}, tools=tools)
    assert {item.type for item in many.output} == {"function_call"}


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("namespace", [None, "sky"])
def test_tools_round_trip(caller: Any, stored: bool, namespace: str | None) -> None:
    """The model calls the tools, and answers with their results."""
    inner = {k: v for k, v in SIMPLE.items() if k != "strict"}
    tool = SIMPLE if namespace is None else {
        "type": "namespace", "name": namespace, "description": "", "tools": [inner]}  # fmt: skip
    ask = {"model": "tiny", "tools": [tool], "temperature": 0, "max_output_tokens": 80, "store": stored}
    asked = {"role": "user", "content": "Weather in Rome and Oslo?"}
    out = caller.responses.create(**ask, input=[asked])
    assert [(call.name, call.namespace, json.loads(call.arguments)) for call in out.output] == [
        ("weather", namespace, {"city": "Rome"}), ("weather", namespace, {"city": "Oslo"})]  # fmt: skip
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"} for call in out.output]
    if stored:
        last = caller.responses.create(**ask, input=results, previous_response_id=out.id)
    else:
        calls = [call.model_dump(exclude_none=True) for call in out.output]
        last = caller.responses.create(**ask, input=[asked, *calls, *results])
    assert (last.output_text, last.status) == ("It is sunny in Rome and Oslo.", "completed")


def test_a_name_in_two_namespaces(caller: Any) -> None:
    inner = {k: v for k, v in SIMPLE.items() if k != "strict"}
    spaces = [{"type": "namespace", "name": name, "description": "", "tools": [inner]} for name in ("a", "b")]
    ask = {**ASK, "tools": spaces, "max_output_tokens": 80, "parallel_tool_calls": False}
    (call,) = caller.responses.create(**ask, tool_choice={"type": "function", "name": "b__weather"}).output
    assert (call.name, call.namespace) == ("weather", "b")


def test_schemas(client: Any) -> None:
    ask = {**ASK, "max_output_tokens": 400, "temperature": 1, "extra_body": {"seed": 3}}
    out = client.responses.parse(**ask, text_format=Person)
    assert isinstance(out.output_parsed, Person)
    schema = {"type": "json_schema", "name": "person", "strict": True, "schema": {
        "type": "object", "properties": {"old": {"type": "boolean"}}, "required": ["old"],
        "additionalProperties": False}}  # fmt: skip
    out = client.responses.create(**ask, text={"format": schema, "verbosity": "low"})
    assert set(json.loads(out.output_text)) == {"old"}
    assert out.text.model_dump(by_alias=True, exclude_none=True) == {"format": schema, "verbosity": "low"}
    free = client.responses.create(**{**ask, "max_output_tokens": 60}, text={"format": {"type": "json_object"}})
    assert free.output_text.lstrip().startswith("{")
    with client.responses.stream(**ask, text_format=Person) as stream:
        kinds = [event.type for event in stream]
        assert isinstance(stream.get_final_response().output_parsed, Person)
    assert kinds[-1] == "response.completed"


def test_log_probabilities(client: Any) -> None:
    ask = {**ASK, "top_logprobs": 2}
    assert not client.responses.create(**ask).output[0].content[0].logprobs
    (part,) = client.responses.create(**ask, include=["message.output_text.logprobs"]).output[0].content
    assert b"".join(bytes(token.bytes) for token in part.logprobs).decode() == part.text
    same = chat(client, [{"role": "user", "content": ASK["input"]}], logprobs=True, top_logprobs=2)
    assert [token.model_dump() for token in part.logprobs] == [
        token.model_dump() for token in same.choices[0].logprobs.content
    ]


IMAGE = {"role": "user", "content": ["a", {"type": "input_image", "image_url": "x"}]}
BAD_SCHEMA = {"type": "object", "properties": {"a": {"type": "no"}}}


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"temperature": -1}, 400, "temperature"),
        ({"temperatur": 1}, 400, "temperatur"),
        ({"max_output_tokens": 0}, 400, "max_output_tokens"),
        ({"input": None}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": 7}, 400, "input"),
        ({"input": [{"role": "unknown", "content": "x"}]}, 400, "input.0.role"),
        ({"input": [{"role": "user"}]}, 400, "input.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 400, "input.0.content.0"),
        ({"input": [{"role": "user", "content": "x"}, {"type": "computer_call"}]}, 400, "input.1"),
        ({"input": [{"role": "user", "content": "x"}, {"type": "function_call_output", "output": "y",
                                                       "call_id": "c"}]}, 400, "input[1]"),
        ({"input": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, 400, "input[1]"),
        ({"input": [{"role": "developer", "content": "x"}]}, 400, "input"),
        ({"input": "x " * 2000}, 400, "input"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, 400, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": BAD_SCHEMA}}}, 400,
         "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
          "tools": [FUNCTION], "tool_choice": "required"}, 400, "text.format"),
        ({"tools": [{"type": "function", "function": {"name": "x"}}]}, 400, "tools.0"),
        ({"tools": [SEARCH, {**FUNCTION, "parameters": {"type": "array"}}]}, 400, "tools[1].parameters.type"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"tool_choice": "required", "tools": [SEARCH]}, 400, "tool_choice"),
        ({"tool_choice": {"type": "web_search"}, "tools": [SEARCH, FUNCTION]}, 400, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "x"}, "tools": [FUNCTION]}, 400, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "x"}}, 400, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": []}]}},
         400, "tool_choice.tools.0.name"),
        ({"input": [{"role": "user", "content": "x", "id": "i" * 257}]}, 400, "input.0.id"),
        ({"input": [{"type": "item_reference", "id": "i" * 257}]}, 400, "input.0.id"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}", "call_id": "c" * 257}]}, 400,
         "input.0.call_id"),
        ({"input": [{"type": "function_call", "name": "f" * 257, "arguments": "{}", "call_id": "c"}]}, 400,
         "input.0.name"),
        ({"tools": [{**FUNCTION, "name": "f" * 257}]}, 400, "tools.0.name"),
        ({"model": "unknown"}, 404, "model"),
        ({"background": True}, 400, "background"),
        ({"cache_salt": "x" * 300}, 400, "cache_salt"),
    ],
)  # fmt: skip
def test_what_is_refused(server: Serving, change: dict[str, Any], status: int, param: str) -> None:
    got, out = server.post("/v1/responses", {**ASK, **change})
    error = out["error"]
    assert (got, error["param"]) == (status, param), error
    for name in ("messages", "structured_outputs", "function.", "max_tokens"):  # names of the chat request
        assert name not in error["message"]
