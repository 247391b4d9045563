"""The one visibility rule, and softmax(Q K^T / sqrt(d)) V under it.

T queries · S keys · H query heads · G key/value heads · K head width · W window
"..." is any number of leading batch dimensions, none included.

    key j is visible to query i   <=>   0 <= p_i - p_j < W   and   s_i = s_j

p are absolute positions and s sequence ids. The rule never looks at the order in which keys lie in
memory, so a ring, a page or a shuffled cache needs no rule of its own. W counts the query's own key
(arXiv:2310.06825, section 2: "up to W tokens"): row i of the mask sums to min(i + 1, W).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.backend import DECODE_ATTENTION, Backend, uses
from .kernels.gpu.decode_attention import decode_attention
from .kernels.slices import cut

BLOCK = 1024  # queries attended at once: a mask is at most BLOCK x (BLOCK + W), or BLOCK x S without a window


def visible(
    p_q: Tensor, p_k: Tensor, window: int | None, s_q: Tensor | None = None, s_k: Tensor | None = None
) -> Tensor:
    """Which keys each query sees: (..., T) and (..., S) positions to a (..., T, S) bool mask.

    `window` None is full causal attention. `s_q`, `s_k` are sequence ids of the same shapes; without
    them all positions belong to one sequence.
    """
    distance = p_q[..., :, None] - p_k[..., None, :]  # (..., T, S)
    mask = distance >= 0
    if window is not None:
        mask = mask & (distance < window)
    if s_q is not None and s_k is not None:
        mask = mask & (s_q[..., :, None] == s_k[..., None, :])
    return mask


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Grouped-query attention of q (..., T, H, K) over k, v (..., S, G, K): returns (..., T, H, K).

    `mask` (..., T, S) is True where a key is visible; None means that all are, or, with `causal`,
    those up to the query's own (T = S). H is a multiple of G: query head h reads key head h // (H/G).
    """
    if q.dim() == 4 and q.shape[1] == 1 and uses(Backend.TRITON, DECODE_ATTENTION, q):
        seen = None if mask is None else mask.expand(q.shape[0], -1, -1)
        return decode_attention(q, k, v, seen)
    packed = q.dim() == 3
    if packed:
        q, k, v = q[None], k[None], v[None]
        mask = None if mask is None else mask[None]
    q, k, v = (t.transpose(-3, -2) for t in (q, k, v))  # (..., heads, tokens, K), as PyTorch wants them
    if mask is not None:
        mask = mask.unsqueeze(-3)  # one mask for all heads
    grouped = q.shape[-3] != k.shape[-3]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    out = out.transpose(-3, -2)  # (..., T, H, K)
    return out[0] if packed else out


class Band(NamedTuple):
    """A block of queries with the run of keys that holds all that they can see."""

    queries: slice
    keys: slice
    mask: Tensor | None  # (..., queries, keys); None: all visible, or lower-triangular if causal
    causal: bool = False


def bands(
    p_q: Tensor,
    p_k: Tensor,
    window: int | None,
    s_q: Tensor | None = None,
    s_k: Tensor | None = None,
    *,
    ordered: bool = True,
    consecutive: bool = False,
) -> tuple[Band, ...]:
    """Cut attention of the last T of S keys into blocks, so that long prompts need no (T, S) mask.

    Keys lie in memory so that the queries' own are the last T. `ordered`: each sequence is one run in
    order, so nothing more than W places back in memory is visible and whole runs of keys are skipped
    (otherwise only causality cuts them). `consecutive`: one sequence whose keys have consecutive
    positions, so that masks can be dropped where they would hide nothing. Both are promises of the
    caller; the masks are made from positions alone. Made once per forward and used by every layer.
    """
    T, S = p_q.shape[-1], p_k.shape[-1]
    block = BLOCK if window is None else min(BLOCK, max(64, window))
    out = []
    for start in range(0, T, block):
        stop = min(start + block, T)
        first = max(0, S - T + start - window + 1) if ordered and window is not None else 0
        last = S - T + stop
        rows, keys = slice(start, stop), slice(first, last)
        widest = last - first  # keys that the block's last query may see
        if consecutive and (window is None or widest <= window) and (rows.stop - rows.start) == 1:
            out.append(Band(rows, keys, None))
        elif consecutive and (window is None or widest <= window) and start == 0 and T == S:
            out.append(Band(rows, keys, None, causal=True))
        else:
            ids = (None, None) if s_q is None or s_k is None else (s_q[..., rows], s_k[..., keys])
            out.append(Band(rows, keys, visible(p_q[..., rows], p_k[..., keys], window, *ids)))
    return tuple(out)


def banded_attention(q: Tensor, k: Tensor, v: Tensor, plan: Sequence[Band]) -> Tensor:
    """Attention of q (..., T, H, K) over k, v (..., S, G, K), a band at a time: (..., T, H, K)."""
    keys = [b.keys for b in plan]
    qkv = zip(cut(q, [b.queries for b in plan]), cut(k, keys), cut(v, keys), strict=True)
    parts = [attention(*one, b.mask, b.causal) for one, b in zip(qkv, plan, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-3)
