"""OpenAI's client against a real server."""

from __future__ import annotations

import asyncio
import json
from typing import Literal

import pytest
from serving import HELLO, TOOL, Serving

openai = pytest.importorskip("openai")

from pydantic import BaseModel  # noqa: E402


@pytest.fixture
def client(server: Serving):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20) as it:
        yield it


class Person(BaseModel):
    name: Literal["Ada", "Bo"]
    old: bool


def test_an_answer_and_what_it_took(client):
    out = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=8, temperature=0)
    assert out.object == "chat.completion"
    assert out.model == "tiny"
    assert out.choices[0].message.content
    assert out.choices[0].finish_reason == "length"
    assert out.usage.completion_tokens == 8
    assert out.usage.total_tokens == out.usage.prompt_tokens + 8
    again = client.chat.completions.create(
        model="tiny", messages=HELLO, max_completion_tokens=8, temperature=0, user="u", store=False
    )
    assert again.choices[0].message.content == out.choices[0].message.content
    assert again.usage.prompt_tokens_details.cached_tokens > 0


def test_a_stream_is_the_answer_in_parts(client):
    ask = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "seed": 5, "n": 2, "logprobs": True}
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert len({c.id for c in chunks}) == 1
    assert len({c.created for c in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 24 == whole.usage.completion_tokens
    assert all(c.usage is None for c in chunks[:-1])
    for i, choice in enumerate(whole.choices):
        own = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == i]
        assert own[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in own) == choice.message.content
        assert [c.finish_reason for c in own] == [None] * (len(own) - 1) + ["length"]
        streamed = [t for c in own if c.logprobs for t in c.logprobs.content]
        assert streamed == choice.logprobs.content
    assert whole.choices[0].message.content != whole.choices[1].message.content


def test_tokens_joined_are_the_text(client):
    out = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=20, seed=2, logprobs=True, top_logprobs=3
    )
    content = out.choices[0].logprobs.content
    spelled = b"".join(bytes(t.bytes) for t in content).decode(errors="replace")
    assert spelled == out.choices[0].message.content
    for token in content:
        tops = [t.logprob for t in token.top_logprobs]
        assert len(tops) == 3
        assert tops == sorted(tops, reverse=True)
        assert token.logprob <= tops[0] <= 0


def test_bias_and_stop(client):
    ask = {"model": "tiny", "messages": HELLO, "temperature": 0}
    out = client.chat.completions.create(**ask, max_tokens=5, logit_bias={"5412": 100}, logprobs=True)
    assert len({t.token.strip() for t in out.choices[0].logprobs.content}) == 1
    whole = client.chat.completions.create(**ask, max_tokens=16).choices[0].message.content
    stop = whole[4:7]
    cut = client.chat.completions.create(**ask, max_tokens=16, stop=[stop, "never said"]).choices[0]
    assert cut.message.content == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_structured_outputs_parse(client):
    out = client.chat.completions.parse(
        model="tiny", messages=HELLO, response_format=Person, max_tokens=400, seed=3,
    )  # fmt: skip
    assert isinstance(out.choices[0].message.parsed, Person)
    free = client.chat.completions.create(
        model="tiny", messages=HELLO, response_format={"type": "json_object"}, max_tokens=60, seed=1,
        extra_body={"structured_outputs": None},
    )  # fmt: skip
    assert free.choices[0].message.content.lstrip().startswith("{")
    choice = client.chat.completions.create(
        model="tiny", messages=HELLO, extra_body={"structured_outputs": {"choice": ["red", "green"]}}
    )
    assert choice.choices[0].message.content in ("red", "green")


def test_the_streaming_helper(client):
    events = []
    with client.chat.completions.stream(
        model="tiny", messages=HELLO, response_format=Person, max_tokens=400, seed=3
    ) as stream:
        for event in stream:
            events.append(event.type)
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Person)
    assert "content.delta" in events
    assert "content.done" in events


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_tool_calls(client, choice):
    ask = {
        "model": "tiny",
        "messages": HELLO,
        "tools": [TOOL],
        "tool_choice": choice,
        "max_tokens": 300,
        "seed": 4,
    }
    out = client.chat.completions.create(**ask).choices[0]
    assert out.finish_reason == "tool_calls"
    assert out.message.content is None
    assert json.loads(out.message.tool_calls[0].function.arguments)["city"] in ("Rome", "Oslo")
    with client.chat.completions.stream(**ask) as stream:
        deltas = [e for e in stream if e.type == "tool_calls.function.arguments.delta"]
        final = stream.get_final_completion().choices[0]
    assert len(deltas) > 1  # while the call is generated, not at the end
    assert final.finish_reason == "tool_calls"
    assert [c.function.arguments for c in final.message.tool_calls] == [
        c.function.arguments for c in out.message.tool_calls
    ]
    called = out.message.model_dump()
    result = {"role": "tool", "tool_call_id": out.message.tool_calls[0].id, "content": "sunny"}
    answered = client.chat.completions.create(
        model="tiny", messages=[*HELLO, called, result], tools=[TOOL], max_tokens=4
    )
    assert answered.usage.completion_tokens == 4


def test_one_call_where_no_more_are_wanted(client):
    ask = {"model": "tiny", "messages": HELLO, "tools": [TOOL], "max_tokens": 100}
    many, one = [
        client.chat.completions.create(
            **ask, tool_choice="required", parallel_tool_calls=parallel, seed=2, n=6
        )
        for parallel in (True, False)
    ]  # fmt: skip
    assert [len(c.message.tool_calls) for c in one.choices] == [1] * 6
    assert max(len(c.message.tool_calls) for c in many.choices) > 1
    assert one.usage.completion_tokens < many.usage.completion_tokens  # the other calls were not generated
    none = client.chat.completions.create(**{**ask, "max_tokens": 5}, tool_choice="none", logit_bias={"5": 100})
    assert none.choices[0].message.tool_calls is None
    auto = client.chat.completions.create(**{**ask, "max_tokens": 5}, tool_choice="auto")
    assert auto.choices[0].message.tool_calls is None


def test_completions(client):
    out = client.completions.create(model="tiny", prompt=["one", "two"], max_tokens=4, n=2, seed=1, echo=True)
    assert [c.index for c in out.choices] == [0, 1, 2, 3]
    assert [c.text[:3] for c in out.choices] == ["one", "one", "two", "two"]
    ids = client.completions.create(model="tiny", prompt=[[1, 1073, 2], [1, 17]], max_tokens=2, temperature=0)
    assert len(ids.choices) == 2
    alone = client.completions.create(model="tiny", prompt=[1, 17], max_tokens=2, temperature=0)
    assert alone.choices[0].text == ids.choices[1].text
    assert alone.usage.prompt_tokens == 2
    parts = ["", "", "", ""]
    for chunk in client.completions.create(
        model="tiny", prompt=["one", "two"], max_tokens=4, n=2, seed=1, echo=True, stream=True
    ):
        parts[chunk.choices[0].index] += chunk.choices[0].text
    assert parts == [c.text for c in out.choices]


def test_a_prompt_can_be_scored(client):
    out = client.completions.create(model="tiny", prompt="one two", max_tokens=0, echo=True, logprobs=2).choices[0]
    assert out.text == "one two"
    assert len(out.logprobs.tokens) == len(out.logprobs.token_logprobs) == len(out.logprobs.text_offset) > 2
    assert out.logprobs.token_logprobs[0] is None
    assert all(p < 0 for p in out.logprobs.token_logprobs[1:])
    longer = client.completions.create(model="tiny", prompt="one two", max_tokens=3, echo=True, logprobs=2)
    assert longer.choices[0].logprobs.token_logprobs[: len(out.logprobs.tokens)] == out.logprobs.token_logprobs
    assert len(longer.choices[0].logprobs.tokens) == len(out.logprobs.tokens) + 3


def test_embeddings(client):
    texts = ["one", "two two"]
    by_client = client.embeddings.create(model="tiny", input=texts)  # the client requests base64
    floats = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    for a, b in zip(by_client.data, floats.data, strict=True):
        assert a.embedding == pytest.approx(b.embedding, abs=1e-7)
        assert sum(x * x for x in a.embedding) == pytest.approx(1, abs=1e-5)
    assert by_client.data[0].embedding != by_client.data[1].embedding


def test_models_and_adapters(client):
    assert [m.id for m in client.models.list()] == ["tiny", "sql"]
    assert client.models.retrieve("sql").id == "sql"
    ask = {"messages": HELLO, "max_tokens": 6, "temperature": 0, "logprobs": True}
    base, adapted = [client.chat.completions.create(model=m, **ask).choices[0].logprobs for m in ("tiny", "sql")]
    assert base != adapted
    for call in (
        lambda: client.models.retrieve("nobody"),
        lambda: client.chat.completions.create(model="nobody", **ask),
        lambda: client.embeddings.create(model="nobody", input="x"),
    ):
        with pytest.raises(openai.NotFoundError) as error:
            call()
        assert (error.value.code, error.value.param) == ("model_not_found", "model")


def test_an_answer_is_gone_on_with(client):
    begun = [*HELLO, {"role": "assistant", "content": "It will be", "prefix": True}]
    ask = {"model": "tiny", "max_tokens": 6, "temperature": 0}
    fresh = client.chat.completions.create(messages=HELLO, **ask)
    on = client.chat.completions.create(messages=begun, **ask)
    assert on.usage.prompt_tokens > fresh.usage.prompt_tokens
    assert on.choices[0].message.content != fresh.choices[0].message.content
    developer = [{"role": "developer", "content": "Be brief."}, *HELLO]
    listed = [{"role": "user", "content": [{"type": "text", "text": HELLO[0]["content"]}]}]
    assert (
        client.chat.completions.create(messages=developer, **ask).usage.prompt_tokens > fresh.usage.prompt_tokens
    )
    assert client.chat.completions.create(messages=listed, **ask).choices[0].message == fresh.choices[0].message


def test_what_vllm_and_mistral_add(client):
    ask = {"model": "tiny", "messages": HELLO, "max_tokens": 6}
    more = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2, "ignore_eos": True,
            "stop_token_ids": [7], "priority": 1, "cache_salt": "me"}  # fmt: skip
    out = client.chat.completions.create(**ask, extra_body=more)
    greedy = client.chat.completions.create(**ask, extra_body={**more, "top_k": 0}, temperature=0)
    assert out.choices[0].message == greedy.choices[0].message
    a, b = [client.chat.completions.create(**ask, extra_body={"random_seed": 11}).choices[0] for _ in "ab"]
    assert a.message == b.message == client.chat.completions.create(**ask, seed=11).choices[0].message
    safe = client.chat.completions.create(**ask, extra_body={"safe_prompt": True})
    assert safe.usage.prompt_tokens > out.usage.prompt_tokens
    called = client.chat.completions.create(
        **{**ask, "max_tokens": 60}, tools=[TOOL], extra_body={"tool_choice": "any"}
    )
    assert called.choices[0].message.tool_calls


def test_async_clients_side_by_side(server):
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def one(seed: int) -> str:
                stream = await client.chat.completions.create(
                    model="tiny", messages=HELLO, max_tokens=10, seed=seed, stream=True
                )
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            return await asyncio.gather(*(one(seed) for seed in (1, 2, 1, 3)))

    texts = asyncio.run(main())
    assert texts[0] == texts[2]
    assert len(set(texts)) == 3


@pytest.mark.parametrize(
    ("change", "kind", "param"),
    [
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"extra_body": {"temperatur": 1}}, openai.BadRequestError, "temperatur"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         openai.BadRequestError, "messages[0].content[0]"),
        ({"n": 13}, openai.UnprocessableEntityError, "n"),
        ({"max_tokens": 4, "messages": [{"role": "user", "content": "x " * 2000}]},
         openai.BadRequestError, "messages"),
        ({"stop": "x" * 1000}, openai.BadRequestError, "stop"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}},
         openai.BadRequestError, "structured_outputs.json"),
        ({"tool_choice": "required"}, openai.BadRequestError, "tool_choice"),
        ({"logit_bias": {"99999": 1}}, openai.BadRequestError, "logit_bias"),
        ({"logit_bias": {"a": 1}}, openai.BadRequestError, "logit_bias"),
    ],
)  # fmt: skip
def test_what_is_refused(client, change, kind, param):
    ask = {"model": "tiny", "messages": HELLO, "max_tokens": 4, **change}
    with pytest.raises(kind) as error:
        client.chat.completions.create(**ask)
    assert (error.value.type, error.value.param) == ("invalid_request_error", param)
