"""Triton kernels for paged attention, launched and documented by paged.py.

N rows of queries · B sequences · H = G * R query heads · G key/value heads · K width · W window

Exponentials are powers of two: `scale` includes log2(e). FLOOR is the maximum over no keys; it is finite, so that
no difference of infinities occurs. paged.py disables fused multiply-add, since two compilations of the same code
could otherwise round differently.
"""

# mypy: disable-error-code="no-untyped-def, import-not-found, import-untyped"
from __future__ import annotations

import triton
import triton.language as tl

FLOOR = tl.constexpr(-1e30)
SCAN = tl.constexpr(128)  # offsets compared at a time
VARYING = ["N", "B", "columns", "slots"]  # they change with each step; do not specialize on their values


@triton.jit
def _find_sequence(at, offsets, B, QUERIES: tl.constexpr):
    """The sequence of tile `at`, or of row `at` if QUERIES is 0; B for padding rows.

    The tiles of sequence b are numbered from offsets[b] // QUERIES + b, so that each sequence begins a new tile;
    at most one tile of each has no rows.
    """
    started = 0
    for first in range(0, B + 1, SCAN):
        b = first + tl.arange(0, SCAN)
        begins = tl.load(offsets + b, mask=b <= B, other=0)
        if QUERIES > 0:
            begins = begins // QUERIES + b
        started += tl.sum(((begins <= at) & (b <= B)).to(tl.int32), 0)
    return started - 1


@triton.jit
def _combine(top, total, acc, top_2, total_2, acc_2):
    """Combine (maximum score, sum of powers, weighted values) of two ranges of keys. The order matters."""
    maximum = tl.maximum(top, top_2)
    left, right = tl.exp2(top - maximum), tl.exp2(top_2 - maximum)
    return maximum, total * left + total_2 * right, acc * left[:, None] + acc_2 * right[:, None]


@triton.jit
def _normalize(acc, total):
    """Weighted values divided by the sum of weights; zeros for padding rows."""
    return acc / tl.where(total > 0.0, total, 1.0)[:, None]


@triton.jit(do_not_specialize=VARYING)
def attend_tiles(
    q, k, v, k_scale, v_scale, old_k, old_v, old_k_scale, old_v_scale, start, held, offsets, table,
    out, maxima, totals, sums, row_q, row_k, row_v, N, B, columns, slots, window, scale,
    SHARED: tl.constexpr, G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_K: tl.constexpr, PAGE: tl.constexpr, INT8: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Attention of a tile: consecutive queries of one sequence with the R query heads of one key/value head.

    Keys are processed in splits of SPLIT positions, and splits in blocks of BLOCK_S, aligned to multiples of their
    size. A program combines all splits of its tile in order, or, if SHARED, processes every n-th split (n is the
    third grid dimension) and stores partial results for `merge_splits`.
    """
    QUERIES: tl.constexpr = BLOCK_M // R
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # last queries first: they have the most keys
    g = tl.program_id(1)
    b = _find_sequence(tile, offsets, B, QUERIES)
    first = tl.load(offsets + b)
    T = (tl.load(offsets + b + 1, mask=b < B, other=N) - first).to(tl.int32)
    ahead = (tile - first // QUERIES - b).to(tl.int32) * QUERIES  # queries of the sequence before this tile
    if ahead < T:
        begin = tl.load(start + b, mask=b < B, other=0).to(tl.int32)
        oldest = begin - tl.load(held + b, mask=b < B, other=0).to(tl.int32)
        lowest = tl.maximum(oldest, begin + ahead - window + 1)
        # Padding rows have no keys.
        highest = tl.where(b < B, begin + tl.minimum(T, ahead + QUERIES), lowest) - 1
        m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
        i = ahead + m // R
        valid = (m < QUERIES * R) & (i < T)
        in_bounds = valid[:, None] & (d < K)[None, :]
        head = g * R + m % R
        query = tl.load(
            q + (first + i)[:, None] * row_q + head[:, None] * K + d[None, :], mask=in_bounds, other=0.0
        )
        p_q = tl.where(valid, begin + i, -1)
        low = tl.maximum(oldest, p_q - window + 1)  # each row attends to low..p_q
        index = (first + i) * (G * R) + head
        top = tl.full((BLOCK_M,), FLOOR, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for split in range(lowest // SPLIT + tl.program_id(2), highest // SPLIT + 1, tl.num_programs(2)):
            top_2 = tl.full((BLOCK_M,), FLOOR, tl.float32)
            total_2 = tl.zeros((BLOCK_M,), tl.float32)
            acc_2 = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            first_block = tl.maximum(split * SPLIT, lowest // BLOCK_S * BLOCK_S)
            for block in range(first_block, tl.minimum(split * SPLIT + SPLIT, highest + 1), BLOCK_S):
                p = block + tl.arange(0, BLOCK_S)
                visible = (p >= lowest) & (p <= highest)
                old = p < begin
                page = tl.load(table + b * columns + p // PAGE, mask=visible & old, other=0)
                row = tl.where(old, page * PAGE + p % PAGE, 0)
                own = tl.where(old, 0, first + (p - begin))
                mask = visible[:, None] & (d < K)[None, :]
                at_k = tl.where(old, old_k + (row * G + g) * K, k + own * row_k + g * K)
                key = tl.load(at_k[:, None] + d[None, :], mask=mask, other=0)
                at_v = tl.where(old, old_v + (row * G + g) * K, v + own * row_v + g * K)
                value = tl.load(at_v[:, None] + d[None, :], mask=mask, other=0)
                if INT8:  # via float32 for the interpreter; integers up to 127 are exact
                    key = key.to(tl.float32).to(query.dtype)
                    value = value.to(tl.float32).to(query.dtype)
                score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
                if INT8:
                    at_k = tl.where(old, old_k_scale + row * G + g, k_scale + own * G + g)
                    score *= tl.load(at_k, mask=visible, other=0.0)[None, :]
                seen = (p[None, :] >= low[:, None]) & (p[None, :] <= p_q[:, None])
                score = tl.where(seen, score, float("-inf"))
                new_top = tl.maximum(top_2, tl.max(score, 1))
                weight = tl.exp2(score - new_top[:, None])
                rescale = tl.exp2(top_2 - new_top)
                total_2 = total_2 * rescale + tl.sum(weight, 1)
                top_2 = new_top
                if INT8:
                    at_v = tl.where(old, old_v_scale + row * G + g, v_scale + own * G + g)
                    weight *= tl.load(at_v, mask=visible, other=0.0)[None, :]
                new_acc = tl.dot(weight.to(query.dtype), value, acc_2 * rescale[:, None], input_precision="ieee")
                # A block without visible keys leaves a row unchanged, whatever it contains.
                has_keys = (low < block + BLOCK_S) & (p_q >= block)
                acc_2 = tl.where(has_keys[:, None], new_acc, acc_2)
            if SHARED:
                slot = split - low // SPLIT
                in_split = valid & (slot >= 0) & (split <= p_q // SPLIT)
                partial = index * slots + slot
                tl.store(maxima + partial, top_2, mask=in_split)
                tl.store(totals + partial, total_2, mask=in_split)
                tl.store(sums + partial[:, None] * K + d[None, :], acc_2, mask=in_bounds & in_split[:, None])
            else:
                top, total, acc = _combine(top, total, acc, top_2, total_2, acc_2)
        if not SHARED:
            result = _normalize(acc, total).to(out.dtype.element_ty)
            tl.store(out + index[:, None] * K + d[None, :], result, mask=in_bounds)


@triton.jit(do_not_specialize=VARYING)
def merge_splits(
    maxima, totals, sums, start, held, offsets, out, B, slots, window,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Combine the splits of one query for the R heads of one key/value head, in the order of `attend_tiles`."""
    n, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b = _find_sequence(n, offsets, B, 0)
    r, d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    in_bounds = (r < R)[:, None] & (d < K)[None, :]
    begin = tl.load(start + b, mask=b < B, other=0).to(tl.int32)
    p_q = begin + (n - tl.load(offsets + b)).to(tl.int32)
    low = tl.maximum(begin - tl.load(held + b, mask=b < B, other=0).to(tl.int32), p_q - window + 1)
    splits = tl.where(b < B, p_q // SPLIT - low // SPLIT + 1, 0)
    index = n * (G * R) + g * R + r
    top = tl.full((BLOCK_R,), FLOOR, tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for slot in range(0, splits):
        partial = index * slots + slot
        top_2 = tl.load(maxima + partial, mask=r < R, other=FLOOR)
        total_2 = tl.load(totals + partial, mask=r < R, other=0.0)
        acc_2 = tl.load(sums + partial[:, None] * K + d[None, :], mask=in_bounds, other=0.0)
        top, total, acc = _combine(top, total, acc, top_2, total_2, acc_2)
    result = _normalize(acc, total).to(out.dtype.element_ty)
    tl.store(out + index[:, None] * K + d[None, :], result, mask=in_bounds)


@triton.jit(do_not_specialize=VARYING)
def write_kv(
    k, v, k_scale, v_scale, old_k, old_v, old_k_scale, old_v_scale, start, offsets, table, row_k, row_v,
    B, columns, G: tl.constexpr, K: tl.constexpr, PAGE: tl.constexpr, INT8: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Write the keys and values of one new token to its slot in the pages."""
    n = tl.program_id(0).to(tl.int64)
    b = _find_sequence(n, offsets, B, 0)
    if b < B:
        p = tl.load(start + b) + n - tl.load(offsets + b)
        row = tl.load(table + b * columns + p // PAGE) * PAGE + p % PAGE
        at = tl.arange(0, BLOCK)
        mask = at < G * K
        tl.store(old_k + row * (G * K) + at, tl.load(k + n * row_k + at, mask=mask), mask=mask)
        tl.store(old_v + row * (G * K) + at, tl.load(v + n * row_v + at, mask=mask), mask=mask)
        if INT8:
            g = tl.arange(0, BLOCK_G)
            tl.store(old_k_scale + row * G + g, tl.load(k_scale + n * G + g, mask=g < G), mask=g < G)
            tl.store(old_v_scale + row * G + g, tl.load(v_scale + n * G + g, mask=g < G), mask=g < G)
