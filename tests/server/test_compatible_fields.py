"""What clients of other servers send: nulls, -1 for no limit, top_p 0, vLLM's defaults, empty answers, HEAD."""

from __future__ import annotations

import json
from typing import Any

import pytest
from serving import HELLO, TOOL, Serving

from mistral_7b.server.anthropic.wire import MessagesRequest
from mistral_7b.server.openai.protocol import ChatRequest, CompletionRequest, EmbeddingRequest
from mistral_7b.text.tokenizer import Tokenizer

CHAT, TEXT, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
ASK: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HELLO, "max_tokens": 3, "temperature": 0},
    TEXT: {"prompt": "one", "max_tokens": 3, "temperature": 0},
    MESSAGES: {"model": "tiny", "messages": HELLO, "max_tokens": 3, "temperature": 0},
}
BOTH = pytest.mark.parametrize("path", [CHAT, TEXT])


def said(out: dict[str, Any]) -> str:
    if "choices" not in out:
        return out["content"][0]["text"]
    (choice,) = out["choices"]
    return choice["text"] if "text" in choice else choice["message"]["content"]


@pytest.mark.parametrize("path", ASK)
def test_top_p_zero_takes_the_most_probable_token(server: Serving, path: str) -> None:
    greedy = said(server.post(path, ASK[path])[1])
    for seed in range(3):
        status, out = server.post(path, {**ASK[path], "temperature": 1.5, "top_p": 0, "seed": seed})
        assert (status, said(out)) == (200, greedy)


@pytest.mark.parametrize(
    ("path", "field"), [(CHAT, "max_tokens"), (CHAT, "max_completion_tokens"), (TEXT, "max_tokens")]
)
def test_minus_one_is_no_limit(server: Serving, path: str, field: str) -> None:
    body = {k: v for k, v in ASK[path].items() if k != "max_tokens"}
    context = server.llm.engine.model.args.max_seq_len
    status, out = server.post(path, {**body, field: -1, "ignore_eos": True})
    assert (status, out["usage"]["total_tokens"]) == (200, context)
    for wrong in (-2, *([0] if path == CHAT else [])):
        status, out = server.post(path, {**body, field: wrong})
        assert (status, out["error"]["param"]) == (400, field)


@pytest.mark.parametrize(
    ("path", "model"),
    [(CHAT, ChatRequest), (TEXT, CompletionRequest), ("/v1/embeddings", EmbeddingRequest),
     (MESSAGES, MessagesRequest)],
)  # fmt: skip
def test_null_is_the_same_as_nothing(server: Serving, path: str, model: Any) -> None:
    body = {"input": "one"} if path == "/v1/embeddings" else ASK[path]
    nulls = {f.alias or name: None for name, f in model.model_fields.items()}
    status, out = server.post(path, {**nulls, **body})
    assert status == 200, out
    assert server.post(path, {**body, "never_heard_of": None})[1]["error"]["code"] == "unknown_field"


def test_nulls_further_in(server: Serving) -> None:
    calls = [{"id": None, "type": None, "function": {"name": "weather", "arguments": None}}]
    messages = [{**HELLO[0], "name": None, "tool_calls": None, "prefix": None},
                {"role": "assistant", "content": None, "tool_calls": calls},
                {"role": "tool", "tool_call_id": None, "content": "sunny"}]  # fmt: skip
    tool = {"type": None, "function": {**TOOL["function"], "description": None, "strict": None}}
    more = {"tools": [tool], "response_format": None, "stream_options": None, "add_special_tokens": None}
    status, out = server.post(CHAT, {**ASK[CHAT], "messages": messages, **more})
    assert status == 200, out
    assert server.post("/tokenize", {"prompt": "one", "add_special_tokens": None})[0] == 200


DEFAULTS = {
    "skip_special_tokens": True, "include_stop_str_in_output": False, "spaces_between_special_tokens": True,
    "length_penalty": 1.0, "best_of": 1, "use_beam_search": False, "early_stopping": False, "echo": False,
    "truncate_prompt_tokens": None, "bad_words": [], "logits_processors": None, "return_token_ids": False,
    "return_tokens_as_token_ids": False, "allowed_token_ids": None, "chat_template": None, "documents": None,
    "include_reasoning": True, "chat_template_kwargs": {"enable_thinking": False}, "min_tokens": 0,
    "guided_decoding_backend": "xgrammar", "request_id": "r", "add_generation_prompt": True,
}  # fmt: skip
OTHERS = {
    "skip_special_tokens": False, "include_stop_str_in_output": True, "length_penalty": 2.0, "best_of": 2,
    "use_beam_search": True, "early_stopping": True, "echo": True, "truncate_prompt_tokens": 9, "bad_words": ["a"],
    "return_token_ids": True, "allowed_token_ids": [1], "chat_template": "x", "documents": [{}],
    "add_special_tokens": True,
}  # fmt: skip


def test_vllms_defaults_change_nothing(server: Serving) -> None:
    plain = said(server.post(CHAT, ASK[CHAT])[1])
    for field, value in DEFAULTS.items():
        status, out = server.post(CHAT, {**ASK[CHAT], field: value})
        assert (status, out.get("choices") and said(out)) == (200, plain), (field, out)
    own = {k: v for k, v in DEFAULTS.items() if k != "add_generation_prompt"}
    assert server.post(TEXT, {**ASK[TEXT], **own, "add_special_tokens": True})[0] == 200


@pytest.mark.parametrize("field", OTHERS)
def test_vllms_other_values_are_refused_by_name(server: Serving, field: str) -> None:
    status, out = server.post(CHAT, {**ASK[CHAT], field: OTHERS[field]})
    assert (status, out["error"]["param"], out["error"]["code"]) == (400, field, None), out
    assert "not supported" in out["error"]["message"]


@BOTH
def test_guided_fields_are_structured_outputs(server: Serving, path: str) -> None:
    body = {**ASK[path], "max_tokens": 60, "temperature": 1.0}
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    assert json.loads(said(server.post(path, {**body, "guided_json": schema})[1]))["a"] in (1, 2)
    assert json.loads(said(server.post(path, {**body, "guided_json": json.dumps(schema)})[1]))["a"] in (1, 2)
    assert said(server.post(path, {**body, "guided_regex": "ab?c"})[1]) in ("ac", "abc")
    assert said(server.post(path, {**body, "guided_choice": ["yes", "no"]})[1]) in ("yes", "no")
    assert said(server.post(path, {**body, "guided_grammar": 'start: "x" | "y"'})[1]) in ("x", "y")


@BOTH
def test_guided_fields_are_named(server: Serving, path: str) -> None:
    for wrong, field in (
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": {"type": "no"}}, "guided_json"),
        ({"guided_regex": "a("}, "guided_regex"),  # the grammar worker's error
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": "a", "structured_outputs": {"regex": "b"}}, "guided_regex"),
    ):
        status, out = server.post(path, {**ASK[path], **wrong})
        assert (status, out["error"]["param"]) == (400, field), out
        assert "structured_outputs." not in out["error"]["message"]


@pytest.mark.parametrize(
    "empty", [{"content": ""}, {"content": None}, {}, {"content": []}, {"content": "", "tool_calls": []}]
)
def test_an_empty_answer_is_a_turn(server: Serving, empty: dict[str, Any]) -> None:
    """It is the end of the sequence alone: just what the model wrote."""
    messages = [*HELLO, {"role": "assistant", **empty}, {"role": "user", "content": "Well?"}]
    status, out = server.post("/tokenize", {"messages": messages})
    assert status == 200, out
    v3 = Tokenizer.v3()
    first, second = v3.encode_chat(HELLO), v3.encode_chat([{"role": "user", "content": "Well?"}])
    assert out["tokens"] == [*first, v3.eos_id, *second[1:]]
    assert server.post(CHAT, {**ASK[CHAT], "messages": messages})[0] == 200


@pytest.mark.parametrize("version", [Tokenizer.v1, Tokenizer.v2, Tokenizer.v3])
def test_an_empty_answer_in_each_template(version: Any) -> None:
    it = version()
    begun = it.encode_chat(HELLO)
    ids = it.encode_chat([*HELLO, {"role": "assistant", "content": ""}, *HELLO])
    assert ids[: len(begun) + 1] == [*begun, it.eos_id]


def test_head_is_where_get_is(server: Serving) -> None:
    paths = [
        path for path, ways in json.loads(server.ask("GET", "/openapi.json")[2])["paths"].items() if "get" in ways
    ]
    assert "/v1/models" in paths
    for path in [*paths, "/", "/openapi.json"]:
        path = path.replace("{name}", "tiny")
        got, head = server.ask("GET", path), server.ask("HEAD", path)
        assert (head[0], head[2], head[1]["content-type"]) == (got[0], b"", got[1]["content-type"]), path
    assert server.ask("HEAD", "/v1/chat/completions")[0] == 405
