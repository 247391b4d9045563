"""Triton kernels for attention over pages. paged.py says what they compute, and why a row's bits are its own.

N rows of queries · B sequences · H = G * R query heads · G key/value heads · K width · W window

Scores are in powers of two: `scale` holds log2(e). FLOOR stands for the maximum of no keys, so that nothing
is ever the difference of two infinities. No product is fused with a sum (paged.py launches them so), or two
compilations of one line might round differently.

Written for a GPU and run in Triton's interpreter; compiled for sm_80 and sm_90; never yet timed.
"""

# mypy: disable-error-code="no-untyped-def, import-not-found, import-untyped"
from __future__ import annotations

import triton
import triton.language as tl

FLOOR = tl.constexpr(-1e30)
SCAN = tl.constexpr(128)  # offsets looked at together
VARYING = ["N", "B", "columns", "slots"]  # from step to step: one compilation serves all their values


@triton.jit
def _owner(at, offsets, B, QUERIES: tl.constexpr):
    """The sequence of tile `at`, or of row `at` where QUERIES is 0; B for what comes after the last.

    Tiles of sequence b are numbered from offsets[b] // QUERIES + b on: enough for each to begin a tile of its
    own, and one or none of them is left without rows.
    """
    begun = 0
    for first in range(0, B + 1, SCAN):
        b = first + tl.arange(0, SCAN)
        begins = tl.load(offsets + b, mask=b <= B, other=0)
        if QUERIES > 0:
            begins = begins // QUERIES + b
        begun += tl.sum(((begins <= at) & (b <= B)).to(tl.int32), 0)
    return begun - 1


@triton.jit
def _fold(top, total, acc, top_2, total_2, acc_2):
    """What two runs of keys give together: largest score, sum of powers, weighted values. Order matters."""
    best = tl.maximum(top, top_2)
    left, right = tl.exp2(top - best), tl.exp2(top_2 - best)
    return best, total * left + total_2 * right, acc * left[:, None] + acc_2 * right[:, None]


@triton.jit
def _share(acc, total):
    """Weighted values by the sum of their weights; zeros for a row that no sequence owns."""
    return acc / tl.where(total > 0.0, total, 1.0)[:, None]


@triton.jit(do_not_specialize=VARYING)
def attend_tiles(
    q, k, v, k_scale, v_scale, old_k, old_v, old_k_scale, old_v_scale, start, held, offsets, table,
    out, tops, totals, sums, row_q, row_k, row_v, N, B, columns, slots, window, scale,
    SHARED: tl.constexpr, G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_K: tl.constexpr, PAGE: tl.constexpr, INT8: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """A tile of consecutive queries of one sequence, for the R heads of one key head, over all they see.

    The keys are taken in splits of SPLIT positions, and these in blocks of BLOCK_S, all at multiples of their
    size. A program takes every split of its tile and folds them in order, or, SHARED, each n-th, n being the
    third side of the grid, and leaves what each gives to `merge_splits`.
    """
    QUERIES: tl.constexpr = BLOCK_M // R
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # a sequence's last queries see most: they go first
    g = tl.program_id(1)
    b = _owner(tile, offsets, B, QUERIES)
    first = tl.load(offsets + b)
    T = (tl.load(offsets + b + 1, mask=b < B, other=N) - first).to(tl.int32)
    ahead = (tile - first // QUERIES - b).to(tl.int32) * QUERIES  # queries of the sequence before this tile
    if ahead < T:
        begin = tl.load(start + b, mask=b < B, other=0).to(tl.int32)
        oldest = begin - tl.load(held + b, mask=b < B, other=0).to(tl.int32)
        lowest = tl.maximum(oldest, begin + ahead - window + 1)
        highest = (
            tl.where(b < B, begin + tl.minimum(T, ahead + QUERIES), lowest) - 1
        )  # rows without owner: no keys
        m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
        i = ahead + m // R
        there = (m < QUERIES * R) & (i < T)
        wide = there[:, None] & (d < K)[None, :]
        head = g * R + m % R
        query = tl.load(q + (first + i)[:, None] * row_q + head[:, None] * K + d[None, :], mask=wide, other=0.0)
        p_q = tl.where(there, begin + i, -1)
        low = tl.maximum(oldest, p_q - window + 1)  # each row sees low..p_q
        place = (first + i) * (G * R) + head
        top = tl.full((BLOCK_M,), FLOOR, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for split in range(lowest // SPLIT + tl.program_id(2), highest // SPLIT + 1, tl.num_programs(2)):
            top_2 = tl.full((BLOCK_M,), FLOOR, tl.float32)
            total_2 = tl.zeros((BLOCK_M,), tl.float32)
            acc_2 = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            nearest = tl.maximum(split * SPLIT, lowest // BLOCK_S * BLOCK_S)
            for block in range(nearest, tl.minimum(split * SPLIT + SPLIT, highest + 1), BLOCK_S):
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
                if INT8:  # by way of float32, for the interpreter's sake; whole numbers up to 127 lose nothing
                    key = key.to(tl.float32).to(query.dtype)
                    value = value.to(tl.float32).to(query.dtype)
                score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
                if INT8:
                    at_k = tl.where(old, old_k_scale + row * G + g, k_scale + own * G + g)
                    score *= tl.load(at_k, mask=visible, other=0.0)[None, :]
                seen = (p[None, :] >= low[:, None]) & (p[None, :] <= p_q[:, None])
                score = tl.where(seen, score, float("-inf"))
                higher = tl.maximum(top_2, tl.max(score, 1))
                weight = tl.exp2(score - higher[:, None])
                shrink = tl.exp2(top_2 - higher)
                total_2 = total_2 * shrink + tl.sum(weight, 1)
                top_2 = higher
                if INT8:
                    at_v = tl.where(old, old_v_scale + row * G + g, v_scale + own * G + g)
                    weight *= tl.load(at_v, mask=visible, other=0.0)[None, :]
                more = tl.dot(weight.to(query.dtype), value, acc_2 * shrink[:, None], input_precision="ieee")
                # A block that shows a row nothing leaves the row as it is, whatever lies there.
                some = (low < block + BLOCK_S) & (p_q >= block)
                acc_2 = tl.where(some[:, None], more, acc_2)
            if SHARED:
                slot = split - low // SPLIT
                mine = there & (slot >= 0) & (split <= p_q // SPLIT)
                share = place * slots + slot
                tl.store(tops + share, top_2, mask=mine)
                tl.store(totals + share, total_2, mask=mine)
                tl.store(sums + share[:, None] * K + d[None, :], acc_2, mask=wide & mine[:, None])
            else:
                top, total, acc = _fold(top, total, acc, top_2, total_2, acc_2)
        if not SHARED:
            result = _share(acc, total).to(out.dtype.element_ty)
            tl.store(out + place[:, None] * K + d[None, :], result, mask=wide)


@triton.jit(do_not_specialize=VARYING)
def merge_splits(
    tops, totals, sums, start, held, offsets, out, B, slots, window,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The splits of one query, for the R heads of one key head, folded in the order of `attend_tiles`."""
    n, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b = _owner(n, offsets, B, 0)
    r, d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    wide = (r < R)[:, None] & (d < K)[None, :]
    begin = tl.load(start + b, mask=b < B, other=0).to(tl.int32)
    p_q = begin + (n - tl.load(offsets + b)).to(tl.int32)
    low = tl.maximum(begin - tl.load(held + b, mask=b < B, other=0).to(tl.int32), p_q - window + 1)
    splits = tl.where(b < B, p_q // SPLIT - low // SPLIT + 1, 0)
    place = n * (G * R) + g * R + r
    top = tl.full((BLOCK_R,), FLOOR, tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for slot in range(0, splits):
        share = place * slots + slot
        top_2 = tl.load(tops + share, mask=r < R, other=FLOOR)
        total_2 = tl.load(totals + share, mask=r < R, other=0.0)
        acc_2 = tl.load(sums + share[:, None] * K + d[None, :], mask=wide, other=0.0)
        top, total, acc = _fold(top, total, acc, top_2, total_2, acc_2)
    result = _share(acc, total).to(out.dtype.element_ty)
    tl.store(out + place[:, None] * K + d[None, :], result, mask=wide)


@triton.jit(do_not_specialize=VARYING)
def remember(
    k, v, k_scale, v_scale, old_k, old_v, old_k_scale, old_v_scale, start, offsets, table, row_k, row_v,
    B, columns, G: tl.constexpr, K: tl.constexpr, PAGE: tl.constexpr, INT8: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """The keys and values of one new token, to their place in the pages."""
    n = tl.program_id(0).to(tl.int64)
    b = _owner(n, offsets, B, 0)
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
