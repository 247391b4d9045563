"""/tokenize and /detokenize: the tokenizer's ids, and the round trip."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serving import Serving

from mistral_7b.text.tokenizer import Tokenizer

ASK = [{"role": "user", "content": "Grüße, 世界"}]
TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}


@pytest.fixture
def client(server: Serving) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.v3()


def post(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("text", ["", "Grüße, 世界\n\n", "a  b\t</s>[INST]", "🙂\u0301"])
def test_a_text_there_and_back(client: httpx.Client, tokenizer: Tokenizer, text: str) -> None:
    found = post(client, "/tokenize", model="tiny", prompt=text, return_token_strs=True)
    assert found["tokens"] == tokenizer.encode(text)
    assert found["count"] == len(found["tokens"])
    assert found["max_model_len"] == 1024
    assert found["token_strs"] == [tokenizer.piece(i) for i in found["tokens"]]
    assert post(client, "/detokenize", tokens=found["tokens"]) == {"prompt": text}
    bare = post(client, "/tokenize", prompt=text, add_special_tokens=False)
    assert bare["tokens"] == found["tokens"][1:]
    assert bare["token_strs"] is None


def test_a_conversation_as_the_model_is_given_it(client: httpx.Client, tokenizer: Tokenizer) -> None:
    assert post(client, "/tokenize", messages=ASK)["tokens"] == tokenizer.encode_chat(ASK)
    assert post(client, "/tokenize", messages=ASK, tools=[TOOL])["tokens"] == tokenizer.encode_chat(ASK, [TOOL])
    begun = [*ASK, {"role": "assistant", "content": "It is"}]
    found = post(client, "/tokenize", messages=begun, continue_final_message=True, add_generation_prompt=False)
    assert found["tokens"] == tokenizer.encode_chat([*ASK, {**begun[1], "prefix": True}])


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param"),
    [
        ("/tokenize", {}, 400, None, None),
        ("/tokenize", {"prompt": "a", "messages": ASK}, 400, None, None),
        ("/tokenize", {"prompt": "a", "tools": [TOOL]}, 400, None, None),
        ("/tokenize", {"prompt": 7}, 400, None, "prompt"),
        ("/tokenize", {"messages": ASK, "chat_template": "{{ 7 * 7 }}"}, 400, "unknown_field",
         "chat_template"),
        ("/tokenize", {"messages": [{"role": "assistant", "content": "a"}]}, 400, None, "messages"),
        ("/tokenize", {"messages": [{}]}, 400, "missing_field", "messages.0.role"),
        ("/tokenize", {"messages": ASK, "tools": [{"type": "function", "function": 7}]}, 400, None,
         "tools.0.function"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model_not_found", "model"),
        ("/detokenize", {"tokens": [1, -1]}, 400, None, "tokens.1"),
        ("/detokenize", {"tokens": [2**80]}, 400, None, "tokens"),
        ("/detokenize", {"tokens": [2**31 - 1]}, 400, None, "tokens"),
        ("/detokenize", {"tokens": [True]}, 400, None, "tokens.0"),
        ("/detokenize", {"tokens": "abc"}, 400, None, "tokens"),
    ],
)  # fmt: skip
def test_what_is_refused(
    client: httpx.Client, path: str, body: dict[str, Any], status: int, code: str | None, param: str | None
) -> None:
    response = client.post(path, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param), error


def test_half_a_character_is_refused(client: httpx.Client) -> None:
    response = client.post("/tokenize", content=b'{"prompt": "\\ud800"}')
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_slow_work_runs_on_the_shared_workers(
    server: Serving, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the pieces: neither the event loop nor other threads do it."""
    threads: dict[str, set[str]] = {}

    def watch(name: str) -> None:
        method = getattr(server.llm.tokenizer, name)

        def watched(*args: Any, **more: Any) -> Any:
            threads.setdefault(name, set()).add(threading.current_thread().name.partition("_")[0])
            return method(*args, **more)

        monkeypatch.setattr(server.llm.tokenizer, name, watched)

    names = ("encode", "encode_chat", "piece", "decode")
    for name in names:
        watch(name)
    post(client, "/tokenize", prompt="a b", return_token_strs=True)
    post(client, "/detokenize", tokens=[5, 6])
    post(client, "/v1/messages/count_tokens", model="tiny", messages=ASK)
    assert threads == {name: {"read"} for name in names}
