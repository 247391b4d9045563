"""`tool_choice: "auto"` with a model trained to call tools, and OpenAI's client."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from caller import CITIES, WEATHER, user
from serving import Serving

from mistral_7b.engine.completion import TextPiece
from mistral_7b.server.openai.chat import _Choice
from mistral_7b.text.tool_calls import ToolCallDelta

openai = pytest.importorskip("openai")


@pytest.fixture
def client(taught: Serving) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{taught.url}/v1", api_key="none", max_retries=0, timeout=20) as it:
        yield it


def asked(text: str, **more: Any) -> dict[str, Any]:
    return {
        "model": "tiny",
        "messages": [user(text)],
        "tools": [WEATHER],
        "temperature": 0,
        "max_tokens": 80,
        **more,
    }


def cities(message: Any) -> list[str]:
    return [json.loads(call.function.arguments)["city"] for call in message.tool_calls]


@pytest.mark.parametrize("choice", [{}, {"tool_choice": "auto"}, {"parallel_tool_calls": True}])
def test_the_model_chooses(client: Any, choice: dict[str, Any]) -> None:
    out = client.chat.completions.create(**asked("Weather in Oslo?", **choice)).choices[0]
    assert (out.finish_reason, out.message.content) == ("tool_calls", None)
    assert [call.function.name for call in out.message.tool_calls] == ["weather"]
    assert cities(out.message) == ["Oslo"]
    out = client.chat.completions.create(**asked("Hello", **choice)).choices[0]
    assert (out.finish_reason, out.message.content) == ("stop", "Hi there!")
    assert out.message.tool_calls is None


def test_calls_side_by_side(client: Any) -> None:
    ask = asked(f"Weather in {' and '.join(CITIES)}?")
    out = client.chat.completions.create(**ask).choices[0]
    assert (out.finish_reason, cities(out.message)) == ("tool_calls", list(CITIES))
    assert len({call.id for call in out.message.tool_calls}) == 2
    one = client.chat.completions.create(**ask, parallel_tool_calls=False).choices[0]
    assert (one.finish_reason, cities(one.message)) == ("tool_calls", ["Rome"])


def test_a_stream_gives_the_same_calls(client: Any) -> None:
    ask = asked(f"Weather in {' and '.join(CITIES)}?")
    with client.chat.completions.stream(**ask) as stream:
        events = list(stream)
        streamed = stream.get_final_completion().choices[0]
    deltas = [e for e in events if e.type == "tool_calls.function.arguments.delta"]
    assert {e.index for e in deltas} == {0, 1}
    assert len(deltas) > 2  # while the calls are generated, not one for each at the end
    assert not any(e.type == "content.delta" and e.delta for e in events)
    assert (streamed.finish_reason, cities(streamed.message)) == ("tool_calls", list(CITIES))
    whole = client.chat.completions.create(**ask).choices[0]
    assert [c.function.arguments for c in streamed.message.tool_calls] == [
        c.function.arguments for c in whole.message.tool_calls
    ]


def streamed(server: Serving, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    data = server.ask("POST", path, {**body, "stream": True})[2].decode()
    return [json.loads(line) for line in re.findall(r"^data: (\{.*)$", data, re.M)]


def test_id_type_and_name_come_with_the_first_part_of_a_call_alone(taught: Serving) -> None:
    chunks = streamed(taught, "/v1/chat/completions", asked(f"Weather in {' and '.join(CITIES)}?"))
    parts = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
    for index, city in enumerate(CITIES):
        first, *others = [part for part in parts if part["index"] == index]
        assert (first["type"], first["function"]["name"]) == ("function", "weather")
        assert len(first["id"]) == 9
        assert others  # how many depends on how many tokens an event carries
        assert all(part.keys() == {"index", "function"} for part in others)
        assert all(part["function"].keys() == {"arguments"} for part in others)
        text = "".join(part["function"]["arguments"] for part in (first, *others))
        assert json.loads(text) == {"city": city}


def test_a_cut_inside_a_call_shows_no_scaffolding(taught: Serving) -> None:
    """For a token limit of every length, and of every third in a stream and in Anthropic's format."""
    text, partial = f"Weather in {' and '.join(CITIES)}?", set()
    whole = taught.post("/v1/chat/completions", asked(text))[1]["usage"]["completion_tokens"]
    for limit in range(1, whole):
        ask = asked(text, max_tokens=limit)
        (choice,) = taught.post("/v1/chat/completions", ask)[1]["choices"]
        message, calls = choice["message"], choice["message"].get("tool_calls", [])
        assert (choice["finish_reason"], message["content"]) == ("length", None if calls else "")
        assert all(call["function"]["name"] == "weather" for call in calls)
        partial.add(tuple(call["function"]["arguments"] for call in calls))
        if limit % 3:
            continue
        chunks = [chunk["choices"][0] for chunk in streamed(taught, "/v1/chat/completions", ask)]
        parts = [call for chunk in chunks for call in chunk["delta"].get("tool_calls", [])]
        assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == ""
        assert [
            "".join(part["function"]["arguments"] for part in parts if part["index"] == i)
            for i in range(len(calls))
        ] == [call["function"]["arguments"] for call in calls]  # fmt: skip
        tool = {"name": "weather", "input_schema": WEATHER["function"]["parameters"]}
        _, out = taught.post("/v1/messages", {**ask, "tools": [tool]})
        assert out["stop_reason"] == "max_tokens"
        assert [block["type"] for block in out["content"]] == ["tool_use"] * len(calls)
    assert {(), ("",), ('{"city": "Rome"}',), ('{"city": "Rome"}', "")} < partial


@pytest.mark.parametrize("stop", ["weather", "name", "city", "Rome", "Oslo", "}, {"])
def test_a_stop_text_inside_a_call_shows_no_scaffolding(taught: Serving, stop: str) -> None:
    (choice,) = taught.post("/v1/chat/completions", asked("Weather in Rome and Oslo?", stop=stop))[1]["choices"]
    assert not choice["message"]["content"]
    written = "".join(call["function"]["arguments"] for call in choice["message"].get("tool_calls", []))
    assert stop not in written
    ask = asked("Weather in Rome and Oslo?", stop_sequences=[stop])
    tool = {"name": "weather", "input_schema": WEATHER["function"]["parameters"]}
    _, out = taught.post("/v1/messages", {**ask, "tools": [tool]})
    assert out["stop_sequence"] == stop
    assert {block["type"] for block in out["content"]} <= {"tool_use"}


@pytest.mark.parametrize("more", [{}, {"max_tokens": 4}])
def test_a_call_has_no_log_probabilities_of_content(taught: Serving, more: dict[str, Any]) -> None:
    for text, tokens in (("Hello", True), ("Weather in Rome?", False)):
        ask = asked(text, logprobs=True, top_logprobs=2, **more)
        (choice,) = taught.post("/v1/chat/completions", ask)[1]["choices"]
        told = b"".join(bytes(token["bytes"]) for token in choice["logprobs"]["content"]).decode()
        assert told == (choice["message"]["content"] or "")
        assert bool(told) == tokens
        parts = [chunk["choices"][0] for chunk in streamed(taught, "/v1/chat/completions", ask)]
        later = [token for part in parts if part["logprobs"] for token in part["logprobs"]["content"]]
        assert later == choice["logprobs"]["content"]


@pytest.mark.parametrize("text", ["Weather in Rome?", f"Weather in {' and '.join(CITIES)}?"])
def test_the_whole_loop(client: Any, text: str) -> None:
    ask = asked(text)
    message = client.chat.completions.create(**ask).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in message.tool_calls]
    talk = [*ask["messages"], message, *results]
    out = client.chat.completions.create(**{**ask, "messages": talk}).choices[0]
    assert (out.finish_reason, out.message.tool_calls) == ("stop", None)
    assert out.message.content == f"It is sunny in {' and '.join(cities(message))}."


@pytest.mark.parametrize("stream", [False, True])
def test_a_format_is_for_the_answer_and_leaves_calls_free(client: Any, stream: bool) -> None:
    schema = {"type": "object", "properties": {"ok": {"const": True}}, "required": ["ok"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}

    def said(text: str, **more: Any) -> Any:
        ask = asked(text, response_format=form, **more) | {"max_tokens": 500}  # room for whitespace
        if not stream:
            return client.chat.completions.create(**ask).choices[0]
        with client.chat.completions.stream(**ask) as events:
            return events.get_final_completion().choices[0]

    called = said("Weather in Rome?")
    assert (called.finish_reason, cities(called.message)) == ("tool_calls", ["Rome"])
    bias = {"5": -100}  # excludes [TOOL_CALLS]
    for text in (said("Hello", logit_bias=bias), said("Weather in Rome?", tool_choice="none")):
        assert text.message.tool_calls is None
        assert json.loads(text.message.content) == {"ok": True}
    choice = client.chat.completions.create(
        **asked("Weather in Oslo?"), extra_body={"structured_outputs": {"choice": ["no", "yes"]}}
    )
    assert cities(choice.choices[0].message) == ["Oslo"]


def test_mistrals_client_is_streamed_whole_calls(taught: Serving) -> None:
    mistralai = pytest.importorskip("mistralai.client")
    ask = asked(f"Weather in {' and '.join(CITIES)}?")
    client = mistralai.Mistral(api_key="none", server_url=taught.url, timeout_ms=20_000)
    with client, client.chat.stream(**ask) as events:
        chunks = [event.data for event in events]
    with_calls = [c.choices[0].delta for c in chunks if c.choices and c.choices[0].delta.tool_calls]
    assert [cities(delta) for delta in with_calls] == [list(CITIES)]
    assert chunks[-1].usage.completion_tokens > 20


def test_a_chunk_has_one_part_of_a_call() -> None:
    come = (
        ToolCallDelta(0, "123456789", "f"), ToolCallDelta(0, arguments='{"a'), ToolCallDelta(0, arguments='": 1}'),
        ToolCallDelta(1, "abcdefghi", "g"), ToolCallDelta(1, arguments="{"),
    )  # fmt: skip
    choice = _Choice(0, False)
    _, chunk = choice.add(TextPiece("", tool_calls=come), None, False)
    calls = chunk["delta"]["tool_calls"]
    wanted = [(0, {"name": "f", "arguments": '{"a": 1}'}), (1, {"name": "g", "arguments": "{"})]
    assert [(c["index"], c["function"]) for c in calls] == wanted
    assert [c["function"] for c in choice.calls] == [function for _, function in wanted]
