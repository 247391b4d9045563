"""Anthropic's client against /v1/messages: responses, streams, tools, errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import httpx
import pytest
from serving import Serving, serving

from mistral_7b.sampling.params import SamplingParams
from mistral_7b.server.anthropic.messages import wire as anthropic_wire
from mistral_7b.server.config import ServerConfig

anthropic = pytest.importorskip("anthropic")

KEY, ADMIN = "key-of-the-tests", "admin-of-the-tests"
ASK = [{"role": "user", "content": "Say something."}]
WEATHER = {
    "name": "weather",
    "input_schema": {
        "type": "object", "required": ["city", "days"], "additionalProperties": False,
        "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "maximum": 9}},
    },
}  # fmt: skip
SEED = {"seed": 3, "temperature": 0.8}
MANY = {"seed": 2}  # gives several calls


@pytest.fixture(scope="module")
def served() -> Iterator[Serving]:
    with serving(ServerConfig(port=0, api_keys=(KEY,), admin_keys=(ADMIN,), max_prompt_tokens=300)) as it:
        yield it


@pytest.fixture(scope="module")
def client(served: Serving) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.url, api_key=KEY, max_retries=0) as client:
        yield client


def test_a_message_is_what_the_engine_gives(client: anthropic.Anthropic, served: Serving) -> None:
    message = client.messages.create(
        model="tiny", max_tokens=12, messages=ASK, system="Be brief.", metadata={"user_id": "u"}, extra_body=SEED
    )

    async def direct() -> str:
        talk = [{"role": "system", "content": "Be brief."}, *ASK]
        params = SamplingParams(max_tokens=12, seed=3, temperature=0.8)
        outputs = [output async for output in served.llm.chat(talk, params)]
        return outputs[-1].outputs[0].text

    assert message.content[0].text == asyncio.run(direct())
    assert message.type == "message"
    assert message.id.startswith("msg_")
    assert (message.role, message.model, message.stop_reason) == ("assistant", "tiny", "max_tokens")
    assert message.usage.output_tokens == 12
    count = client.messages.count_tokens(model="tiny", messages=ASK, system="Be brief.")
    assert message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) == count.input_tokens


def test_a_stream_says_the_same(client: anthropic.Anthropic) -> None:
    asked = {"model": "tiny", "max_tokens": 20, "messages": ASK, "extra_body": SEED}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        texts = list(stream.text_stream)
        final = stream.get_final_message()
    assert len(texts) > 3
    assert "".join(texts) == whole.content[0].text == final.content[0].text
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    kinds = [event.type for event in client.messages.create(**asked, stream=True)]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_the_asynchronous_client(served: Serving) -> None:
    async def run() -> None:
        async with anthropic.AsyncAnthropic(base_url=served.url, api_key=KEY, max_retries=0) as client:
            asked = [
                client.messages.create(
                    model="tiny", max_tokens=9, messages=ASK, extra_body={"seed": i, "temperature": 1.0}
                )
                for i in (1, 2, 1)
            ]
            one, other, again = await asyncio.gather(*asked)
            assert one.content == again.content != other.content
            async with client.messages.stream(
                model="tiny", max_tokens=9, messages=ASK, extra_body={"seed": 1, "temperature": 1.0}
            ) as stream:
                text = "".join([part async for part in stream.text_stream])
            assert text == one.content[0].text

    asyncio.run(run())


def test_stop_sequences(client: anthropic.Anthropic) -> None:
    asked = {"model": "tiny", "max_tokens": 20, "messages": ASK, "extra_body": SEED}
    text = client.messages.create(**asked).content[0].text
    stop = text[5:8]
    message = client.messages.create(**asked, stop_sequences=["never to be seen", stop])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert message.content[0].text == text[: text.index(stop)]


def test_an_answer_that_has_begun_is_gone_on_with(client: anthropic.Anthropic) -> None:
    begun = [*ASK, {"role": "assistant", "content": "It is"}]
    message = client.messages.create(model="tiny", max_tokens=4, messages=begun, extra_body=SEED)
    assert not message.content[0].text.startswith("It is")
    assert (
        client.messages.count_tokens(model="tiny", messages=begun).input_tokens
        > client.messages.count_tokens(model="tiny", messages=ASK).input_tokens
    )


def ask_for_tools(client: anthropic.Anthropic, **choice: object) -> anthropic.types.Message:
    return client.messages.create(
        model="tiny", max_tokens=300, messages=ASK, tools=[WEATHER], tool_choice=choice, extra_body=MANY
    )  # type: ignore[call-overload]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_tools_are_called_and_answered(client: anthropic.Anthropic, choice: dict[str, str]) -> None:
    message = ask_for_tools(client, **choice)
    assert message.stop_reason == "tool_use"
    calls = [block for block in message.content if block.type == "tool_use"]
    assert len(calls) == len(message.content) >= 1
    for call in calls:
        assert call.name == "weather"
        assert call.input["city"] in ("Rome", "Oslo")
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": "sunny"} for call in calls]
    talk = [*ASK, {"role": "assistant", "content": message.content}, {"role": "user", "content": results}]
    answer = client.messages.create(model="tiny", max_tokens=5, messages=talk, tools=[WEATHER], extra_body=SEED)
    assert answer.usage.output_tokens == 5
    with client.messages.stream(
        model="tiny", max_tokens=300, messages=ASK, tools=[WEATHER], tool_choice=choice, extra_body=MANY
    ) as stream:
        parts = [event for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    assert [(b.name, b.input) for b in final.content] == [(c.name, c.input) for c in calls]
    assert len(parts) > len(calls)


def test_one_call_at_most(client: anthropic.Anthropic) -> None:
    message = ask_for_tools(client, type="any", disable_parallel_tool_use=True)
    assert [block.type for block in message.content] == ["tool_use"]


def test_what_comes_after_the_last_call_that_is_wanted_is_not_computed(
    client: anthropic.Anthropic, served: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = ask_for_tools(client, type="any")
    assert len(many.content) > 1
    monkeypatch.setattr(anthropic_wire, "most_calls", lambda request: 1)
    before = served.llm.engine.counts.generated_tokens
    one = ask_for_tools(client, type="any")
    served.idle()
    assert served.llm.engine.counts.generated_tokens - before < many.usage.output_tokens
    assert [block.to_dict() for block in one.content] == [{**many.content[0].to_dict(), "id": one.content[0].id}]
    assert one.stop_reason == "tool_use"


def test_tools_that_may_not_be_seen(client: anthropic.Anthropic) -> None:
    counts = [
        client.messages.count_tokens(model="tiny", messages=ASK, **more).input_tokens
        for more in ({}, {"tools": [WEATHER], "tool_choice": {"type": "none"}}, {"tools": [WEATHER]})
    ]
    assert counts[0] == counts[1] < counts[2]


def test_a_format(client: anthropic.Anthropic) -> None:
    schema = {
        "type": "object", "required": ["a"], "additionalProperties": False,
        "properties": {"a": {"enum": [1, 2]}},
    }  # fmt: skip
    message = client.messages.create(
        model="tiny", max_tokens=60, messages=ASK, extra_body={"seed": 1},
        output_config={"format": {"type": "json_schema", "schema": schema}},
    )  # fmt: skip
    assert json.loads(message.content[0].text)["a"] in (1, 2)
    assert message.stop_reason == "end_turn"


@pytest.mark.parametrize(
    ("fields", "error", "kind", "param"),
    [
        ({"model": "claude"}, anthropic.NotFoundError, "not_found_error", "model"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]},
         anthropic.BadRequestError, "invalid_request_error", "tools.0.type"),
        ({"extra_body": {"n": 2}}, anthropic.BadRequestError, "invalid_request_error", "n"),
        ({"max_tokens": 0}, anthropic.BadRequestError, "invalid_request_error", "max_tokens"),
        ({"extra_body": {"top_p": 7}}, anthropic.BadRequestError, "invalid_request_error", "top_p"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            anthropic.BadRequestError, "invalid_request_error", "messages.0.content.0",
        ),
        (
            {"messages": [*ASK, {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
            anthropic.BadRequestError, "invalid_request_error", "messages[1]",
        ),
        (
            {"messages": [{"role": "system", "content": "s"}], "system": "s"},
            anthropic.BadRequestError, "invalid_request_error", "messages",
        ),
        (
            {"messages": [{"role": "user", "content": "too long " * 400}]},
            anthropic.BadRequestError, "invalid_request_error", "messages",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_are_the_clients_own_exceptions(
    client: anthropic.Anthropic, fields: dict[str, object], error: type[Exception], kind: str,
    param: str | None, stream: bool,
) -> None:  # fmt: skip
    asked = {"model": "tiny", "max_tokens": 4, "messages": ASK, **fields}
    with pytest.raises(error) as refused:
        client.messages.create(**asked, stream=stream)  # type: ignore[call-overload]
    assert refused.value.type == kind  # type: ignore[attr-defined]
    body = refused.value.body  # type: ignore[attr-defined]
    assert (body["type"], body["error"]["param"]) == ("error", param)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"x-api-key": KEY}, 200), ({"authorization": f"Bearer {KEY}"}, 200), ({"x-api-key": ADMIN}, 200),
        ({"x-api-key": "wrong"}, 401), ({}, 401),
    ],
)  # fmt: skip
def test_either_header_brings_the_key(served: Serving, headers: dict[str, str], status: int) -> None:
    body = {"model": "tiny", "messages": ASK}
    response = httpx.post(f"{served.url}/v1/messages/count_tokens", json=body, headers=headers)
    assert response.status_code == status
    if status == 401:
        assert response.json()["type"] == "error"
        assert response.json()["error"]["type"] == "authentication_error"


def test_models(client: anthropic.Anthropic) -> None:
    (model,) = client.models.list()
    assert (model.id, model.display_name, model.created_at.year > 2024) == ("tiny", "tiny", True)
    assert client.models.retrieve("tiny").id == "tiny"


def test_a_reader_who_goes_frees_the_pages(client: anthropic.Anthropic, served: Serving) -> None:
    engine = served.llm.engine
    with client.messages.stream(model="tiny", max_tokens=900, messages=ASK, extra_body=SEED) as stream:
        next(iter(stream.text_stream))
        assert engine.pool.held > 0

    async def settle() -> None:
        for _ in range(100):
            if engine.idle:
                return
            await asyncio.sleep(0.02)

    asyncio.run(settle())
    assert engine.idle
    assert engine.pool.held == 0
    engine.check()
