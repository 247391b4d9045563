"""Triton kernels for attention of one token. decode_attention.py says what they compute.

Sums run in float32 in an order fixed by the ring alone, so no row depends on how many there are.
"""

# mypy: disable-error-code="no-untyped-def, import-not-found, import-untyped"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend_split(
    q, k, v, seen, tops, totals, sums, S, row_k, slot_k, row_v, slot_v, row_seen, scale, G, R, K,
    MASKED: tl.constexpr, SPLIT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The R query heads of one key/value head over SPLIT keys: largest score, sum of exps, weighted values.

    Keys that are not seen are neither read nor counted, a block of them costs a byte each. A split without
    any writes -inf, 0, 0: every number of the three results is written, whatever is visible.
    """
    b, g, split = tl.program_id(0) // G, tl.program_id(0) % G, tl.program_id(1)
    r, d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    there = (r < R)[:, None] & (d < K)[None, :]
    heads = tl.program_id(0) * R + r
    query = tl.load(q + heads[:, None] * K + d[None, :], mask=there, other=0.0)
    top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for start in range(0, SPLIT, BLOCK_S):
        s = split * SPLIT + start + tl.arange(0, BLOCK_S)
        visible = s < S
        if MASKED:
            visible = tl.load(seen + b * row_seen + s, mask=visible, other=0) != 0
        if tl.max(visible.to(tl.int32), 0) > 0:
            slot = s.to(tl.int64)
            at_k = k + b.to(tl.int64) * row_k + slot[None, :] * slot_k + g * K + d[:, None]
            at_v = v + b.to(tl.int64) * row_v + slot[:, None] * slot_v + g * K + d[None, :]
            key = tl.load(at_k, mask=(d < K)[:, None] & visible[None, :], other=0.0)
            score = tl.dot(query, key, input_precision="ieee") * scale
            score = tl.where(visible[None, :], score, float("-inf"))
            higher = tl.maximum(top, tl.max(score, 1))
            weight = tl.exp(score - higher[:, None])
            shrink = tl.exp(top - higher)
            value = tl.load(at_v, mask=visible[:, None] & (d < K)[None, :], other=0.0)
            acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
            total = total * shrink + tl.sum(weight, 1)
            top = higher
    place = heads * tl.num_programs(1) + split
    tl.store(tops + place, top, mask=r < R)
    tl.store(totals + place, total, mask=r < R)
    tl.store(sums + place[:, None] * K + d[None, :], acc, mask=there)


@triton.jit
def attend_merge(tops, totals, sums, out, SPLITS, K, BLOCK_SPLITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """The splits of one query head, added up in their order."""
    head = tl.program_id(0)
    d, i = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_SPLITS)
    first = head * SPLITS
    best = tl.max(tl.load(tops + first + i, mask=i < SPLITS, other=float("-inf")), 0)
    best = tl.maximum(best, -1e30)  # a query that sees nothing gives zeros, not NaN
    total = 0.0
    acc = tl.zeros((BLOCK_K,), tl.float32)
    for split in range(SPLITS):
        share = tl.exp(tl.load(tops + first + split) - best)
        total += share * tl.load(totals + first + split)
        acc += share * tl.load(sums + (first + split) * K + d, mask=d < K, other=0.0)
    acc = acc / tl.maximum(total, 1e-30)
    tl.store(out + head * K + d, acc.to(out.dtype.element_ty), mask=d < K)
