"""softmax(Q K^T / sqrt(K)) V with grouped heads and a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mistral_7b.course.compare import Guesses, same
from mistral_7b.course.setting import numbers


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float,
    softmax: Callable[[Tensor], Tensor],
    spread: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """Attention step by step, with its steps as arguments, so that each can be wrong."""
    share = q.shape[-2] // k.shape[-2]
    scores = torch.einsum("...thk,...shk->...hts", q, spread(k, share)) * scale
    scores = scores.masked_fill(~mask.unsqueeze(-3), -torch.inf)
    return torch.einsum("...hts,...shk->...thk", softmax(scores), spread(v, share))


def groups(x: Tensor, share: int) -> Tensor:
    return x.repeat_interleave(share, -2)


def tiles(x: Tensor, share: int) -> Tensor:
    return torch.cat([x] * share, -2)


def last(scores: Tensor) -> Tensor:
    return scores.softmax(-1)


def zeroed(scores: Tensor) -> Tensor:
    """Hidden scores are 0, as if the mask were multiplied."""
    return scores.masked_fill(scores == -torch.inf, 0.0).softmax(-1)


def check(ex: Any) -> None:
    q, k, v = numbers(2, 5, 6, 4), numbers(2, 7, 3, 4, seed=1), numbers(2, 7, 3, 4, seed=2)
    mask = (torch.arange(2, 7)[:, None] >= torch.arange(7)).expand(2, 5, 7)
    right = plain(q, k, v, mask, 0.5, last, groups)
    everything = torch.ones_like(mask)
    guesses: Guesses = {
        "the scores are not divided by sqrt(K)": plain(q, k, v, mask, 1.0, last, groups),
        "the scores are divided by K; divide by sqrt(K)": plain(q, k, v, mask, 0.25, last, groups),
        "query head h reads key head h // (H / G); here it reads h % G": plain(q, k, v, mask, 0.5, last, tiles),
        "the mask is not used": plain(q, k, v, everything, 0.5, last, groups),
        "hidden scores must be minus infinity before the softmax, not 0": plain(
            q, k, v, mask, 0.5, zeroed, groups
        ),
        "hidden weights are zeroed after the softmax, so that a row no longer sums to 1": torch.einsum(
            "bhts,bshk->bthk",
            torch.einsum("bthk,bshk->bhts", q, groups(k, 2)).mul(0.5).softmax(-1) * mask[:, None],
            groups(v, 2),
        ),
        "the softmax runs over the queries; it runs over the keys, the last axis": plain(
            q, k, v, mask, 0.5, lambda s: s.softmax(-2), groups
        ),
        "the result is (..., H, T, K); the heads come after the tokens": right.transpose(1, 2),
    }
    same(ex.attention(q, k, v, mask), right, "attention(q, k, v, mask)", guesses)
    same(
        ex.attention(q, k, v),
        plain(q, k, v, everything, 0.5, last, groups),
        "attention(q, k, v) without a mask",
        {"without a mask every key is visible": right},
    )
    same(ex.attention(q[0], k[0], v[0], mask[0]), right[0], "attention of q without a batch dimension, (T, H, K)")
    lower = torch.ones(2, 5, 5, dtype=torch.bool).tril()
    same(
        ex.attention(q, k[:, :5], v[:, :5], causal=True),
        plain(q, k[:, :5], v[:, :5], lower, 0.5, last, groups),
        "attention(q, k, v, causal=True)",
        {"`causal` is ignored": plain(q, k[:, :5], v[:, :5], lower | True, 0.5, last, groups)},
    )

    q, k, v = (
        t.bfloat16()
        for t in (6 * numbers(1, 3, 4, 16), 6 * numbers(1, 40, 2, 16, seed=1), numbers(1, 40, 2, 16, seed=2))
    )
    everything = torch.ones(1, 3, 40, dtype=torch.bool)
    exact = plain(q.float(), k.float(), v.float(), everything, 0.25, last, groups)
    rough = plain(q, k, v, everything, 0.25, last, groups)
    got = ex.attention(q, k, v)
    same(
        got.float(),
        exact,
        "in bfloat16, attention(q, k, v)",
        {"the scores and the softmax are computed in bfloat16; use float32, and cast the result": rough.float()},
        0.02,
    )
    same(got, got.bfloat16(), "in bfloat16, attention(q, k, v)", {"cast the result back to q's type": exact})
