"""`record` and `steer` over HTTP: with the admin key only, within a limit, and exact."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load
from serving import HELLO, Serving, serving

from mistral_7b.server.config import ServerConfig
from mistral_7b.server.openai import recorded

ADMIN, USER = {"authorization": "Bearer boss"}, {"authorization": "Bearer user"}
PROMPT = [1, *range(300, 320)]
BODY: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0, "ignore_eos": True}
STEER = [{"layer": 0, "vector": [0.5] * 40, "scale": 30.0, "start": 2}]


@pytest.fixture(scope="module")
def ready() -> Iterator[Serving]:
    with serving(ServerConfig(port=0, api_keys=("user",), admin_keys=("boss",))) as server:
        yield server


def test_a_completions_recording_is_the_models_own(ready: Serving) -> None:
    body = {**BODY, "record": ["residual.1", "attention", "blocks.0.attn.hook_z", "embedding"], "logprobs": 1}
    status, answer = ready.post("/v1/completions", body, ADMIN)
    assert status == 200, answer
    assert answer["recorded"]["format"] == "safetensors"
    found = load(base64.b64decode(answer["recorded"]["data"]))
    assert set(found) == {"residual.1", "attention.0", "attention.1", "z.0", "embedding"}
    model = ready.llm.engine.model
    with model.record("residual", "attention", "z", "embedding") as tape:
        model(torch.tensor([PROMPT]))
    assert found["attention.1"].shape == (6, 23, 23)
    for name, value in found.items():
        mine, wanted = (value[:, :21, :21] if "attention" in name else value[:21]), tape[name][0]
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)
    assert "recorded" not in ready.post("/v1/completions", BODY, ADMIN)[1]


def test_chat_records_and_steering_changes_its_answer(ready: Serving) -> None:
    body = {"messages": HELLO, "max_tokens": 4, "temperature": 0, "record": ["residual"]}
    status, plain = ready.post("/v1/chat/completions", body, ADMIN)
    assert status == 200, plain
    states = [
        load(base64.b64decode(answer["recorded"]["data"]))["residual.0"]
        for answer in (plain, ready.post("/v1/chat/completions", {**body, "steer": STEER}, ADMIN)[1])
    ]
    assert torch.equal(states[0][:2], states[1][:2])
    torch.testing.assert_close(states[1][2:8] - states[0][2:8], torch.full((6, 40), 15.0), rtol=1e-4, atol=1e-4)


def test_others_may_not(ready: Serving) -> None:
    for path, body in (("/v1/completions", BODY), ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 3})):
        for own in ({"record": ["residual"]}, {"steer": STEER}):
            status, answer = ready.post(path, {**body, **own}, USER)
            assert (status, answer["error"]["code"], answer["error"]["param"]) == (403, "admin_key_needed", *own)


def test_wrong_fields_are_named(ready: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    for own, status, param in (
        ({"record": ["residul"]}, 400, "record"),
        ({"record": ["residual.2"]}, 400, "record"),
        ({"record": ["logits"]}, 400, "record"),
        ({"record": []}, 400, "record"),
        ({"record": ["residual"], "stream": True}, 400, "record"),
        ({"record": ["residual"], "prompt": ["a", "b"]}, 400, "record"),
        ({"record": ["residual"], "n": 2}, 400, "record"),
        ({"steer": [{"layer": 0, "vector": [1.0]}]}, 400, "steer[0].vector"),
        ({"steer": [{"layer": 9, "vector": [1.0] * 40}]}, 400, "steer[0].layer"),
        ({"steer": [{"layer": 0, "vector": ["a"]}]}, 400, "steer.0.vector.0"),
        ({"steer": [{"layer": 0, "vector": [1e308] * 40, "scale": 1e308}]}, 400, "steer[0].vector"),
        ({"steer": [{"layer": 0, "vector": [1e25] * 40}]}, 400, "steer[0].vector"),
    ):
        got, answer = ready.post("/v1/completions", {**BODY, **own}, ADMIN)
        assert (got, answer["error"]["param"]) == (status, param), answer
    monkeypatch.setattr(recorded, "MOST_BYTES", 1000)
    got, answer = ready.post("/v1/completions", {**BODY, "record": ["residual"]}, ADMIN)
    assert (got, answer["error"]["code"], answer["error"]["param"]) == (422, "too_large", "record")
    assert ready.llm.engine.idle
