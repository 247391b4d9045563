"""A growing cache: outputs, memory, and that it is a value."""

from __future__ import annotations

from typing import Any

import torch

from mistral_7b.course.compare import equal, expect, same
from mistral_7b.course.setting import SMALL, check_memory, numbers, small_model, tokens


def check(ex: Any) -> None:
    for window, chunks in (
        (None, (5, 1, 7)),
        (8, (6, 5, 1)),
        (8, (12, 1, 1, 4)),
        (8, (5, 1, 20, 1, 9, 1)),
        (1, (1, 3, 1)),
    ):
        check_memory(lambda window=window: ex.GrowingCache(1, window), window, chunks)

    cache = ex.GrowingCache(1, 8).writable()
    cache.extend(torch.zeros(1, 20, dtype=torch.long))
    k = numbers(1, 20, 3, 10)
    cache.layers[0].attend(numbers(1, 20, 6, 10), k, k)
    held = cache.layers[0].k
    equal(
        held.shape[1],
        8,
        "W = 8: the number of keys that a layer holds after 20 tokens",
        {
            20: "keys outside the window are kept: memory grows with the text",
            7: "the last W keys are kept; a window of W counts the query's own key, which is new",
        },
    )
    same(
        held,
        k[:, 12:],
        "W = 8: the keys that a layer holds after 20 tokens",
        {"the first keys are kept, not the last": k[:, :8]},
    )

    model, ids = small_model(), tokens(40)
    whole = model(ids)[0]
    old: Any = model(ids[:, :30], ex.GrowingCache(SMALL.n_layers, 8))[1]
    before = [m.k.clone() for m in old.layers]
    first = model(ids[:, 30:], old)[0]
    same(first, whole[:, 30:], "the model's logits with your cache, 10 tokens after 30", tolerance=1e-4)
    expect(
        all(torch.equal(m.k, b) for m, b in zip(old.layers, before, strict=True)) and old.length == 30,
        "a forward has changed the cache that was passed to it",
        "keys are written in place; make new tensors, for a prefix may be continued twice",
    )
    same(model(ids[:, 30:], old)[0], first, "the same prefix continued a second time", tolerance=0)
