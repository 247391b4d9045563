"""Log-probabilities of tokens that are parts of characters: their bytes are the text, and their place its."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from serving import HELLO, Serving

from mistral_7b.sampling import Logprob
from mistral_7b.server.logprobs import Offsets, text_logprobs
from mistral_7b.tokenizer import Tokenizer

TEXTS = [
    "a🙂b世界 龘x",
    "🙂",
    "  two  spaces",
    "é\u0301 ﷽",
    "\n\n龘龘",
    "👩‍👩‍👧‍👦 ist Grüße\t鱻",
    " ",
    "plain text",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.v3()


def wanted(tokenizer: Tokenizer, ids: list[int], keep_space: bool = False) -> list[int]:
    """Counted another way: the whole characters among the bytes before a token."""
    data, out = b"", []
    for token in ids:
        new = tokenizer.piece_bytes(token)
        if not data and not keep_space and new.startswith(b" "):
            new = new[1:]
        out.append(len(data.decode(errors="ignore")))
        data += new
    return out


@pytest.mark.parametrize("text", TEXTS)
def test_where_tokens_stand(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, eos=True)
    offsets = Offsets(tokenizer)
    assert [offsets.of(token) for token in ids] == wanted(tokenizer, ids)
    assert offsets.end() == len(text)
    for cut in range(1, len(ids)):  # and where a completion begins
        head, tail = ids[:cut], ids[cut:]
        later = Offsets(tokenizer, head, 100)
        found = [later.of(token) - 100 for token in tail]
        if "\ufffd" not in tokenizer.decode(head):
            assert found == wanted(tokenizer, tail, keep_space=cut > 1)


def test_bytes_that_become_no_character_stand_alone(tokenizer: Tokenizer) -> None:
    start, more, letter = (tokenizer.encode("龘", bos=False)[i] for i in (-3, -2, -3))
    offsets = Offsets(tokenizer)
    assert [offsets.of(token) for token in (start, start, letter)] == [0, 1, 2]
    assert offsets.end() == 3
    offsets = Offsets(tokenizer)
    x = tokenizer.encode("x", bos=False)[-1]
    assert [offsets.of(token) for token in (start, more, x)] == [0, 0, 2]
    assert offsets.end() == len(tokenizer.decode([start, more, x]))


def test_of_two_tokens_with_one_spelling_the_likelier_is_told(tokenizer: Tokenizer) -> None:
    letter = next(i for i in range(1000, 32768) if tokenizer.surface(i) == "A")
    byte = next(i for i in range(1000) if tokenizer.surface(i) == b"A")
    entry = {byte: Logprob(-3.0, 2), letter: Logprob(-1.0, 1)}
    out = text_logprobs(tokenizer, [byte], [entry], 2, [0])
    assert out["token_logprobs"] == [-3.0]
    assert out["top_logprobs"] == [{"A": -1.0}]


def streamed(server: Serving, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    data = server.ask("POST", path, {**body, "stream": True})[2].decode()
    return [json.loads(line)["choices"][0] for line in re.findall(r"^data: (\{.*)$", data, re.M)]


@pytest.mark.parametrize("text", [t for t in TEXTS if t.strip() == t])
def test_a_chats_bytes_are_the_text(server: Serving, text: str) -> None:
    body = {"messages": HELLO, "logprobs": True, "top_logprobs": 3, "temperature": 0,
            "structured_outputs": {"choice": [text]}}  # fmt: skip
    whole = server.post("/v1/chat/completions", body)[1]["choices"][0]
    assert whole["message"]["content"] == text
    content = whole["logprobs"]["content"]
    assert b"".join(bytes(t["bytes"]) for t in content).decode() == text
    parts = streamed(server, "/v1/chat/completions", body)
    assert "".join(p["delta"].get("content", "") for p in parts) == text
    later = [t for p in parts if p["logprobs"] for t in p["logprobs"]["content"]]
    assert [t["bytes"] for t in later] == [t["bytes"] for t in content]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("echo", [False, True])
def test_a_completions_tokens_stand_in_the_text(
    server: Serving, tokenizer: Tokenizer, text: str, echo: bool
) -> None:
    body = {"prompt": "龘 so", "logprobs": 1, "echo": echo, "max_tokens": 60, "temperature": 0,
            "structured_outputs": {"choice": [text]}}  # fmt: skip
    whole = server.post("/v1/completions", body)[1]["choices"][0]
    assert whole["text"] == ("龘 so" if echo else "") + text
    found = whole["logprobs"]
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        if not re.fullmatch(r"<s>|</s>|<0x..>", token):
            assert whole["text"][offset:].startswith(token if offset else token.removeprefix(" "))
        elif token != "<s>" and token != "</s>":
            assert int(token[3:5], 16) in whole["text"][offset].encode()
    parts = streamed(server, "/v1/completions", body)
    assert "".join(p["text"] for p in parts) == whole["text"]
    assert [o for p in parts if p["logprobs"] for o in p["logprobs"]["text_offset"]] == found["text_offset"]


@pytest.mark.parametrize("most", [0, 1])
def test_scores_are_the_models_own(server: Serving, tokenizer: Tokenizer, most: int) -> None:
    """As lm-eval's local-completions asks: ids in batches, echoed with the log-probabilities of each."""
    import torch

    model, greedy = server.llm.engine.model, [1, 7, 9]
    for _ in range(3):
        greedy.append(int(model(torch.tensor([greedy]))[0][0, -1].argmax()))
    prompts = [tokenizer.encode("The sky is green 世界龘"), greedy]
    body = {"prompt": prompts, "max_tokens": most, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1234}
    choices = server.post("/v1/completions", body)[1]["choices"]
    for ids, choice in zip(prompts, choices, strict=True):
        logits = model(torch.tensor([ids]))[0][0, :-1].double().log_softmax(-1)
        found = choice["logprobs"]
        assert len(found["tokens"]) == len(ids) + most
        own = logits[range(len(ids) - 1), ids[1:]].tolist()
        assert found["token_logprobs"][1 : len(ids)] == pytest.approx(own, abs=1e-4)
        best = logits.max(-1).values.tolist()
        assert [max(top.values()) for top in found["top_logprobs"][1 : len(ids)]] == pytest.approx(best, abs=1e-4)
    tops, tokens = (choices[1]["logprobs"][key][3:6] for key in ("top_logprobs", "tokens"))
    assert [max(top, key=top.get) for top in tops] == tokens
