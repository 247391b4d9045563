"""The whole model with random weights, then with the real ones of the bundled model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mistral_7b.cache import GrowingCache
from mistral_7b.checkpoint.names import half_split
from mistral_7b.course.compare import equal, expect, same
from mistral_7b.course.setting import SMALL, fill, small_model, tokens
from mistral_7b.model import Mistral7B, rope_phases
from mistral_7b.text.tokenizer import Tokenizer


def check(ex: Any) -> str:
    real, own = small_model(), fill(ex.Mistral7B(SMALL, dtype=torch.float32, device="cpu"))
    ids = tokens(21)
    _check_hidden(own, real, ids)
    answer = own(ids)
    expect(
        isinstance(answer, tuple) and len(answer) == 2, "model(tokens) returns no pair", "return (logits, cache)"
    )
    whole = real(ids)[0]
    same(answer[0], whole, "the logits of model(tokens)", tolerance=1e-4)
    same(
        own(ids[:, 13:], own(ids[:, :13])[1])[0],
        whole[:, 13:],
        "the logits of 8 tokens after 13 in the cache",
        {
            "the cache that is passed in is not used: the tokens start at position 0": real(ids[:, 13:])[0],
            "positions start at 0 in every call; take those that cache.extend returns": _restarted(real, ids),
        },
        1e-4,
    )
    cache = own(ids[:, :13])[1]
    equal(getattr(cache, "length", None), 13, "the length of the cache after 13 tokens")
    own(ids[:, 13:], cache)
    equal(
        cache.length,
        13,
        "the length of the cache that was passed in, after the call",
        {21: "the cache passed in is written; extend `cache.writable()`, and return that"},
    )
    low = fill(ex.Mistral7B(SMALL, dtype=torch.bfloat16, device="cpu"))
    equal(
        low(ids)[0].dtype,
        torch.float32,
        "the type of the logits of a bfloat16 model",
        {torch.bfloat16: "logits() converts its result to float32"},
    )
    rows = torch.arange(12.0)[:, None] * torch.ones(12, 5)
    same(
        ex.interleaved(half_split(rows, 2), 2),
        rows,
        "interleaved(weight, heads=2), column by column",
        {
            "the rows are permuted the other way: x0 x1 x2 y0 y1 y2 becomes x0 y0 x1 y1 x2 y2": half_split(
                half_split(rows, 2), 2
            ),
            "the rows are not permuted": half_split(rows, 2),
            "rows are permuted within each head, not across all heads": _across(half_split(rows, 2)),
        },
    )
    return _check_demo(ex)


def _check_hidden(own: Any, real: Mistral7B, ids: Tensor) -> None:
    def fresh() -> GrowingCache:
        return GrowingCache(SMALL.n_layers, SMALL.sliding_window).writable()

    def through(layers: int, norm: bool) -> Tensor:
        cache = fresh()
        positions = cache.extend(ids)
        x, rope = real.tok_embeddings(ids), rope_phases(positions, SMALL, torch.float32)
        for layer, memory in list(zip(real.layers, cache.layers, strict=True))[:layers]:
            x = layer(x, rope, memory)
        return real.norm(x) if norm else x

    guesses = {
        "the final norm is missing": through(2, False),
        "only the first layer is applied": through(1, True),
        "no layer is applied": through(0, True),
    }
    same(own.hidden(ids, fresh()), through(2, True), "model.hidden(tokens, cache)", guesses, 1e-4)


def _restarted(real: Mistral7B, ids: Tensor) -> Tensor:
    """The logits if positions restarted with each call, but keys were kept."""
    cache = real(ids[:, :13])[1].writable()
    cache.extend(ids[:, 13:])
    rope = rope_phases(torch.arange(8), SMALL, torch.float32)
    return real.logits(real.norm(real.layers(real.tok_embeddings(ids[:, 13:]), rope, cache)))


def _across(weight: Tensor) -> Tensor:
    return weight.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


def _check_demo(ex: Any) -> str:
    tokenizer = Tokenizer.from_pretrained("demo")
    own, real = ex.open_demo(), Mistral7B.from_pretrained("demo", dtype=torch.float32)
    ids = tokenizer.encode("def main(")
    same(
        own(torch.tensor([ids]))[0],
        real(torch.tensor([ids]))[0],
        "the bundled model's logits of 'def main('",
        tolerance=1e-3,
    )
    for _ in range(12):
        ids.append(int(own(torch.tensor([ids]))[0][0, -1].argmax()))
    return f"your model writes: {tokenizer.decode(ids)!r}"
