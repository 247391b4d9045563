"""Mistral's client against /v1/chat/completions, /v1/embeddings and /v1/models."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from serving import HELLO, TOOL, Serving

mistralai = pytest.importorskip("mistralai.client")
ASKED: dict[str, Any] = {"model": "tiny", "messages": HELLO, "random_seed": 5, "temperature": 0.9}


@pytest.fixture
def client(server: Serving) -> Iterator[Any]:
    with mistralai.Mistral(api_key="none", server_url=server.url, timeout_ms=20_000) as client:
        yield client


def text_of(client: Any, **fields: Any) -> str:
    return client.chat.complete(**{**ASKED, "max_tokens": 10, **fields}).choices[0].message.content


def test_an_answer(client: Any) -> None:
    out = client.chat.complete(**ASKED, max_tokens=10)
    assert out.choices[0].message.content
    assert out.choices[0].finish_reason == "length"
    assert out.usage.completion_tokens == 10
    assert text_of(client) == out.choices[0].message.content
    assert text_of(client, random_seed=6) != out.choices[0].message.content
    assert text_of(client, safe_prompt=True) != out.choices[0].message.content
    assert text_of(client, model="sql") != out.choices[0].message.content


def test_a_stream_says_the_same(client: Any) -> None:
    with client.chat.stream(**ASKED, max_tokens=10) as events:
        chunks = [event.data for event in events]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text_of(client)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_asynchronous_client(server: Serving, client: Any) -> None:
    async def run() -> None:
        async with mistralai.Mistral(api_key="none", server_url=server.url, timeout_ms=20_000) as other:
            whole = await other.chat.complete_async(**ASKED, max_tokens=10)
            parts = []
            async for event in await other.chat.stream_async(**ASKED, max_tokens=10):
                parts += [choice.delta.content or "" for choice in event.data.choices]
            assert "".join(parts) == whole.choices[0].message.content == text_of(client)

    asyncio.run(run())


def test_an_answer_that_has_begun_is_gone_on_with(client: Any) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "It will be", "prefix": True}]
    out = client.chat.complete(**{**ASKED, "messages": begun}, max_tokens=6)
    assert out.usage.prompt_tokens > client.chat.complete(**ASKED, max_tokens=1).usage.prompt_tokens
    assert out.usage.completion_tokens == 6


@pytest.mark.parametrize("choice", ["any", {"type": "function", "function": {"name": "weather"}}])
def test_tools_are_called_and_answered(client: Any, choice: Any) -> None:
    out = client.chat.complete(**ASKED, max_tokens=300, tools=[TOOL], tool_choice=choice)
    assert out.choices[0].finish_reason == "tool_calls"
    message = out.choices[0].message
    for call in message.tool_calls:
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in message.tool_calls]
    talk = [*HELLO, message, *results]
    again = client.chat.complete(**{**ASKED, "messages": talk}, max_tokens=5, tools=[TOOL])
    assert again.usage.completion_tokens == 5


def test_tool_calls_in_a_stream(client: Any) -> None:
    with client.chat.stream(**ASKED, max_tokens=300, tools=[TOOL], tool_choice="any") as events:
        deltas = [event.data.choices[0].delta for event in events if event.data.choices]
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    assert calls[0].function.name == "weather"
    first = "".join(call.function.arguments for call in calls if call.index == calls[0].index)
    assert json.loads(first)["city"] in ("Rome", "Oslo")


def test_a_format(client: Any) -> None:
    schema = {"type": "object", "required": ["a"], "additionalProperties": False,
              "properties": {"a": {"enum": [1, 2]}}}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "one", "schema": schema, "strict": True}}
    assert json.loads(text_of(client, max_tokens=60, response_format=form))["a"] in (1, 2)


def test_neighbours(client: Any) -> None:
    assert [model.id for model in client.models.list().data] == ["tiny", "sql"]
    out = client.embeddings.create(model="tiny", inputs=["a", "b c"])
    assert len(out.data) == 2
    assert sum(x * x for x in out.data[0].embedding) == pytest.approx(1, abs=1e-5)


def test_refusals(client: Any) -> None:
    for fields in ({"model": "other"}, {"temperature": 9.0, "top_p": 5.0}, {"messages": []}):
        with pytest.raises(mistralai.errors.MistralError) as refused:
            client.chat.complete(**{**ASKED, **fields})
        assert refused.value.status_code in (400, 404)
        assert json.loads(refused.value.body)["error"]["message"]
