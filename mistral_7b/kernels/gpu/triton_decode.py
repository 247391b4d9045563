"""Triton kernels for single-token attention, launched and documented by decode_attention.py.

Sums are in float32, in an order that depends on the ring's size only, so results are batch-invariant.
"""

# mypy: disable-error-code="no-untyped-def, import-not-found, import-untyped"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend_split(
    q, k, v, seen, maxima, totals, sums, S, row_k, slot_k, row_v, slot_v, row_seen, scale, G, R, K,
    MASKED: tl.constexpr, SPLIT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Maximum score, sum of exponentials and weighted values over SPLIT keys, for the R heads of one key head.

    Unseen keys are not read; a block of them costs one byte of mask per key. A split without visible keys writes
    -inf, 0, 0, so all elements of the results are always written.
    """
    b, g, split = tl.program_id(0) // G, tl.program_id(0) % G, tl.program_id(1)
    r, d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    valid = (r < R)[:, None] & (d < K)[None, :]
    heads = tl.program_id(0) * R + r
    query = tl.load(q + heads[:, None] * K + d[None, :], mask=valid, other=0.0)
    maximum = tl.full((BLOCK_R,), float("-inf"), tl.float32)
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
            new_maximum = tl.maximum(maximum, tl.max(score, 1))
            weight = tl.exp(score - new_maximum[:, None])
            rescale = tl.exp(maximum - new_maximum)
            value = tl.load(at_v, mask=visible[:, None] & (d < K)[None, :], other=0.0)
            acc = tl.dot(weight.to(value.dtype), value, acc * rescale[:, None], input_precision="ieee")
            total = total * rescale + tl.sum(weight, 1)
            maximum = new_maximum
    index = heads * tl.num_programs(1) + split
    tl.store(maxima + index, maximum, mask=r < R)
    tl.store(totals + index, total, mask=r < R)
    tl.store(sums + index[:, None] * K + d[None, :], acc, mask=valid)


@triton.jit
def attend_merge(maxima, totals, sums, out, SPLITS, K, BLOCK_SPLITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Merge the splits of one query head, in order."""
    head = tl.program_id(0)
    d, i = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_SPLITS)
    first = head * SPLITS
    global_maximum = tl.max(tl.load(maxima + first + i, mask=i < SPLITS, other=float("-inf")), 0)
    global_maximum = tl.maximum(global_maximum, -1e30)  # a query without visible keys gives zeros, not NaN
    total = 0.0
    acc = tl.zeros((BLOCK_K,), tl.float32)
    for split in range(SPLITS):
        factor = tl.exp(tl.load(maxima + first + split) - global_maximum)
        total += factor * tl.load(totals + first + split)
        acc += factor * tl.load(sums + (first + split) * K + d, mask=d < K, other=0.0)
    acc = acc / tl.maximum(total, 1e-30)
    tl.store(out + head * K + d, acc.to(out.dtype.element_ty), mask=d < K)
