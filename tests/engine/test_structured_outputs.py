"""What may be asked of a text, and what masks do to logits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refused

from mistral_7b.errors import GenerationError, SamplingError
from mistral_7b.generate import generate, stream
from mistral_7b.sampling.params import SamplingParams, StructuredOutputs
from mistral_7b.sampling.sampler import Row, adjust, lift_bans
from mistral_7b.text.tokenizer import Tokenizer
from tests.tiny import tiny_args, tiny_model


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({}, "structured_outputs"),
        ({"json_object": False}, "structured_outputs"),
        ({"regex": "a", "choice": ["b"]}, "structured_outputs"),
        ({"regex": 3}, "structured_outputs.regex"),
        ({"regex": "\ud800"}, "structured_outputs.regex"),
        ({"grammar": ["start: x"]}, "structured_outputs.grammar"),
        ({"choice": "yes"}, "structured_outputs.choice"),
        ({"choice": []}, "structured_outputs.choice"),
        ({"choice": ["a", 1]}, "structured_outputs.choice"),
        ({"choice": ["\udfff"]}, "structured_outputs.choice"),
        ({"json": "{"}, "structured_outputs.json"),
        ({"json": "[]"}, "structured_outputs.json"),
        ({"json": {"enum": {1, 2}}}, "structured_outputs.json"),
        ({"json_object": "yes"}, "structured_outputs.json_object"),
        ({"jason": {}}, "structured_outputs.jason"),
    ],
)
def test_what_may_not_be_asked(values: dict[str, Any], field: str) -> None:
    with refused(SamplingError, field=field):
        SamplingParams.from_dict({"structured_outputs": values})


def test_what_may_be_asked() -> None:
    params = SamplingParams(structured_outputs={"json": '{"type": "integer"}'})  # type: ignore[arg-type]
    assert params.structured_outputs == StructuredOutputs(json={"type": "integer"})
    assert StructuredOutputs(choice=["a", ""]).choice == ("a", "")
    assert StructuredOutputs(json={}).json == {}
    assert StructuredOutputs(regex="").regex == ""
    with refused(SamplingError, field="structured_outputs"):
        SamplingParams(structured_outputs="json")  # type: ignore[arg-type]


def packed(tokens: set[int], size: int) -> np.ndarray:
    mask = np.zeros(-(-size // 32), dtype=np.int32)
    for token in tokens:
        mask[token // 32] |= np.int32(np.uint32(1 << token % 32).view(np.int32))
    return mask


def adjusted(logits: torch.Tensor, masks: list[np.ndarray | None]) -> torch.Tensor:
    return adjust(logits, [Row(SamplingParams(), allowed=mask) for mask in masks])


@pytest.mark.parametrize("size", [31, 32, 33, 100])
def test_allow_keeps_a_masks_tokens_and_rows_without_one(size: int) -> None:
    logits = torch.randn(4, size, generator=torch.Generator().manual_seed(size))
    before = logits.clone()
    sets = [{0, 7, 30}, None, {size - 1}, {size // 2, 8}]
    masks = [None if tokens is None else packed(tokens, size) for tokens in sets]
    out = adjusted(logits, masks)
    for row, tokens in enumerate(sets):
        for token in range(size):
            kept = tokens is None or token in tokens
            assert out[row, token] == (logits[row, token] if kept else -math.inf)
    assert torch.equal(logits, before)
    assert adjusted(logits, [None] * 4) is logits
    full = [masks[0], masks[2], masks[3]]
    assert torch.equal(adjusted(logits[[0, 2, 3]], full), out[[0, 2, 3]])
    assert torch.equal(adjusted(logits[2:3].bfloat16(), [masks[2]]).isinf(), out[2:3].isinf())


def test_a_ban_that_leaves_nothing_is_lifted() -> None:
    only_eos, more = packed({2}, 64), packed({2, 31, 63}, 64)
    assert lift_bans((2,), only_eos) == ()
    assert lift_bans((2, 5), only_eos) == ()
    assert lift_bans((2,), more) == (2,)
    assert lift_bans((2, 31), more) == (2, 31)
    assert lift_bans((2, 31, 63), more) == ()
    assert lift_bans((2,), None) == (2,)
    assert np.array_equal(more, packed({2, 31, 63}, 64))


def test_generate_and_stream_obey_a_grammar() -> None:
    pytest.importorskip("llguidance")
    tokenizer = Tokenizer.v3()
    model = tiny_model(tiny_args(vocab_size=tokenizer.vocab_size))
    params = SamplingParams(seed=1, max_tokens=20, structured_outputs=StructuredOutputs(choice=["red", "green"]))
    outputs = [c for r in generate(model, ["Say", "Tell"], params, tokenizer) for c in r.outputs]
    assert {c.text for c in outputs} <= {"red", "green"}
    assert [c.finish_reason for c in outputs] == ["stop", "stop"]
    assert "".join(map(str, stream(model, "Say", params, tokenizer))) == outputs[0].text
    for call in (generate, stream):
        with refused(GenerationError, field="structured_outputs"):
            call(model, [1, 5, 6], params)
