"""Single-token attention over a ring buffer on a GPU. Each key is read once for all query heads that share it.

The keys are split into ranges of SPLIT; a program computes the H/G query heads of a key/value head for one range.
The splits are then merged in order.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .launch import launch, power

SPLIT = 256  # keys per program, independent of the batch, so that results are batch-invariant
BLOCK_S = 64  # keys loaded at a time


def decode_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """Attention of one token per row, q (B, 1, H, K), over a ring's k, v (B, S, G, K): (B, 1, H, K).

    `seen` (B, 1, S) bool selects the visible keys (attention.visible, by position); None: all. Other slots are
    never read and may contain NaN. Results are batch-invariant. Call it only if backend.py selects Triton.
    """
    B, _, H, K = q.shape
    S, G = k.shape[1], k.shape[2]
    if not q.numel():
        return torch.empty_like(q)
    q = q.contiguous()
    k, v = (t if t.stride(3) == 1 and t.stride(2) == K else t.contiguous() for t in (k, v))
    R, splits, block_k = H // G, -(-S // SPLIT), max(16, power(K))
    maxima, totals = (torch.empty(B * H, splits, dtype=torch.float32, device=q.device) for _ in "mt")
    sums = torch.empty(B * H, splits, K, dtype=torch.float32, device=q.device)
    visible = q if seen is None else seen.contiguous().view(torch.uint8)
    row = 0 if seen is None else S
    strides = (k.stride(0), k.stride(1), v.stride(0), v.stride(1), row)
    constants = {"MASKED": seen is not None, "SPLIT": SPLIT, "BLOCK_S": BLOCK_S, "BLOCK_R": max(16, power(R))}
    partials = (maxima, totals, sums)
    sizes = (1 / math.sqrt(K), G, R, K)
    _launch(
        "attend_split",
        (B * G, splits),
        q,
        k,
        v,
        visible,
        *partials,
        S,
        *strides,
        *sizes,
        BLOCK_K=block_k,
        **constants,
    )
    out = torch.empty_like(q)
    _launch("attend_merge", (B * H,), *partials, out, splits, K, BLOCK_SPLITS=power(splits), BLOCK_K=block_k)
    return out


def decode_attention_twin(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """`decode_attention` in plain PyTorch, in float32 or wider."""
    B, _, H, K = q.shape
    G = k.shape[2]
    compute_dtype = torch.promote_types(q.dtype, torch.float32)
    query = q.to(compute_dtype).view(B, G, H // G, K)
    if seen is not None:  # unseen slots may contain NaN, and 0 * NaN is NaN
        k, v = (torch.where(seen[:, 0, :, None, None], t, 0) for t in (k, v))
    scores = torch.einsum("bgrk,bsgk->bgrs", query, k.to(compute_dtype)) / math.sqrt(K)
    if seen is not None:
        scores = scores.masked_fill(~seen[:, 0, None, None, :], -math.inf)
    out = torch.einsum("bgrs,bsgk->bgrk", scores.softmax(-1), v.to(compute_dtype))
    return out.reshape(B, 1, H, K).to(q.dtype)


_launch = functools.partial(launch, "triton_decode")
