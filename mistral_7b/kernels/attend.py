"""Attention over new keys and remembered ones, wherever these lie, in bfloat16 or int8.

    key j is visible to query i   <=>   0 <= p_i - p_j < window

B sequences · T new tokens of each · H query heads · G key/value heads · K width · S slots

A row's result depends on its keys alone: not on the chunk that it came in, on where its keys lie, or on the
rows beside it. cpu.cpp says how. The twin gathers every key and value and does the sums in float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import compiler
from .linear import OPS


class Remembered(NamedTuple):
    """Keys and values that came before, and where they lie.

    start   (B,) int64, the position of each sequence's first new token
    held    (B,) int64, how many positions before it are remembered
    slots   position p of sequence b lies in row b * slots + (p - origin) % slots
    table   (B, columns) int64, or instead in pages: row table[b, p // page] * page + p % page
    """

    k: Tensor  # (rows, G, K), or of any leading shape in that order
    v: Tensor
    k_scale: Tensor | None  # (rows, G, 1), for int8
    v_scale: Tensor | None
    start: Tensor
    held: Tensor
    slots: int
    origin: int = 0
    table: Tensor | None = None
    page: int = 1


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether the kernel is compiled on this machine."""
    return compiler.library() is not None


def quantize_kv(x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys or values (..., K) to int8 with a float32 scale (..., 1) for each head of each token."""
    wide = x.float()
    top = wide.abs().amax(-1, keepdim=True)
    q = (wide * torch.where(top > 0, torch.full_like(top, 127.0) / top, 0.0)).round_()
    return q.to(torch.int8), top / 127


def _attend(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None,
    old_k: Tensor, old_v: Tensor, old_k_scale: Tensor | None, old_v_scale: Tensor | None,
    start: Tensor, held: Tensor, slots: int, origin: int, table: Tensor | None, page: int, window: int,
) -> Tensor:  # fmt: skip
    lib = compiler.library()
    if lib is None or q.dtype != torch.bfloat16:
        return attend_twin(
            q, k, v, k_scale, v_scale,
            Remembered(old_k, old_v, old_k_scale, old_v_scale, start, held, slots, origin, table, page), window,
        )  # fmt: skip
    B, T, H, K = q.shape
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty_like(q)
    lib.m7b_attend(
        k.dtype == torch.int8, B, T, H, k.shape[-2], K, q.data_ptr(), k.data_ptr(), v.data_ptr(),
        _at(k_scale), _at(v_scale), old_k.data_ptr(), old_v.data_ptr(), _at(old_k_scale), _at(old_v_scale),
        start.data_ptr(), held.data_ptr(), slots, origin, _at(table), 0 if table is None else table.shape[1], page,
        window, torch.get_num_threads(), out.data_ptr(),
    )  # fmt: skip
    return out


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


OPS.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor? k_scale, Tensor? v_scale, Tensor old_k, Tensor old_v, "
    "Tensor? old_k_scale, Tensor? old_v_scale, Tensor start, Tensor held, int slots, int origin, "
    "Tensor? table, int page, int window) -> Tensor"
)
OPS.impl("attend", _attend, "CPU")
torch.library.register_fake("mistral_7b::attend", lambda q, *rest: torch.empty_like(q))


def attend(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, old: Remembered,
    window: int | None,
) -> Tensor:  # fmt: skip
    """Attention of bfloat16 q (B, T, H, K) over its own k, v (B, T, G, K) and those remembered: (B, T, H, K).

    k and v are bfloat16, or int8 with scales (B, T, G, 1); what is remembered is of the same kind.
    """
    return torch.ops.mistral_7b.attend(
        q, k, v, k_scale, v_scale, old.k, old.v, old.k_scale, old.v_scale, old.start, old.held, old.slots,
        old.origin, old.table, old.page, window or 0,
    )  # fmt: skip


def attend_twin(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, old: Remembered,
    window: int | None,
) -> Tensor:  # fmt: skip
    """The same in plain PyTorch: every key gathered, sums in float64, one sequence after another."""
    out = torch.empty_like(q)
    repeat, root = q.shape[2] // k.shape[2], math.sqrt(q.shape[3])
    for b in range(len(q)):
        start, held = int(old.start[b]), int(old.held[b])
        positions = torch.arange(start - held, start)
        if old.table is None:
            rows = b * old.slots + (positions - old.origin) % old.slots
        else:
            rows = old.table[b, positions // old.page] * old.page + positions % old.page
        keys, values = (
            torch.cat([_wide(now, now_scale, b), _wide(then, then_scale, rows)])
            for now, now_scale, then, then_scale in (
                (k, k_scale, old.k.flatten(0, -3), None if old.k_scale is None else old.k_scale.flatten(0, -3)),
                (v, v_scale, old.v.flatten(0, -3), None if old.v_scale is None else old.v_scale.flatten(0, -3)),
            )
        )  # (T + held, G, K)
        p_q = torch.arange(start, start + q.shape[1])
        distance = p_q[:, None] - torch.cat([p_q, positions])  # (T, T + held)
        hidden = (distance < 0) | (distance >= (window or 2**62))
        scores = torch.einsum("thk,shk->hts", q[b].double(), keys.repeat_interleave(repeat, 1)) / root
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        out[b] = torch.einsum("hts,shk->thk", weights, values.repeat_interleave(repeat, 1)).to(q.dtype)
    return out


def _wide(x: Tensor, scale: Tensor | None, rows: Tensor | int) -> Tensor:
    wide = x[rows].double()
    return wide if scale is None else wide * scale[rows].double()
