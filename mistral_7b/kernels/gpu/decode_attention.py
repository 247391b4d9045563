"""Attention of one token over a ring on a GPU: each key is read once, for all query heads that share it.

Split over the keys in runs of SPLIT, the H/G query heads of a key head together; splits are merged in their order.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .launch import launch, power

SPLIT = 256  # keys that one program attends to, whatever the batch: so no row's sums depend on others
BLOCK_S = 64  # of which at once


def decode_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """Attention of one token a row: q (B, 1, H, K) over k, v (B, S, G, K), as they lie in a ring: (B, 1, H, K).

    `seen` (B, 1, S) bool says which keys are visible (attention.visible, by position); None: all. What lies
    in the others, NaN too, is never read. A row depends on nothing but itself. For what backend.py gives to
    Triton.
    """
    B, _, H, K = q.shape
    S, G = k.shape[1], k.shape[2]
    if not q.numel():
        return torch.empty_like(q)
    q = q.contiguous()
    k, v = (t if t.stride(3) == 1 and t.stride(2) == K else t.contiguous() for t in (k, v))
    R, splits, block_k = H // G, -(-S // SPLIT), max(16, power(K))
    tops, totals = (torch.empty(B * H, splits, dtype=torch.float32, device=q.device) for _ in "mt")
    sums = torch.empty(B * H, splits, K, dtype=torch.float32, device=q.device)
    visible = q if seen is None else seen.contiguous().view(torch.uint8)
    row = 0 if seen is None else S
    strides = (k.stride(0), k.stride(1), v.stride(0), v.stride(1), row)
    how = {"MASKED": seen is not None, "SPLIT": SPLIT, "BLOCK_S": BLOCK_S, "BLOCK_R": max(16, power(R))}
    parts = (tops, totals, sums)
    sizes = (1 / math.sqrt(K), G, R, K)
    _launch("attend_split", (B * G, splits), q, k, v, visible, *parts, S, *strides, *sizes, BLOCK_K=block_k, **how)
    out = torch.empty_like(q)
    _launch("attend_merge", (B * H,), *parts, out, splits, K, BLOCK_SPLITS=power(splits), BLOCK_K=block_k)
    return out


def decode_attention_twin(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """`decode_attention` in plain PyTorch, in float32 at least."""
    B, _, H, K = q.shape
    G = k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    query = q.to(wide).view(B, G, H // G, K)
    if seen is not None:  # what is not seen may be anything, and 0 * NaN is NaN
        k, v = (torch.where(seen[:, 0, :, None, None], t, 0) for t in (k, v))
    scores = torch.einsum("bgrk,bsgk->bgrs", query, k.to(wide)) / math.sqrt(K)
    if seen is not None:
        scores = scores.masked_fill(~seen[:, 0, None, None, :], -math.inf)
    out = torch.einsum("bgrs,bsgk->bgrk", scores.softmax(-1), v.to(wide))
    return out.reshape(B, 1, H, K).to(q.dtype)


_launch = functools.partial(launch, "triton_decode")
