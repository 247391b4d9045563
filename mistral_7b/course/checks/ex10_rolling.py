"""A ring: which position is in which slot, in place, and the outputs."""

from __future__ import annotations

from typing import Any

import torch

from mistral_7b.course.compare import equal, expect, same
from mistral_7b.course.setting import SMALL, check_memory, numbers, small_model, tokens

TYPE = torch.float32


def check(ex: Any) -> None:
    _check_slots(ex)
    for window, chunks in (
        (8, (6, 5, 1)),
        (8, (12, 1, 1, 4, 1)),
        (8, (5, 1, 20, 1, 9, 1)),
        (8, (8, 1, 7, 1, 8)),
        (1, (1, 3, 1)),
        (None, (5, 1, 7)),
    ):

        def make(window: int | None = window) -> Any:
            return ex.RollingCache(1, 3, 10, window, max_seq_len=32, dtype=TYPE)

        check_memory(make, window, chunks)
    model, ids = small_model(), tokens(40)
    cache = ex.RollingCache(SMALL.n_layers, SMALL.n_kv_heads, SMALL.head_dim, 8, dtype=TYPE)
    parts = [model(part, cache)[0] for part in ids.split([11, 1, 1, 20, 1, 6], 1)]
    same(
        torch.cat(parts, 1),
        model(ids)[0],
        "the model's logits with your ring, in steps of 11, 1, 1, 20, 1 and 6",
        tolerance=1e-4,
    )


def _check_slots(ex: Any) -> None:
    cache = ex.RollingCache(1, 1, 2, 4, dtype=TYPE)
    memory, address, at = cache.layers[0], cache.layers[0].k.data_ptr(), 0
    by_step = torch.zeros(4, dtype=torch.long)  # the slots, if they were counted from the start of each step
    for n in (3, 1, 1, 1, 7, 1):
        cache.extend(torch.zeros(1, n, dtype=torch.long))
        p = torch.arange(at, at + n, dtype=TYPE)[None, :, None, None].expand(1, n, 1, 2).contiguous()
        memory.attend(numbers(1, n, 1, 2, dtype=TYPE), p, p)
        by_step[torch.arange(n)[-4:] % 4] = torch.arange(at, at + n)[-4:]
        at += n
        if at < 4:
            continue
        slots = memory.k[0, :, 0, 0].long()
        right = torch.tensor([max(q for q in range(at) if q % 4 == slot) for slot in range(4)])
        same(
            slots,
            right,
            f"W = 4, after {at} tokens: the position of the key in each slot",
            {
                "slots are counted from the start of each step; position p is in slot p mod W": by_step,
                "keys are shifted to stay in order; position p stays in slot p mod W": torch.arange(at - 4, at),
            },
            0,
        )
        same(
            cache.positions[0],
            right,
            f"W = 4, after {at} tokens: cache.positions",
            {"cache.positions is not updated by extend": torch.full((4,), 2**62)},
            0,
        )
        equal(int(cache.length[0]), at, "cache.length")
    expect(
        memory.k.data_ptr() == address, "the ring is a new tensor after some steps", "write into self.k in place"
    )
