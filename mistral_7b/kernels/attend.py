"""Attention over new and cached keys, which are stored in a ring or in pages, in bfloat16 or int8.

    key j is visible to query i   <=>   0 <= p_i - p_j < window

B sequences · T new tokens per sequence · N new tokens in total · H query heads · G key/value heads · K head width

New tokens "..." are a rectangle (B, T), or a packed batch (N,) of sequences of different lengths. The result of a
row depends only on its own keys: not on the chunk size, on where the keys are stored, or on the other rows of the
batch (see cpu/attention.h). The twin gathers all keys and values and computes in float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .backend import ATTENTION, PAGED_ATTENTION, Backend, choose
from .cpu import calls
from .gpu.paged import paged_attend
from .linear import OPS


class Place(NamedTuple):
    """Where a cache stores keys and values; all layers share it.

    start    (B,) int64, the position of the first new token of each sequence
    held     (B,) int64, the number of cached positions before `start`; older ones are never accessed
    slots    ring: position p of sequence b is stored in row b * slots + (p - origin) % slots
    table    block table (B, columns) int64, pages: the row is table[b, p // page] * page + p % page; None: a ring
    offsets  cu_seqlens (B + 1,) int64, from 0 to N: sequence b has the packed tokens offsets[b]..offsets[b + 1];
             None: tokens are a rectangle, T per sequence
    """

    start: Tensor
    held: Tensor
    slots: int
    origin: int = 0
    table: Tensor | None = None
    page: int = 1
    offsets: Tensor | None = None


class Remembered(NamedTuple):
    """The cached keys and values of one layer."""

    k: Tensor  # (rows, G, K); the rows may be several leading dimensions
    v: Tensor
    k_scale: Tensor | None  # (rows, G, 1), for int8
    v_scale: Tensor | None
    place: Place


def quantize_kv(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize keys or values (..., K) to int8, with a float32 scale (..., 1) per token and head."""
    x32 = x.float()
    absmax = x32.abs().amax(-1, keepdim=True)
    q = (x32 * torch.where(absmax > 0, torch.full_like(absmax, 127.0) / absmax, 0.0)).round_()
    return q.to(torch.int8), absmax / 127


def _attend(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None,
    old_k: Tensor, old_v: Tensor, old_k_scale: Tensor | None, old_v_scale: Tensor | None,
    start: Tensor, held: Tensor, slots: int, origin: int, table: Tensor | None, page: int, offsets: Tensor | None,
    window: int, keep: bool,
) -> Tensor:  # fmt: skip
    old = Remembered(
        old_k, old_v, old_k_scale, old_v_scale, Place(start, held, slots, origin, table, page, offsets)
    )
    arguments = (q, k, v, k_scale, v_scale, old, window, keep)
    backend = choose(ATTENTION if table is None or offsets is None else PAGED_ATTENTION, q).backend
    if backend is Backend.CPU:
        return calls.attend(*arguments)
    return paged_attend(*arguments) if backend is Backend.TRITON else attend_twin(*arguments)


OPS.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor? k_scale, Tensor? v_scale, Tensor(a!) old_k, Tensor(b!) old_v, "
    "Tensor(c!)? old_k_scale, Tensor(d!)? old_v_scale, Tensor start, Tensor held, int slots, int origin, "
    "Tensor? table, int page, Tensor? offsets, int window, bool keep) -> Tensor"
)
for device in ("CPU", "CUDA"):
    OPS.impl("attend", _attend, device)
torch.library.register_fake("mistral_7b::attend", lambda q, *rest: torch.empty_like(q))


def attend(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, old: Remembered,
    window: int | None, keep: bool = False,
) -> Tensor:  # fmt: skip
    """Attention of bfloat16 q (..., H, K) over new k, v (..., G, K) and the cache `old`: (..., H, K).

    k and v are bfloat16, or int8 with scales (..., G, 1); the cache has the same type.
    With `keep`, the new keys and values are then written to the cache, in place.
    Packed rows over pages (paged.py) may also be float32, and on a GPU float16; all other cases use the twin.
    """
    return torch.ops.mistral_7b.attend(
        q, k, v, k_scale, v_scale, old.k, old.v, old.k_scale, old.v_scale, *old.place, window or 0, keep
    )


def attend_twin(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, old: Remembered,
    window: int | None, keep: bool = False,
) -> Tensor:  # fmt: skip
    """`attend` in plain PyTorch: gathers all keys and computes in float64, one sequence at a time."""
    place, out = old.place, torch.empty_like(q)
    repeat, sqrt_k = q.shape[-2] // k.shape[-2], math.sqrt(q.shape[-1])
    queries, result = q.flatten(0, -3), out.view(-1, *q.shape[-2:])  # (N, H, K)
    new = [t.flatten(0, -3) for t in (k, v, k_scale, v_scale) if t is not None]  # (N, G, ...)
    held = [t.flatten(0, -3) for t in (old.k, old.v, old.k_scale, old.v_scale) if t is not None]  # (rows, G, ...)
    B = len(place.start)
    offsets = torch.arange(B + 1) * (len(queries) // B) if place.offsets is None else place.offsets
    for b, (first, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        start, T = int(place.start[b]), end - first
        positions = torch.arange(start - int(place.held[b]), start, device=q.device)
        rows = _rows(place, b, positions)
        own = slice(first, end)
        keys, values = (
            torch.cat(pair) for pair in zip(_in_float64(new, own), _in_float64(held, rows), strict=True)
        )
        p_q = torch.arange(start, start + T, device=q.device)
        distance = p_q[:, None] - torch.cat([p_q, positions])  # (T, T + held)
        hidden = (distance < 0) | (distance >= (window or 2**62))
        scores = torch.einsum("thk,shk->hts", queries[own].double(), keys.repeat_interleave(repeat, 1)) / sqrt_k
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        result[own] = torch.einsum("hts,shk->thk", weights, values.repeat_interleave(repeat, 1)).to(q.dtype)
        if keep:
            last = T if place.table is not None else min(T, place.slots)
            for cached, t in zip(held, new, strict=True):
                cached[_rows(place, b, p_q[T - last :])] = t[end - last : end]
    return out


def _rows(place: Place, b: int, positions: Tensor) -> Tensor:
    """The cache rows of these positions of sequence b."""
    if place.table is None:
        return b * place.slots + (positions - place.origin) % place.slots
    return place.table[b, positions // place.page] * place.page + positions % place.page


def _in_float64(entries: list[Tensor], rows: Tensor | slice) -> list[Tensor]:
    """Keys and values of these rows, dequantized to float64."""
    k, v = (t[rows].double() for t in entries[:2])
    return [k, v] if len(entries) == 2 else [k * entries[2][rows].double(), v * entries[3][rows].double()]
