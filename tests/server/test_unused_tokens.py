"""Ids of the model's vocabulary that the tokenizer lacks: no text, and a name in log-probabilities."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from serving import HELLO, Serving, serving
from tiny import tiny_args, tiny_model
from torch import Tensor, nn

from mistral_7b.quantization import Scheme, quantize

V = 32768  # the tokenizer's vocabulary
NAME = f"<unused_{V + 5}>"
CHAT, TEXT, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
FORCED = {"logit_bias": {str(V + 5): 100}, "max_tokens": 4, "temperature": 0}
PLAIN = {"prompt": "The sky", "max_tokens": 8, "temperature": 0, "logprobs": 2, "ignore_eos": True}


@pytest.fixture(scope="module")
def padded() -> Iterator[Serving]:
    model = tiny_model(tiny_args(vocab_size=V + 64, sliding_window=64, max_seq_len=1024))
    quantize(model, Scheme("int8"))  # its results do not depend on the batch
    with serving(trained=model) as server:
        yield server
        server.idle()


@pytest.fixture(autouse=True)
def others_are_the_same_to_the_bit(padded: Serving) -> Iterator[None]:
    def answer() -> Any:
        status, body = padded.post(TEXT, PLAIN)
        assert status == 200
        return body["choices"]

    before = answer()
    yield
    assert answer() == before
    assert padded.llm.broken is None


def events(server: Serving, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    status, _, data = server.ask("POST", path, {**body, "stream": True})
    assert status == 200, data
    return [json.loads(line) for line in re.findall(r"^data: (\{.*)$", data.decode(), re.M)]


def test_a_chat(padded: Serving) -> None:
    body = {"messages": HELLO, "logprobs": True, "top_logprobs": 2, **FORCED}
    status, answer = padded.post(CHAT, body)
    assert status == 200
    choice = answer["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "length")
    assert answer["usage"]["completion_tokens"] == 4
    assert choice["logprobs"]["content"] == []  # their bytes concatenate to the content, which is empty
    chunks = [c["choices"][0] for c in events(padded, CHAT, body)]
    assert "".join(c["delta"].get("content", "") for c in chunks) == ""
    assert chunks[-1]["finish_reason"] == "length"


def test_an_alternative_has_a_name_and_no_bytes(padded: Serving) -> None:
    """The id is likely, but a bias excludes it from sampling: log-probabilities are those of the raw logits."""
    with likely(padded, V + 5):
        body = {"messages": HELLO, "logprobs": True, "top_logprobs": 1, "max_tokens": 1,
                "logit_bias": {str(V + 5): -100, "7000": 50}, "temperature": 0}  # fmt: skip
        status, answer = padded.post(CHAT, body)
    assert status == 200
    (token,) = answer["choices"][0]["logprobs"]["content"]
    (top,) = token["top_logprobs"]
    assert (top["token"], top["bytes"]) == (NAME, [])
    assert token["token"] != NAME


@pytest.mark.parametrize("echo", [False, True])
def test_a_completion(padded: Serving, echo: bool) -> None:
    body = {"prompt": "The sky", "logprobs": 2, "echo": echo, **FORCED}
    status, answer = padded.post(TEXT, body)
    assert status == 200
    choice = answer["choices"][0]
    text = "The sky" if echo else ""
    assert (choice["text"], choice["finish_reason"]) == (text, "length")
    assert choice["logprobs"]["tokens"][-4:] == [NAME] * 4
    assert choice["logprobs"]["text_offset"][-4:] == [len(text)] * 4
    assert NAME in choice["logprobs"]["top_logprobs"][-1]
    chunks = [c["choices"][0] for c in events(padded, TEXT, body)]
    assert "".join(c["text"] for c in chunks) == text
    assert [t for c in chunks if c["logprobs"] for t in c["logprobs"]["tokens"]] == choice["logprobs"]["tokens"]


def test_a_prompt_of_ids(padded: Serving) -> None:
    body = {"prompt": [1, 5000, V + 63, 5000, V], "echo": True, "logprobs": 1, "max_tokens": 0}
    status, answer = padded.post(TEXT, body)
    assert status == 200
    choice = answer["choices"][0]
    assert choice["logprobs"]["tokens"][2::2] == [f"<unused_{V + 63}>", f"<unused_{V}>"]
    ids = {"tokens": body["prompt"]}
    assert padded.post("/detokenize", ids) == (200, {"prompt": choice["text"]})
    assert padded.post("/v1/embeddings", {"input": body["prompt"]})[0] == 200
    for bad in (V + 64, -1):
        for path, refused in ((TEXT, {"prompt": [1, bad]}), ("/v1/embeddings", {"input": [1, bad]}),
                              ("/detokenize", {"tokens": [1, bad]})):  # fmt: skip
            status, answer = padded.post(path, refused)
            assert status == 400, (path, bad)
            assert answer["error"]["message"], (path, bad)


def test_a_token_that_ends(padded: Serving) -> None:
    status, answer = padded.post(CHAT, {"messages": HELLO, "stop_token_ids": [V + 5], **FORCED})
    assert (status, answer["choices"][0]["finish_reason"]) == (200, "stop")
    assert answer["usage"]["completion_tokens"] == 1


def test_anthropics_messages(padded: Serving) -> None:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 4}
    with likely(padded, V + 5):
        status, answer = padded.post(MESSAGES, body)
        assert (status, answer["stop_reason"], answer["usage"]["output_tokens"]) == (200, "max_tokens", 4)
        assert "".join(block["text"] for block in answer["content"]) == ""
        told = events(padded, MESSAGES, body)
    assert [event["type"] for event in told] == ["message_start", "message_delta", "message_stop"]


class Biased(nn.Module):
    """An output layer that always prefers one id."""

    def __init__(self, output: nn.Module, token: int) -> None:
        super().__init__()
        self.output, self.token = output, token
        self.in_features, self.out_features = output.in_features, output.out_features

    def forward(self, x: Tensor) -> Tensor:
        logits = self.output(x).clone()
        logits[..., self.token] += 50
        return logits


class likely:  # noqa: N801  a context manager
    """While active, the model generates only `token`."""

    def __init__(self, server: Serving, token: int) -> None:
        self.model, self.token = server.llm.engine.model, token

    def __enter__(self) -> None:
        self.output = self.model.output
        self.model.output = Biased(self.output, self.token)
        with torch.inference_mode():
            assert self.model.logits(torch.ones(1, self.model.args.dim)).argmax() == self.token

    def __exit__(self, *_: object) -> None:
        self.model.output = self.output
