"""What names the keys and values of an engine changes with everything that changes them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from test_prefix_cache_disk import config_of, model_of
from tiny import tiny_model

from mistral_7b.engine import fingerprint
from mistral_7b.engine.fingerprint import space_of, weights_of
from mistral_7b.engine.memory import pool_for
from mistral_7b.model import Mistral7B


def test_a_space_is_of_one_model_and_one_way_to_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    def space(kind: str = "int8", model: Mistral7B | None = None, **config: Any) -> str:
        model, settings = model or model_of(kind), config_of(None, kind, **config)
        return space_of(model, pool_for(model, settings), settings)

    def with_args(**changes: Any) -> Mistral7B:
        model = model_of("int8")
        model.args = dataclasses.replace(model.args, **changes)
        return model

    turned = model_of("int8")
    codes = turned.layers[1].feed_forward.w2.codes.view(-1)
    codes[12345 % len(codes)] ^= 1
    swapped = tiny_model()
    swapped.tok_embeddings.weight[[3, 4]] = swapped.tok_embeddings.weight[[4, 3]]
    spaces = [
        space(), space(model=model_of("int8", seed=1)), space("int4"), space("int8, int8 keys"), space("float32"),
        space(page_size=8), space(model=with_args(rope_theta=1e6)), space(model=with_args(sliding_window=12)),
        space(model=turned), space(model=swapped), space(deterministic=True),
    ]  # fmt: skip
    for module, name, value in (
        (fingerprint, "__version__", "another"), (fingerprint, "FORMAT", -1), (torch, "__version__", "another"),
        (fingerprint.compiler, "library", lambda: None), (fingerprint.compiler, "cpu", lambda: "another"),
    ):  # fmt: skip
        with monkeypatch.context() as patched:
            patched.setattr(module, name, value)
            spaces.append(space())
    assert len(set(spaces)) == len(spaces)
    assert space() == spaces[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_a_digest_sees_every_bit(dtype: torch.dtype) -> None:
    t = torch.randint(-100, 100, (70, 131)).to(dtype)
    module = torch.nn.Module()
    module.register_buffer("t", t)
    seen = {weights_of(module)}
    for at in (0, 1, 4095, 4096, 9000, t.numel() - 1):
        flat = t.view(-1)
        flat[at] += 1
        seen.add(weights_of(module))
        flat[at] -= 1
    assert len(seen) == 7
    module.t = t.t().contiguous().t()[1:]
    assert weights_of(module) not in seen
