"""Tool calls of a model that writes <tool_call> tags, as Hermes 2 Pro does, over the APIs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from serving import HELLO, TOOL, Serving, serving
from template_shapes import HERMES_TOOLS
from tiny import tiny_args, tiny_model
from tokenizer_files import sentencepiece_folder

from mistral_7b.text.tokenizer import Tokenizer
from mistral_7b.text.tool_calls import CLOSING, OPENING

ARGUMENTS = '{"city": "Rome", "days": 3}'
SAID = f'I shall look.\n{OPENING}\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n{CLOSING}'
TWICE = SAID + SAID.removeprefix("I shall look.") + "\n"


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = sentencepiece_folder(tmp_path_factory.mktemp("hermes"), chat_template=HERMES_TOOLS)
    tokenizer = Tokenizer.from_pretrained(folder)
    model = tiny_model(tiny_args(vocab_size=tokenizer.vocab_size, sliding_window=None, max_seq_len=2048))
    with serving(trained=model, tokenizer=tokenizer) as it:
        yield it
        it.idle()


def saying(text: str, **more: Any) -> dict[str, Any]:
    """A request whose answer is this text, as if the model chose it."""
    grammar = f"start: TEXT\nTEXT: {json.dumps(text)}"
    return {
        "messages": HELLO,
        "tools": [TOOL],
        "structured_outputs": {"grammar": grammar},
        "temperature": 0,
        **more,
    }


def streamed(server: Serving, body: dict[str, Any]) -> list[dict[str, Any]]:
    data = server.ask("POST", "/v1/chat/completions", {**body, "stream": True})[2].decode()
    return [json.loads(line)["choices"][0] for line in re.findall(r"^data: (\{.*)$", data, re.M)]


@pytest.mark.parametrize(("said", "count"), [(SAID, 1), (TWICE, 2)])
def test_calls_and_the_text_before_them(hermes: Serving, said: str, count: int) -> None:
    status, out = hermes.post("/v1/chat/completions", saying(said, logprobs=True))
    assert status == 200, out
    (choice,) = out["choices"]
    calls = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", "I shall look.")
    assert [c["function"] for c in calls] == [{"name": "weather", "arguments": ARGUMENTS}] * count
    assert len({c["id"] for c in calls}) == count
    spelled = b"".join(bytes(t["bytes"]) for t in choice["logprobs"]["content"]).decode()
    assert spelled == "I shall look."


def test_a_stream_sends_id_and_name_once_and_then_fragments(hermes: Serving) -> None:
    choices = streamed(hermes, saying(TWICE, logprobs=True))
    assert "".join(c["delta"].get("content", "") for c in choices) == "I shall look."
    parts = [part for c in choices for part in c["delta"].get("tool_calls", [])]
    for index in range(2):
        first, *others = [part for part in parts if part["index"] == index]
        assert (first["type"], first["function"]["name"], len(first["id"])) == ("function", "weather", 9)
        assert all(part.keys() == {"index", "function"} for part in others)
        assert "".join(part["function"]["arguments"] for part in (first, *others)) == ARGUMENTS
    assert len(parts) > 2
    assert choices[-1]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_calls_can_be_forced(hermes: Serving, choice: Any) -> None:
    body = {"messages": HELLO, "tools": [TOOL], "tool_choice": choice, "temperature": 1, "seed": 3,
            "parallel_tool_calls": False, "max_tokens": 300}  # fmt: skip
    (out,) = hermes.post("/v1/chat/completions", body)[1]["choices"]
    (call,) = out["message"]["tool_calls"]
    assert (out["finish_reason"], out["message"]["content"], call["function"]["name"]) == (
        "tool_calls", None, "weather",
    )  # fmt: skip
    made = json.loads(call["function"]["arguments"])
    assert made.keys() == {"city", "days"}
    back = [*HELLO, out["message"], {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}]
    text = hermes.llm.tokenizer.chat._template.render(back, [TOOL]).text  # type: ignore[union-attr]
    assert OPENING in text.split("<|im_start|>assistant")[1]
    assert hermes.post("/v1/chat/completions", {"messages": back, "tools": [TOOL], "max_tokens": 2})[0] == 200


def test_tags_are_text_where_no_tools_are_offered(hermes: Serving) -> None:
    body = saying(SAID)
    del body["tools"]
    (out,) = hermes.post("/v1/chat/completions", body)[1]["choices"]
    assert (out["finish_reason"], out["message"]["content"]) == ("stop", SAID)


def test_the_model_is_said_to_call_tools(hermes: Serving) -> None:
    (told,) = json.loads(hermes.ask("GET", "/v1/models")[2])["data"]
    assert told["capabilities"]["function_calling"]
    assert told["tokenizer"]["chat"]["tools"]


def test_anthropics_api_has_the_same_calls(hermes: Serving) -> None:
    schema = {"type": "object", "required": ["city"], "additionalProperties": False,
              "properties": {"city": {"enum": ["Rome", "Oslo"]}}}  # fmt: skip
    tool = {"name": "weather", "input_schema": schema}
    asked = {"tools": [tool], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}, "max_tokens": 300}
    body = {"model": "tiny", "messages": HELLO, **asked}
    status, out = hermes.post("/v1/messages", body)
    assert status == 200, out
    assert out["stop_reason"] == "tool_use"
    assert {block["type"] for block in out["content"]} == {"tool_use"}
