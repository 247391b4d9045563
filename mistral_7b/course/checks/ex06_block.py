"""Attention's projections, and the residual block around attention and feed-forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mistral_7b.cache import Stateless
from mistral_7b.course.compare import same
from mistral_7b.course.setting import SMALL, fill, numbers
from mistral_7b.model import TransformerBlock, rope_phases, rotate

TYPE = torch.float32


def check(ex: Any) -> None:
    x, rope = numbers(2, 19, SMALL.dim, dtype=TYPE), rope_phases(torch.arange(19), SMALL, TYPE)
    own, real = fill(ex.TransformerBlock(SMALL, dtype=TYPE)), fill(TransformerBlock(SMALL, dtype=TYPE))
    a = real.attention

    def memory() -> Any:
        cache = Stateless(SMALL.sliding_window)
        cache.extend(torch.zeros(2, 19, dtype=torch.long))
        return cache

    def attended(
        turn_q: bool = True, turn_k: bool = True, turn_v: bool = False, out: bool = True, order: Any = None
    ) -> Tensor:
        q, k, v = (w(x).unflatten(-1, order or (-1, a.head_dim)) for w in (a.wq, a.wk, a.wv))
        if order:
            q, k, v = (t.transpose(-1, -2) for t in (q, k, v))
        q, k, v = (rotate(t, rope) if turn else t for t, turn in ((q, turn_q), (k, turn_k), (v, turn_v)))
        heads = memory().attend(q, k, v).flatten(-2)
        return a.wo(heads) if out else heads

    guesses = {
        "q and k are not rotated": attended(False, False),
        "q is rotated and k is not": attended(True, False),
        "k is rotated and q is not": attended(False, True),
        "v is rotated too; only q and k are": attended(True, True, True),
        "the output is not multiplied by wo": attended(out=False),
        "a head is K neighbouring features: unflatten to (heads, K), not (K, heads)": attended(
            order=(a.head_dim, -1)
        ),
    }
    same(own.attention(x, rope, memory()), attended(), "Attention(x)", guesses, 1e-4)

    def att(y: Tensor) -> Tensor:
        return real.attention(y, rope, memory())

    n1, n2, ffn = real.attention_norm, real.ffn_norm, real.feed_forward
    h = x + att(n1(x))
    guesses = {
        "the input of attention is not normalised": (g := x + att(x)) + ffn(n2(g)),
        "the input of the feed-forward is not normalised": h + ffn(h),
        "attention_norm and ffn_norm are swapped": (g := x + att(n2(x))) + ffn(n1(g)),
        "the feed-forward's result is not added to its input": ffn(n2(h)),
        "attention's result is not added to x": (g := att(n1(x))) + ffn(n2(g)),
        "the feed-forward reads x; it reads x + attention": h + ffn(n2(x)),
        "the norms come before attention and feed-forward, not after the sums": n2((g := n1(x + att(x))) + ffn(g)),
        "the second sum adds to x; it adds to x + attention": x + ffn(n2(h)),
    }
    same(own(x, rope, memory()), h + ffn(n2(h)), "TransformerBlock(x)", guesses, 1e-4)
