"""Continuing a last assistant message: Mistral's, vLLM's and Anthropic's request formats give the same prompt."""

from __future__ import annotations

import json
from typing import Any

import pytest
from serving import HELLO, Serving

from mistral_7b.text.tokenizer import Tokenizer

BEGUN = [*HELLO, {"role": "assistant", "content": "It will be"}]
OPENAI = {"max_tokens": 4, "temperature": 0}
CALL = {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.fixture
def given(server: Serving, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The token ids of each prompt that reaches the engine."""
    out: list[list[int]] = []
    make = server.llm.inputs.chat

    def spy(*args: Any, **more: Any) -> Any:
        request = make(*args, **more)
        out.append(list(request.ids))
        return request

    monkeypatch.setattr(server.llm.inputs, "chat", spy)
    return out


@pytest.mark.parametrize(
    "text", ["It will be", "It will be ", " Grüße, 世界🙂", "\n", "so:  \n\t", "   ", " a \n "]
)
def test_every_dialect_gives_the_model_the_same(server: Serving, given: list[list[int]], text: str) -> None:
    begun = [*HELLO, {"role": "assistant", "content": text}]
    v3 = Tokenizer.v3()
    wanted = [*v3.encode_chat(HELLO), *v3.encode(text, bos=False)]
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {**OPENAI, "messages": [*HELLO, {**begun[1], "prefix": True}]}),
        ("/v1/chat/completions", {**OPENAI, "messages": begun, "continue_final_message": True}),
        ("/v1/chat/completions", {**OPENAI, "messages": begun, "continue_final_message": True,
                                  "add_generation_prompt": False}),
        ("/v1/messages", {**OPENAI, "model": "tiny", "messages": begun}),
    ]  # fmt: skip
    answers = []
    for path, body in asked:
        status, out = server.post(path, body)
        assert status == 200, out
        answers.append(out["choices"][0]["message"]["content"] if "choices" in out else out["content"][0]["text"])
    assert given == [wanted] * 4
    assert len(set(answers)) == 1
    ending = {"continue_final_message": True, "add_generation_prompt": False}
    assert server.post("/tokenize", {"messages": begun, **ending})[1]["tokens"] == wanted


@pytest.mark.parametrize(
    ("messages", "ending", "param"),
    [
        (BEGUN, {"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        (HELLO, {"continue_final_message": True}, "continue_final_message"),
        ([*HELLO, {"role": "assistant", "content": ""}], {"continue_final_message": True},
         "continue_final_message"),
        ([*HELLO, {"role": "assistant", "content": "a", "tool_calls": [CALL]}], {"continue_final_message": True},
         "continue_final_message"),
        (BEGUN, {}, "messages[1]"),
        (BEGUN, {"add_generation_prompt": True}, "messages[1]"),
        (BEGUN, {"continue_final_message": 1}, "continue_final_message"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_what_makes_no_sense_is_refused(
    server: Serving, path: str, messages: list[Any], ending: dict[str, Any], param: str
) -> None:
    status, out = server.post(path, {"messages": messages, **ending})
    assert (status, out["error"]["param"]) == (400, param), out


def test_the_template_opens_an_answer_with_nothing(server: Serving, given: list[list[int]]) -> None:
    for ending in ({}, {"add_generation_prompt": True}, {"add_generation_prompt": False}):
        assert server.post("/v1/chat/completions", {**OPENAI, "messages": HELLO, **ending})[0] == 200
    assert given == [Tokenizer.v3().encode_chat(HELLO)] * 3


SCHEMA = {
    "type": "object", "required": ["name", "n"], "additionalProperties": False,
    "properties": {"name": {"type": "string", "maxLength": 8}, "n": {"enum": [1, 23]}},
}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def going_on(text: str, **more: Any) -> dict[str, Any]:
    asked = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    begun = [*HELLO, {"role": "assistant", "content": text, "prefix": True}]
    return {"messages": begun, "response_format": asked, "max_tokens": 200, "seed": 3, **more}


@pytest.mark.parametrize("more", [{}, {"tools": [TOOL], "tool_choice": "auto"}], ids=["alone", "with tools"])
@pytest.mark.parametrize(
    "text",
    ['{"name": "Ad', '{"name"', '{"name": "Ada", "n": 2', '{"name": "Ada", "n": 1}', "{", "{  ", '{"name": ',
     '{"name":\n\t  ', '{"name": "Ada", '],
)  # fmt: skip
def test_a_schema_holds_for_the_whole_answer(server: Serving, text: str, more: dict[str, Any]) -> None:
    status, body = server.post("/v1/chat/completions", going_on(text, **more))
    assert status == 200
    (choice,) = body["choices"]
    whole = json.loads(text + choice["message"]["content"])
    assert whole.keys() == {"name", "n"}
    assert whole["n"] in (1, 23)
    assert choice["finish_reason"] == "stop"


def test_a_schema_holds_for_the_whole_answer_in_anthropics_words(server: Serving) -> None:
    text = '{"name": '
    begun = [*HELLO, {"role": "assistant", "content": text}]
    output = {"format": {"type": "json_schema", "schema": SCHEMA}}
    status, body = server.post(
        "/v1/messages", {"model": "tiny", "messages": begun, "max_tokens": 200, "seed": 3, "output_config": output}
    )
    assert status == 200
    assert json.loads(text + body["content"][0]["text"]).keys() == {"name", "n"}


@pytest.mark.parametrize("text", ["hello", '{"nome', '{"name": "far too long a name', '{"name" "', '{"n": 1, '])
def test_a_beginning_that_the_schema_forbids_is_refused(server: Serving, text: str) -> None:
    status, body = server.post("/v1/chat/completions", going_on(text))
    assert (status, body["error"]["param"]) == (400, "structured_outputs")
