"""A prompt over the context is refused in each API's words, by which its clients recognize it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from serving import Serving, serving

pytestmark = pytest.mark.wording  # clients read these messages
LONG = [{"role": "user", "content": "x " * 200}]
CHAT, TEXT, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"


@pytest.fixture(scope="module", params=[None, 64], ids=["context", "window"])
def short(request: pytest.FixtureRequest) -> Iterator[Serving]:
    """A server with a context of 128 tokens, without and with a sliding window."""
    with serving(sliding_window=request.param, max_seq_len=128) as it:
        yield it


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (CHAT, {"messages": LONG, "max_tokens": 7},
         "This model's maximum context length is 128 tokens. However, you requested {more} tokens ({prompt} in "
         "the messages, 7 in the completion). Please reduce the length of the messages or completion."),
        (CHAT, {"messages": LONG},
         "This model's maximum context length is 128 tokens. However, your messages resulted in {prompt} tokens. "
         "Please reduce the length of the messages."),
        (TEXT, {"prompt": "x " * 200, "max_tokens": 7},
         "This model's maximum context length is 128 tokens, however you requested {more} tokens ({prompt} in "
         "your prompt; 7 for the completion). Please reduce your prompt; or completion length."),
        (MESSAGES, {"model": "tiny", "messages": LONG, "max_tokens": 7},
         "prompt is too long: {prompt} tokens > 128 maximum"),
    ],
)  # fmt: skip
def test_in_the_words_of_each_api(short: Serving, path: str, body: dict[str, Any], message: str) -> None:
    about = {"prompt": body["prompt"]} if path == TEXT else {"messages": LONG}
    prompt = short.post("/tokenize", about)[1]["count"]
    assert prompt > 128
    status, out = short.post(path, body)
    told = message.format(prompt=prompt, more=prompt + 7)
    if path != MESSAGES:
        told += " (context_length_exceeded)"  # LangChain looks for it in the text
    assert (status, out["error"]["code"], out["error"]["message"]) == (400, "context_length_exceeded", told)


def test_an_embedding(short: Serving) -> None:
    status, out = short.post("/v1/embeddings", {"input": "x " * 200})
    assert (status, out["error"]["code"], out["error"]["param"]) == (400, "context_length_exceeded", "input")
    assert "maximum context length is 128 tokens, however you requested" in out["error"]["message"]


def test_the_servers_own_limit(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(server.state.config.__dict__, "max_prompt_tokens", 50)
    status, out = server.post(CHAT, {"messages": LONG, "max_tokens": 7})
    assert (status, out["error"]["code"], out["error"]["param"]) == (400, "context_length_exceeded", "messages")
    assert "maximum context length is 50 tokens" in out["error"]["message"]


def test_in_a_stream(short: Serving) -> None:
    status, _, data = short.ask("POST", CHAT, {"messages": LONG, "stream": True})
    assert (status, json.loads(data)["error"]["code"]) == (400, "context_length_exceeded")


def test_langchain_recognizes_it(short: Serving) -> None:
    openai = pytest.importorskip("langchain_openai")
    anthropic = pytest.importorskip("langchain_anthropic")
    from langchain_core.exceptions import ContextOverflowError

    common: dict[str, Any] = {"model": "tiny", "api_key": "none", "max_retries": 0}
    for chat in (
        openai.ChatOpenAI(base_url=f"{short.url}/v1", **common),
        anthropic.ChatAnthropic(base_url=short.url, max_tokens=5, **common),
    ):
        with pytest.raises(ContextOverflowError):
            chat.invoke("x " * 200)
