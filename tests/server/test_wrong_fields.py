"""A request's mistake is told in the client's terms: the field as it was written, never a validator's insides."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from serving import HELLO, TOOL, Serving

CHAT, TEXT, EMBED, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/messages"
CALL = {"function": {"name": "f", "arguments": 5}}
INSIDES = re.compile(r"pydantic|Input should|constrained|list\[|dict\[|function-|literal\[|JSON decode", re.I)


def chat(**more: Any) -> dict[str, Any]:
    return {"messages": HELLO, "max_tokens": 2, **more}


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


CASES: list[tuple[str, Any, str | None, str]] = [
    (CHAT, chat(stop="x" * 300), "stop", "at most 256 characters"),
    (CHAT, chat(stop=""), "stop", "at least 1 character long"),
    (CHAT, chat(stop=5), "stop", "stop must be a string or a list"),
    (CHAT, chat(stop=["a", 5]), "stop.1", "a string"),
    (CHAT, chat(stop=["a"] * 17), "stop", "at most 16 entries"),
    (CHAT, chat(messages=user(5)), "messages.0.content", "a string or a list"),
    (CHAT, chat(messages=user(["a"])), "messages.0.content.0", "an object"),
    (CHAT, chat(messages=[{"role": "robot", "content": ""}]), "messages.0.role", "'system'"),
    (CHAT, chat(messages=[{"content": ""}]), "messages.0.role", "is missing"),
    (CHAT, chat(messages=[]), "messages", "at least 1 entry"),
    (CHAT, chat(messages="hi"), "messages", "a list"),
    (CHAT, {}, "messages", "is missing"),
    (CHAT, chat(temperature="warm"), "temperature", "a number"),
    (CHAT, chat(n=0), "n", "at least 1"),
    (CHAT, chat(n=1.5), "n", "an integer"),
    (CHAT, chat(stream="yes"), "stream", "true or false"),
    (CHAT, chat(tool_choice="maybe"), "tool_choice", "'any' or an object"),
    (CHAT, chat(tool_choice={"type": "function"}), "tool_choice.function", "is missing"),
    (CHAT, chat(tool_choice={"function": {"name": 5}}), "tool_choice.function.name", "a string"),
    (CHAT, chat(tools=[{"type": "function", "function": {}}]), "tools.0.function.name", "is missing"),
    (CHAT, chat(tools=[TOOL, {"type": "code"}]), "tools.1.type", "'function'"),
    (CHAT, chat(logit_bias={"7": "much"}), "logit_bias.7", "a number"),
    (CHAT, chat(response_format={"type": "xml"}), "response_format.type", "'text', 'json_object' or"),
    (CHAT, chat(messages=[*HELLO, {"role": "assistant", "tool_calls": [CALL]}]),
     "messages.1.tool_calls.0.function.arguments", "a string or an object"),
    (CHAT, chat(messages=user([{"type": "text"}])), "messages[0].content[0].text", "is missing"),
    (CHAT, chat(messages=user([{"type": "text", "text": 5}])), "messages[0].content[0].text", "a text"),
    (CHAT, chat(nonsense=1), "nonsense", "unknown field"),
    (CHAT, chat(stream_options={"nonsense": 1}), "stream_options.nonsense", "unknown field"),
    (CHAT, [1], None, "a JSON object"),
    (TEXT, {"prompt": 5}, "prompt", "a string or a list"),
    (TEXT, {"prompt": [1, "a"]}, "prompt.1", "an integer"),
    (TEXT, {"prompt": ["a", 1]}, "prompt.1", "a string"),
    (TEXT, {"prompt": [[1], [1, "a"]]}, "prompt.1.1", "an integer"),
    (EMBED, {"input": "a", "encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
    ("/detokenize", {"tokens": [1, "a"]}, "tokens.1", "an integer"),
    (MESSAGES, {"model": "tiny", "max_tokens": 2, "messages": user(5)}, "messages.0.content", "a string or a l"),
    (MESSAGES, {"model": "tiny", "max_tokens": 2, "messages": user([{"type": "image"}])}, "messages.0.content.0",
     "type must be"),
    (MESSAGES, {"model": "tiny", "max_tokens": 2, "messages": user([{"text": "a"}])}, "messages.0.content.0.type",
     "is missing"),
    (MESSAGES, {"model": "tiny", "max_tokens": 2, "messages": user([{"type": "text"}])},
     "messages.0.content.0.text", "is missing"),
    (MESSAGES, {"model": "tiny", "max_tokens": 2, "messages": user([{"type": "text", "text": 5}])},
     "messages.0.content.0.text", "a string"),
    (MESSAGES, {"model": "tiny", "max_tokens": 2, "messages": HELLO, "tool_choice": {"type": "tool"}},
     "tool_choice.name", "is missing"),
    (MESSAGES, {"model": "tiny", "max_tokens": 0, "messages": HELLO}, "max_tokens", "at least 1"),
    (MESSAGES, {"model": "tiny", "max_tokens": 2, "messages": HELLO, "stop_sequences": [""]}, "stop_sequences.0",
     "at least 1 character"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "param", "words"), CASES)
def test_the_field_as_it_was_written(server: Serving, path: str, body: Any, param: str | None, words: str) -> None:
    status, out = server.post(path, body)
    assert (status, out["error"]["param"]) == (400, param), out
    assert words in out["error"]["message"]
    assert not INSIDES.search(json.dumps(out))


@pytest.mark.parametrize(
    ("data", "place"),
    [(b'{"a": 1,\n "b": }', "line 2 column 7"), (b"", "missing"), (b"{", "line 1 column 1"), (b"\xff", "line 1"),
     (b'{"a": NaN}', "line 1 column 7"), (b"[" * 5000, "line 1")],
)  # fmt: skip
def test_where_json_is_wrong(server: Serving, data: bytes, place: str) -> None:
    status, _, answer = server.ask("POST", CHAT, data)
    error = json.loads(answer)["error"]
    assert (status, error["param"]) == (400, None)
    assert place in error["message"]
    assert not INSIDES.search(error["message"])


@pytest.mark.parametrize(("kind", "words"), [("", "is missing"), ("text/plain", "is 'text/plain'")])
def test_the_missing_header_is_named(server: Serving, kind: str, words: str) -> None:
    status, _, data = server.ask("POST", CHAT, chat(), {"content-type": kind})
    error = json.loads(data)["error"]
    assert (status, error["code"]) == (400, "invalid_content_type")
    assert f"the header content-type {words}" in error["message"]
    assert "application/json" in error["message"]
