"""Mistral's own client, over a real connection."""

from __future__ import annotations

import json

import pytest
from serving import HELLO, TOOL, Serving

mistralai = pytest.importorskip("mistralai.client")


@pytest.fixture
def client(server: Serving):
    with mistralai.Mistral(api_key="none", server_url=server.url, timeout_ms=20_000) as it:
        yield it


def test_an_answer_and_a_stream(client):
    ask = {"model": "tiny", "messages": HELLO, "max_tokens": 8, "random_seed": 3, "safe_prompt": False}
    out = client.chat.complete(**ask)
    assert out.choices[0].finish_reason == "length"
    assert out.usage.completion_tokens == 8
    chunks = [event.data for event in client.chat.stream(**ask)]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == out.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"


def test_tools_json_and_prefix(client):
    out = client.chat.complete(
        model="tiny", messages=HELLO, tools=[TOOL], tool_choice="any", max_tokens=300, random_seed=4
    )
    call = out.choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    begun = [*HELLO, {"role": "assistant", "content": "It will be", "prefix": True}]
    assert client.chat.complete(model="tiny", messages=begun, max_tokens=3).usage.completion_tokens == 3
    schema = {"type": "object", "properties": {"old": {"type": "boolean"}}, "required": ["old"]}
    out = client.chat.complete(
        model="tiny", messages=HELLO, max_tokens=200, random_seed=1,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {
            **schema, "additionalProperties": False}}},
    )  # fmt: skip
    assert isinstance(json.loads(out.choices[0].message.content)["old"], bool)


def test_embeddings_models_and_errors(client):
    assert len(client.embeddings.create(model="tiny", inputs=["a", "b"]).data) == 2
    assert {m.id for m in client.models.list().data} == {"tiny", "sql"}
    with pytest.raises(mistralai.errors.SDKError, match="nobody"):
        client.chat.complete(model="nobody", messages=HELLO)
