"""`param`, status and type come from an error's attributes: they stay the same if every message is replaced."""

from __future__ import annotations

from typing import Any

import pytest
from serving import HELLO, TOOL, Serving

from mistral_7b.errors import GenerationError, Mistral7BError, PromptTooLongError, TokenizerError
from mistral_7b.server.http.errors import refusal

REWORDED = "tout autre chose: temperature, messages[7]: tools"
CHAT, TEXT, ANTHROPIC = "/v1/chat/completions", "/v1/completions", "/v1/messages"
CALL = {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": "{}"}}
IMAGE = {"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image_url"}]}
LONG = "x " * 1200
LAW: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
BEGUN = [*HELLO, {"role": "assistant", "content": "hello", "prefix": True}]
LATE = {"role": "system", "content": "late"}
DO = {"type": "tool_use", "id": "t1", "name": "f", "input": {}}
DONE = {"type": "tool_result", "tool_use_id": "t1"}
BAD, GONE = "invalid_request_error", "not_found_error"


def chat(**more: Any) -> dict[str, Any]:
    return {"messages": HELLO, "max_tokens": 2, **more}


CASES: list[tuple[str, dict[str, Any], int, str, str | None]] = [
    (CHAT, chat(temperature=-1), 400, BAD, "temperature"),
    (CHAT, chat(top_p=7), 400, BAD, "top_p"),
    (CHAT, chat(min_tokens=9), 400, BAD, "min_tokens"),
    (CHAT, chat(logit_bias={"a": 1}), 400, BAD, "logit_bias"),
    (CHAT, chat(logit_bias={"99999": 1}), 400, BAD, "logit_bias"),
    (CHAT, chat(stop_token_ids=[99999]), 400, BAD, "stop_token_ids"),
    (CHAT, chat(structured_outputs={"json": "{"}), 400, BAD, "structured_outputs.json"),
    (CHAT, chat(structured_outputs={"json": {"type": "no"}}), 400, BAD, "structured_outputs.json"),
    (CHAT, chat(structured_outputs={"jason": {}}), 400, BAD, "structured_outputs.jason"),
    (CHAT, chat(structured_outputs={}), 400, BAD, "structured_outputs"),
    (CHAT, chat(structured_outputs={"regex": "a", "choice": ["b"]}), 400, BAD, "structured_outputs"),
    (CHAT, chat(structured_outputs={"regex": "a("}), 400, BAD, "structured_outputs"),  # the grammar worker's error
    (CHAT, chat(structured_outputs={"grammar": "start: X\nX: /a/ & /b/"}), 400, BAD, "structured_outputs"),
    (CHAT, chat(structured_outputs={"json": LAW}, messages=BEGUN), 400, BAD, "structured_outputs"),
    (CHAT, chat(tool_choice="required"), 400, BAD, "tool_choice"),
    (CHAT, chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "no"}}), 400, BAD,
     "tool_choice"),
    (CHAT, chat(tools=[TOOL, {"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]),
     400, BAD, "tools[1].function.parameters.type"),
    (CHAT, chat(messages=[*HELLO, IMAGE]), 400, BAD, "messages[1].content[1]"),
    (CHAT, chat(messages=[*HELLO, IMAGE], safe_prompt=True), 400, BAD, "messages[1].content[1]"),
    (CHAT, chat(messages=[*HELLO, {"role": "assistant"}]), 400, BAD, "messages[1].content"),
    (CHAT, chat(messages=[*HELLO, {"role": "tool", "content": "a"}]), 400, BAD, "messages[1].tool_call_id"),
    (CHAT, chat(messages=[*BEGUN, *HELLO]), 400, BAD, "messages[1].prefix"),
    (CHAT, chat(messages=[*HELLO, LATE, LATE, {"role": "assistant", "tool_calls": [CALL]}]), 400, BAD,
     "messages[3]"),
    (CHAT, chat(messages=[LATE]), 400, BAD, "messages"),
    (CHAT, chat(messages=[{"role": "user", "content": LONG}]), 400, BAD, "messages"),
    (CHAT, chat(model="no"), 404, GONE, "model"),
    (CHAT, chat(n=99), 422, BAD, "n"),
    (CHAT, chat(top_logprobs=2), 400, BAD, "top_logprobs"),
    (CHAT, chat(function_call="f"), 400, BAD, "function_call"),  # pydantic
    (TEXT, {"prompt": "a", "temperature": -1}, 400, BAD, "temperature"),
    (TEXT, {"prompt": []}, 400, BAD, "prompt"),
    (TEXT, {"prompt": [99999]}, 400, BAD, "prompt"),
    (TEXT, {"prompt": "a", "best_of": 7}, 400, BAD, "best_of"),
    ("/v1/embeddings", {"input": [[99999]]}, 400, BAD, "input"),
    ("/v1/embeddings", {"input": "a", "dimensions": 3}, 400, BAD, "dimensions"),
    ("/tokenize", {"messages": [IMAGE]}, 400, BAD, "messages[0].content[1]"),
    ("/detokenize", {"tokens": [99999]}, 400, BAD, "tokens"),
    (ANTHROPIC, chat(model="tiny", top_p=7), 400, BAD, "top_p"),
    (ANTHROPIC, chat(model="no"), 404, GONE, "model"),
    (ANTHROPIC, chat(model="tiny", messages=[*HELLO, {"role": "user", "content": [DONE]}]), 400, BAD,
     "messages[1]"),
    (ANTHROPIC, chat(model="tiny", messages=[*HELLO, {"role": "user", "content": []}]), 400, BAD,
     "messages[1].content"),
    (ANTHROPIC, chat(model="tiny", system="s", messages=[
        *HELLO, {"role": "assistant", "content": [DO]}, {"role": "user", "content": [DONE]}, LATE, *HELLO,
    ]), 400, BAD, "messages[3]"),  # index 4 in the prompt's messages, where `system` is the first
    (ANTHROPIC, chat(model="tiny", messages=[{"role": "user", "content": LONG}]), 400, BAD, "messages"),
    (ANTHROPIC + "/count_tokens", {"model": "tiny", "messages": [LATE]}, 400, BAD, "messages"),
]  # fmt: skip


@pytest.fixture
def reword(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every error in this process the same message."""
    make = Mistral7BError.__init__

    def init(self: Mistral7BError, message: str = "", **data: Any) -> None:
        make(self, REWORDED, **{**data, "hint": None})

    monkeypatch.setattr(Mistral7BError, "__init__", init)


@pytest.mark.parametrize(("path", "body", "status", "kind", "param"), CASES)
def test_the_field_is_named(
    server: Serving, path: str, body: dict[str, Any], status: int, kind: str, param: str | None
) -> None:
    answered, out = server.post(path, body)
    assert (answered, out["error"]["type"], out["error"]["param"]) == (status, kind, param), out
    assert out["error"]["message"] != REWORDED


@pytest.mark.wording  # it rewords what is said itself
@pytest.mark.usefixtures("reword")
@pytest.mark.parametrize(("path", "body", "status", "kind", "param"), CASES)
def test_no_message_is_read(
    server: Serving, path: str, body: dict[str, Any], status: int, kind: str, param: str | None
) -> None:
    answered, out = server.post(path, body)
    error = out["error"]
    assert (answered, error["type"], error["param"], error["message"]) == (status, kind, param, REWORDED)


@pytest.mark.parametrize(("path", "field"), [(CHAT, "messages"), (ANTHROPIC, "messages"), (TEXT, "prompt")])
def test_what_never_fits_names_the_field_that_it_came_in(
    server: Serving, monkeypatch: pytest.MonkeyPatch, path: str, field: str
) -> None:
    monkeypatch.setattr(server.llm.engine.pool, "n_pages", 1)
    status, out = server.post(path, {"model": "tiny", "max_tokens": 9, "messages": HELLO} if path != TEXT else
                              {"prompt": "How will the weather be?", "max_tokens": 9})  # fmt: skip
    assert (status, out["error"]["code"], out["error"]["param"]) == (422, "too_large", field), out


@pytest.mark.wording  # it rewords what is said itself
@pytest.mark.usefixtures("reword")
@pytest.mark.parametrize("path", [CHAT, ANTHROPIC])
def test_what_the_engine_refuses_keeps_its_code(
    server: Serving, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    for error, status, code in (
        (PromptTooLongError("long", field="messages"), 400, "context_length_exceeded"),
        (GenerationError("empty", field="messages"), 400, None),
    ):

        def refuse(*_: Any, error: Mistral7BError = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(server.llm.inputs, "chat", refuse)
        answered, out = server.post(path, chat(model="tiny"))
        assert answered == status
        assert out["error"] == {"message": REWORDED, "type": BAD, "param": "messages", "code": code}


def test_paths_of_the_model_are_not_sent() -> None:
    answer = refusal(TokenizerError("refused", field="tools", place="/secret/tokenizer_config.json"))
    assert (answer.status, answer.field) == (400, "tools")
    assert "secret" not in str(answer.body(CHAT))
