"""Attention over a ring or pages against its twin, and rows in different chunks, storage and batches.

Here sequences come as a rectangle; test_attend_packed.py has them packed.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mistral_7b.attention import attention, visible
from mistral_7b.kernels.attend import Place, Remembered, attend, attend_twin, quantize_kv
from mistral_7b.kernels.backend import ATTENTION, Backend, uses
from mistral_7b.kernels.cpu import compiler

compiled = pytest.mark.skipif(
    not uses(Backend.CPU, ATTENTION, torch.empty(1, dtype=torch.bfloat16)),
    reason="without the kernel PyTorch's operators attend",
)


class Case(NamedTuple):
    """A sequence (T, ...) of queries, keys and values, to be split into cached and new tokens."""

    q: Tensor
    k: Tensor
    v: Tensor
    int8: bool


def sequence(T: int, H: int, G: int, K: int, int8: bool = False, seed: int = 0) -> Case:
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(T, heads, K, generator=draw).bfloat16() for heads in (H, G, G))
    return Case(q, k * 2, v, int8)


def forms(t: Tensor, int8: bool) -> tuple[Tensor, Tensor | None]:
    return quantize_kv(t) if int8 else (t, None)


def chunk(cases: list[Case], starts: list[int], T: int, slots: int, window: int | None, pages: int = 0) -> Tensor:
    """Queries starts..starts+T of each sequence, with the positions before in rings or shuffled pages."""
    int8 = cases[0].int8
    old = []
    q = torch.stack([c.q[s : s + T] for c, s in zip(cases, starts, strict=True)])
    new = [forms(torch.stack([t[s : s + T] for t, s in zip(ts, starts, strict=True)]), int8) for ts in (
        [c.k for c in cases], [c.v for c in cases])]  # fmt: skip
    held = [min(s, slots) for s in starts]
    table = None
    if pages:
        columns = -(-slots // pages)
        table = torch.randperm(len(cases) * columns, generator=torch.Generator().manual_seed(1)).view(-1, columns)
    for ts in ([c.k for c in cases], [c.v for c in cases]):
        laid = torch.full(
            (len(cases) * -(-slots // max(1, pages)) * max(1, pages), *ts[0].shape[1:]), torch.nan
        ).bfloat16()
        for b, (t, s) in enumerate(zip(ts, starts, strict=True)):
            for p in range(s - held[b], s):
                row = b * slots + p % slots if table is None else int(table[b, p // pages]) * pages + p % pages
                laid[row] = t[p]
        old.append(forms(laid.nan_to_num() if int8 else laid, int8))
    place = Place(torch.tensor(starts), torch.tensor(held), slots, 0, table, max(1, pages))
    where = Remembered(old[0][0], old[1][0], old[0][1], old[1][1], place)
    args = (q, new[0][0], new[1][0], new[0][1], new[1][1], where, window)
    out, wanted = attend(*args), attend_twin(*args)
    torch.testing.assert_close(out.float(), wanted.float(), atol=0.02, rtol=0.01)
    return out


SHAPES = [(8, 2, 128), (4, 4, 64), (6, 3, 10), (3, 1, 80), (32, 8, 128)]
WINDOWS = [None, 1, 8, 63, 64, 65, 200]
if os.environ.get(compiler.VARIABLE):  # see test_linear.py
    SHAPES, WINDOWS = [(4, 4, 64), (6, 3, 10)], [None, 8, 65]


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("H", "G", "K"), SHAPES)
def test_a_whole_sequence_matches_the_twin(H: int, G: int, K: int, window: int | None, int8: bool) -> None:
    for T in (1, 2, 64, 67, 300):
        chunk([sequence(T, H, G, K, int8)], [0], T, 512, window)


def test_the_twin_is_windowed_softmax_attention() -> None:
    case, p = sequence(40, 6, 3, 10), torch.arange(40)
    wanted = attention(case.q.double(), case.k.double(), case.v.double(), visible(p, p, 8))
    none = torch.zeros(0, 3, 10).bfloat16()
    zero = torch.zeros(1, dtype=torch.long)
    where = Remembered(none, none, None, None, Place(zero, zero, 1))
    got = attend_twin(case.q[None], case.k[None], case.v[None], None, None, where, 8)
    torch.testing.assert_close(got[0].double(), wanted, atol=0.01, rtol=0.01)
    full = attention(case.q.double(), case.k.double(), case.v.double(), visible(p, p, None))
    assert (got[0].double() - full).abs().max() > 0.1  # the negative control


@compiled
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("window", [None, 8, 100])
@pytest.mark.parametrize(("H", "G", "K"), [SHAPES[0], (6, 3, 10)])
def test_a_row_depends_on_its_keys_only(H: int, G: int, K: int, window: int | None, int8: bool) -> None:
    length = 260  # more than two windows
    case, other = sequence(length, H, G, K, int8), sequence(length, H, G, K, int8, seed=1)
    whole = chunk([case], [0], length, 300, window)[0]
    for T in (1, 2, 3, 16, 17, 64, 130):
        for start in (0, 1, 63, 64, 99, 120):
            got = chunk([case], [start], T, 300, window)[0]
            assert torch.equal(got, whole[start : start + T]), (T, start)
    ring = window or 300
    for start in (5, 64, 200):  # in a batch at other positions, in a ring that has wrapped around, and in pages
        beside = chunk([other, case, other], [start + 7, start, 3], 5, ring, window)[1]
        assert torch.equal(beside, whole[start : start + 5])
        paged = chunk([other, case], [30, start], 5, 300, window, pages=16)[1]
        assert torch.equal(paged, whole[start : start + 5])


def test_int8_keys_and_values_are_close() -> None:
    plain, small = (chunk([sequence(200, 8, 2, 128, int8)], [0], 200, 256, None) for int8 in (False, True))
    far = (plain.float() - small.float()).norm() / plain.float().norm()
    assert 1e-4 < far < 0.02
