"""Attention over pages on a GPU, for any mixture of decode and prefill: ../attend.py's operator there.

    rows of queries, packed         0   1   2 3 4 5 6 7 8   9     decode is prefill of length one
    their sequences               [ 0 | 1 | 2 2 2 2 2 2 2 | 3 ]   offsets 0, 1, 2, 9, 10
    tiles, of 4 queries say         a   b   c c c c d d d   e     each with the R heads that share a key head

**A row's bits are a matter of its keys alone.** Tiles are BLOCK_M rows high, filled or not, so every row goes
through the same instructions. Keys are taken in blocks of BLOCK_S positions, and these in splits of SPLIT, all
beginning at multiples of their size: which block a key belongs to does not depend on the chunk its query came
in, on its page, or on other sequences. A split gives a maximum, a sum and a weighted sum of values, and splits
are folded from the first to the last. What is free is who folds: one program that goes through all of a tile's
splits, keeping nothing outside its registers, or, where there are too few tiles to fill the GPU (a few rows of
decode over long contexts), a second kernel, after several programs shared the splits. Both run the same fold,
so the choice, made by the sizes of the batch, changes no bit.

The host knows N, B and the shapes of tensors, and asks the device for nothing else: what is launched depends on
these alone, and a captured graph stays true when start, held, offsets and table are given other values.
Programs that find no work cost an exit: at most N / queries + 1 tiles, one for each sequence without rows, and
the shares of splits that are not there.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .launch import launch, power

if TYPE_CHECKING:
    from ..attend import Remembered

SPLIT = 512  # positions whose keys one program must take together
BLOCK_M = 32  # rows of a tile: low enough for mma.sync, high enough for prefill to use a loaded key 32 times
BLOCK_S = 64  # keys at once; half as many in float32, for which there would be no registers
PROGRAMS = 2048  # that fill a GPU evenly: several for each place on its multiprocessors, as lengths differ
SHARES = 2**27  # bytes of results between the two kernels: beyond, each tile's splits are left to one program
ENDLESS = 2**31 - 1  # a window that hides nothing
# Three stages: table, keys and values, sums. Unfused: a line that stands in two kernels rounds alike in both.
HOW: dict[str, Any] = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}


def paged_attend(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, old: Remembered,
    window: int | None, keep: bool = True,
) -> Tensor:  # fmt: skip
    """Attention of packed q (N, H, K) over its own k, v (N, G, K) and pages (n_pages, page, G, K): (N, H, K).

    Sequence b has rows offsets[b] to offsets[b + 1], at positions start[b] on, and sees held[b] positions before
    them in the pages table[b] (B, columns), of all these the last `window` (None or 0: all). It may have no rows.
    Rows after the last offset belong to no sequence: they give zeros and are not kept.
    k, v and pages are of q's type, or int8 with float32 scales (N, G, 1) and (n_pages, page, G, 1); pages are
    contiguous. With `keep` the new ones are then written to theirs. For what backend.py gives to Triton.
    """
    place, page = old.place, old.place.page
    assert place.offsets is not None
    assert place.table is not None
    (N, H, K), (G, B) = q.shape, (k.shape[1], len(place.start))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not N:
        return out
    q, k, v = (_rows(t) for t in (q, k, v))
    start, held, offsets, table = (t.contiguous() for t in (place.start, place.held, place.offsets, place.table))
    scales = [q if t is None else t for t in (k_scale, v_scale, old.k_scale, old.v_scale)]
    entries = (k, v, *(t if t is q else t.contiguous() for t in scales[:2]), old.k, old.v, *scales[2:])
    columns, window = table.shape[1], window or ENDLESS
    cut = _cut(N, H, G, K, B, columns * page, 0 if keep else N, window)
    shared, parts = cut.programs > 1, [out] * 3
    if shared:
        shapes = [(N * H, cut.slots, *last) for last in ((), (), (K,))]
        parts = [torch.empty(shape, dtype=torch.float32, device=q.device) for shape in shapes]
    strides, sizes = (q.stride(0), k.stride(0), v.stride(0)), (cut.slots, window)
    heads: dict[str, Any] = {"G": G, "R": H // G, "K": K, "SPLIT": SPLIT, "BLOCK_K": max(16, power(K))}
    pages: dict[str, Any] = {"PAGE": page, "INT8": k_scale is not None}
    blocks = {"BLOCK_M": cut.height, "BLOCK_S": BLOCK_S // 2 if q.dtype == torch.float32 else BLOCK_S}
    _launch(
        "attend_tiles", (cut.tiles, G, cut.programs), q, *entries, start, held, offsets, table, out, *parts,
        *strides, N, B, columns, *sizes, math.log2(math.e) / math.sqrt(K), SHARED=shared,
        **heads, **pages, **blocks,
    )  # fmt: skip
    if shared:
        _launch(
            "merge_splits", (N, G), *parts, start, held, offsets, out, B, *sizes, BLOCK_R=power(H // G), **heads
        )
    if keep:
        _launch(
            "remember", (N,), *entries, start, offsets, table, *strides[1:], B, columns, G=G, K=K, **pages,
            BLOCK=power(G * K), BLOCK_G=power(G),
        )  # fmt: skip
    return out


class Cut(NamedTuple):
    """How a batch is laid out in programs: tiles of `height` rows, of which each has at most `slots` splits."""

    height: int
    tiles: int
    slots: int
    programs: int  # that share a tile's splits


def _cut(N: int, H: int, G: int, K: int, B: int, paged: int, beside: int, window: int) -> Cut:
    """Positions in pages, `paged` at most, begin at 0; with new ones `beside` them, they begin anywhere."""
    height = max(BLOCK_M, power(H // G))
    queries = height // (H // G)
    tiles = (
        N // queries + B + 1
    )  # sequence b's begin at offsets[b] // queries + b, and as if B + 1 took what is left
    everything = _splits(paged + beside) if beside else -(-paged // SPLIT)
    slots = max(1, min(everything, _splits(window + queries - 1)))
    programs = max(1, min(slots, PROGRAMS // (tiles * G)))
    return Cut(height, tiles, slots, programs if 4 * N * H * slots * (K + 2) <= SHARES else 1)


def _splits(positions: int) -> int:
    """The most splits in which so many positions can lie, wherever they begin."""
    return (positions - 2) // SPLIT + 2


def _rows(t: Tensor) -> Tensor:
    """t (N, heads, K), contiguous but for the distance of its rows, which may be those of a wider matrix."""
    return t if t.stride(2) == 1 and t.stride(1) == t.shape[2] else t.contiguous()


def _launch(kernel: str, grid: tuple[int, ...], first: Tensor, *rest: Any, **constants: Any) -> None:
    launch("triton_paged", kernel, grid, first, *rest, **constants, **HOW)
