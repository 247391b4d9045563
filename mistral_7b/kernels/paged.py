"""Attention over pages on a GPU, for any mixture of decode and prefill: attend.py's operator there.

    N rows of queries, packed      offsets  0     1     2              9   10
    of B sequences                         [ 0 ] [ 1 ] [ 2 2 2 2 2 2 2 ] [ 3 ]      decode is prefill of length one
    tiles of BLOCK_M rows                   a     b     c c c c   d d d   e         here of 4 queries with their heads

**A row's bits are a matter of its keys alone.** Tiles are BLOCK_M rows high, filled or not, so every row goes
through the same instructions. Keys are taken in blocks of BLOCK_S positions, and these in splits of SPLIT, all
beginning at multiples of their size: which block a key belongs to does not depend on the chunk its query came
in, on its page, or on other sequences. A split gives a maximum, a sum and a weighted sum of values, and splits
are folded from the first to the last. What is free is who folds: one program that goes through all of a tile's
splits, keeping nothing outside its registers, or, where there are too few tiles to fill the GPU (a few rows of
decode over long contexts), a second kernel, after several programs shared the splits. Both run the same fold,
so the choice, made by the sizes of the batch, changes no bit.

The host knows N, B and the widths of tensors, and asks the device for nothing else: grids depend on these
alone, and a captured graph stays true when start, held, offsets and table are given other values. What is
launched and finds no work costs an exit: at most N / queries + 1 tiles, times G.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from .fused import launch

SPLIT = 512  # positions whose keys one program must take together
BLOCK_M = 32  # rows of a tile: low enough for mma.sync, high enough for prefill to use a loaded key 32 times
BLOCK_S = 64  # keys at once, half as many in float32, for which there would be no registers
PROGRAMS = 2048  # that fill a GPU evenly: several for each place that its multiprocessors have, lengths differing
SHARES = 2**27  # bytes of results between two kernels: beyond, each tile's splits are left to one program
ENDLESS = 2**31 - 1  # a window that hides nothing
# Three stages: table, keys and values, sums. Unfused: a line that stands in two kernels rounds alike in both.
HOW = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}


def paged_attend(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None,
    old_k: Tensor, old_v: Tensor, old_k_scale: Tensor | None, old_v_scale: Tensor | None,
    start: Tensor, held: Tensor, offsets: Tensor, table: Tensor, page: int, window: int | None, keep: bool = True,
) -> Tensor:  # fmt: skip
    """Attention of packed q (N, H, K) over its own k, v (N, G, K) and pages (n_pages, page, G, K): (N, H, K).

    Sequence b has rows offsets[b] to offsets[b + 1] at positions start[b] on, sees held[b] positions before
    them in the pages table[b] (B, columns), and of all these the last `window` (None or 0: all). It may have no
    rows. Rows after the last offset belong to no sequence: they give zeros and are not kept.
    k, v and pages are of q's type, or int8 with float32 scales (N, G, 1) and (n_pages, page, G, 1). With `keep`
    the new ones are then written to their pages, which are contiguous. For tensors that `fused.runs_kernels` takes.
    """
    N, H, K = q.shape
    G, B = k.shape[1], len(start)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not N:
        return out
    q, k, v = (_rows(t) for t in (q, k, v))
    start, held, offsets, table = (t.contiguous() for t in (start, held, offsets, table))
    int8, columns, window = k_scale is not None, table.shape[1], window or ENDLESS
    scales = tuple(q if t is None else t.contiguous() for t in (k_scale, v_scale, old_k_scale, old_v_scale))
    olds = (old_k, old_v, *scales[2:])
    R = H // G
    heads: dict[str, Any] = {"G": G, "R": R, "K": K, "SPLIT": SPLIT}
    block_m, block_k = max(BLOCK_M, _power(R)), max(16, _power(K))
    queries = block_m // R
    tiles = N // queries + B + 1
    slots = _most_splits(columns * page, 0 if keep else N, window + queries - 1)
    programs = min(slots, PROGRAMS // (tiles * G))
    shared = programs > 1 and 4 * N * H * slots * (K + 2) <= SHARES
    parts = [out] * 3
    if shared:
        parts = [torch.empty(N * H, slots, *wide, dtype=torch.float32, device=q.device) for wide in ((), (), (K,))]
    sizes = (q.stride(0), k.stride(0), v.stride(0), N, B, columns, slots, window, math.log2(math.e) / math.sqrt(K))
    pages = {"PAGE": page, "INT8": int8}
    block_s = BLOCK_S // 2 if q.dtype == torch.float32 else BLOCK_S
    blocks = {"SHARED": shared, "BLOCK_M": block_m, "BLOCK_S": block_s, "BLOCK_K": block_k}
    _launch(
        "attend_tiles", (tiles, G, programs if shared else 1), q, k, v, *scales[:2], *olds, start, held, offsets,
        table, out, *parts, *sizes, **heads, **pages, **blocks,
    )  # fmt: skip
    if shared:
        last = (start, held, offsets, out, B, slots, window)
        _launch("merge_splits", (N, G), *parts, *last, **heads, BLOCK_R=_power(R), BLOCK_K=block_k)
    if keep:
        new = (k, v, *scales[:2], *olds, start, offsets, table, k.stride(0), v.stride(0), B, columns)
        _launch("remember", (N,), *new, G=G, K=K, **pages, BLOCK=_power(G * K), BLOCK_G=_power(G))
    return out


def _most_splits(paged: int, beside: int, seen: int) -> int:
    """The most splits in which the keys of one tile can lie: `seen` positions at most, in a row.

    Those in pages, `paged` at most, begin at 0; with new ones `beside` them, not in pages, they begin anywhere.
    """

    def anywhere(positions: int) -> int:
        return (positions - 2) // SPLIT + 2

    everything = anywhere(paged + beside) if beside else -(-paged // SPLIT)
    return max(1, min(everything, anywhere(seen)))


def _rows(t: Tensor) -> Tensor:
    """t (N, heads, K), contiguous but for the distance of its rows, which may be those of a wider matrix."""
    return t if t.stride(2) == 1 and t.stride(1) == t.shape[2] else t.contiguous()


def _power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


_launch = functools.partial(launch, "triton_paged", **HOW)
