"""Paged attention on a GPU, for any mixture of decode and prefill: the GPU implementation of ../attend.py.

    query rows, packed              0   1   2 3 4 5 6 7 8   9     decode is prefill of length one
    sequence                      [ 0 | 1 | 2 2 2 2 2 2 2 | 3 ]   offsets (cu_seqlens) 0, 1, 2, 9, 10
    tile, here of 4 queries         a   b   c c c c d d d   e     each with the R query heads of a key/value head

**The bits of a row depend only on its keys.** All tiles have BLOCK_M rows, with padding rows, so all rows execute
the same instructions. Keys are processed in blocks of BLOCK_S positions, and blocks in splits of SPLIT, aligned to
multiples of their size: the block of a key does not depend on the chunk of its query, on its page, or on other
sequences. A split gives a maximum, a sum and a weighted sum of values; the splits are combined in order. Either
one program processes all splits of a tile and keeps its state in registers, or, if there are too few tiles to fill
the GPU (a few decode rows over long contexts), several programs process the splits and a second kernel combines
them. Both use the same function to combine, so this choice, which depends on the batch size, changes no bit.

The host uses only N, B and the shapes of tensors and does not synchronize. Launches depend on these alone, so a
captured graph remains valid when the values of start, held, offsets and table change. Programs without work exit
immediately: at most N / queries + 1 tiles, one per sequence without rows, and those of splits that do not exist.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .launch import launch, power

if TYPE_CHECKING:
    from ..attend import Remembered

SPLIT = 512  # positions in a split, the unit of work that programs can share
BLOCK_M = 32  # rows in a tile: mma.sync needs few, and prefill uses each loaded key 32 times
BLOCK_S = 64  # keys in a block; half as many in float32, to fit the registers
PROGRAMS = 2048  # that fill a GPU: several per slot of its multiprocessors, since their lengths differ
MAX_PARTIAL_BYTES = 2**27  # of partial results; above, one program processes all splits of a tile
NO_WINDOW = 2**31 - 1  # a window that includes all positions
# Three stages: block table, keys and values, sums. No fp fusion: the same code must round alike in both kernels.
LAUNCH_OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}


def paged_attend(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, old: Remembered,
    window: int | None, keep: bool = True,
) -> Tensor:  # fmt: skip
    """Attention of packed q (N, H, K) over new k, v (N, G, K) and pages (n_pages, page, G, K): (N, H, K).

    Sequence b has the rows offsets[b]..offsets[b + 1], at positions from start[b]. They attend to these and to the
    held[b] positions before, in the pages of the block table's row b, within `window` (None or 0: all). A sequence
    may have no rows. Rows after the last offset are padding rows: they give zeros and are not written to pages.
    k, v and pages have q's type, or int8 with float32 scales (N, G, 1) and (n_pages, page, G, 1); pages are
    contiguous. With `keep`, new keys and values are then written to pages.
    Call it only if backend.py selects Triton.
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
    columns, window = table.shape[1], window or NO_WINDOW
    grid = _grid(N, H, G, K, B, columns * page, 0 if keep else N, window)
    split_programs, partials = grid.programs > 1, [out] * 3
    if split_programs:
        shapes = [(N * H, grid.slots, *last) for last in ((), (), (K,))]
        partials = [torch.empty(shape, dtype=torch.float32, device=q.device) for shape in shapes]
    strides, sizes = (q.stride(0), k.stride(0), v.stride(0)), (grid.slots, window)
    heads: dict[str, Any] = {"G": G, "R": H // G, "K": K, "SPLIT": SPLIT, "BLOCK_K": max(16, power(K))}
    pages: dict[str, Any] = {"PAGE": page, "INT8": k_scale is not None}
    blocks = {"BLOCK_M": grid.height, "BLOCK_S": BLOCK_S // 2 if q.dtype == torch.float32 else BLOCK_S}
    _launch(
        "attend_tiles", (grid.tiles, G, grid.programs), q, *entries, start, held, offsets, table, out, *partials,
        *strides, N, B, columns, *sizes, math.log2(math.e) / math.sqrt(K), SHARED=split_programs,
        **heads, **pages, **blocks,
    )  # fmt: skip
    if split_programs:
        _launch(
            "merge_splits", (N, G), *partials, start, held, offsets, out, B, *sizes, BLOCK_R=power(H // G), **heads
        )
    if keep:
        _launch(
            "write_kv", (N,), *entries, start, offsets, table, *strides[1:], B, columns, G=G, K=K, **pages,
            BLOCK=power(G * K), BLOCK_G=power(G),
        )  # fmt: skip
    return out


class Grid(NamedTuple):
    """The launch grid of a batch: tiles of `height` rows, each with at most `slots` splits."""

    height: int
    tiles: int
    slots: int
    programs: int  # that share the splits of a tile


def _grid(N: int, H: int, G: int, K: int, B: int, paged: int, new: int, window: int) -> Grid:
    """The grid for at most `paged` positions in pages and `new` beside them; without new, positions begin at 0."""
    height = max(BLOCK_M, power(H // G))
    queries = height // (H // G)
    # The tiles of sequence b begin at offsets[b] // queries + b; padding rows count as one more sequence.
    tiles = N // queries + B + 1
    all_splits = _splits(paged + new) if new else -(-paged // SPLIT)
    slots = max(1, min(all_splits, _splits(window + queries - 1)))
    programs = max(1, min(slots, PROGRAMS // (tiles * G)))
    return Grid(height, tiles, slots, programs if 4 * N * H * slots * (K + 2) <= MAX_PARTIAL_BYTES else 1)


def _splits(positions: int) -> int:
    """The largest number of splits that a range of this many positions can overlap."""
    return (positions - 2) // SPLIT + 2


def _rows(t: Tensor) -> Tensor:
    """t (N, heads, K), contiguous within rows; the row stride may be that of a wider matrix."""
    return t if t.stride(2) == 1 and t.stride(1) == t.shape[2] else t.contiguous()


def _launch(kernel: str, grid: tuple[int, ...], first: Tensor, *rest: Any, **constants: Any) -> None:
    launch("triton_paged", kernel, grid, first, *rest, **constants, **LAUNCH_OPTIONS)
