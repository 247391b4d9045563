"""Attention over new keys and remembered ones, wherever these lie, in bfloat16 or int8.

    key j is visible to query i   <=>   0 <= p_i - p_j < window

B sequences · T new tokens of each · N new tokens of all · H query heads · G key/value heads · K width

New tokens come as a rectangle "..." = (B, T), or packed, "..." = (N,): as many of each sequence as it has, one
sequence after another. A row's result depends on its keys alone: not on the chunk that it came in, on where its
keys lie, or on the rows beside it. cpu/attention.h says how. The twin gathers every key and value and does the
sums in float64.
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
    """Where the keys and values of a cache lie, in every layer alike; what is new is for a kernel to write there.

    start    (B,) int64, the position of each sequence's first new token
    held     (B,) int64, how many positions before it are remembered; what lies further back is never touched
    slots    position p of sequence b lies in row b * slots + (p - origin) % slots
    table    (B, columns) int64, or instead in pages: row table[b, p // page] * page + p % page
    offsets  (B + 1,) int64, 0 first and N last: packed tokens offsets[b]..offsets[b + 1] are those of sequence b;
             None: tokens are a rectangle, T of each
    """

    start: Tensor
    held: Tensor
    slots: int
    origin: int = 0
    table: Tensor | None = None
    page: int = 1
    offsets: Tensor | None = None


class Remembered(NamedTuple):
    """One layer's keys and values that came before."""

    k: Tensor  # (rows, G, K), or of any leading shape in that order
    v: Tensor
    k_scale: Tensor | None  # (rows, G, 1), for int8
    v_scale: Tensor | None
    place: Place


def quantize_kv(x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys or values (..., K) to int8 with a float32 scale (..., 1) for each head of each token."""
    exact = x.float()
    top = exact.abs().amax(-1, keepdim=True)
    q = (exact * torch.where(top > 0, torch.full_like(top, 127.0) / top, 0.0)).round_()
    return q.to(torch.int8), top / 127


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
    """Attention of bfloat16 q (..., H, K) over its own k, v (..., G, K) and those remembered: (..., H, K).

    k and v are bfloat16, or int8 with scales (..., G, 1); what is remembered is of the same kind.
    With `keep` the new ones are then written to their places among the remembered, in place.
    On a GPU, packed rows over pages (paged.py) may also be float16 or float32; what else there is takes the twin.
    """
    return torch.ops.mistral_7b.attend(
        q, k, v, k_scale, v_scale, old.k, old.v, old.k_scale, old.v_scale, *old.place, window or 0, keep
    )


def attend_twin(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, old: Remembered,
    window: int | None, keep: bool = False,
) -> Tensor:  # fmt: skip
    """The same in plain PyTorch: every key gathered, sums in float64, one sequence after another."""
    place, out = old.place, torch.empty_like(q)
    repeat, root = q.shape[-2] // k.shape[-2], math.sqrt(q.shape[-1])
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
        scores = torch.einsum("thk,shk->hts", queries[own].double(), keys.repeat_interleave(repeat, 1)) / root
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        result[own] = torch.einsum("hts,shk->thk", weights, values.repeat_interleave(repeat, 1)).to(q.dtype)
        if keep:
            last = T if place.table is not None else min(T, place.slots)
            for kept, t in zip(held, new, strict=True):
                kept[_rows(place, b, p_q[T - last :])] = t[end - last : end]
    return out


def _rows(place: Place, b: int, positions: Tensor) -> Tensor:
    """The rows in which positions of sequence b lie."""
    if place.table is None:
        return b * place.slots + (positions - place.origin) % place.slots
    return place.table[b, positions // place.page] * place.page + positions % place.page


def _in_float64(entries: list[Tensor], rows: Tensor | slice) -> list[Tensor]:
    """Keys and values of these rows, in float64."""
    k, v = (t[rows].double() for t in entries[:2])
    return [k, v] if len(entries) == 2 else [k * entries[2][rows].double(), v * entries[3][rows].double()]
