"""Packed queries over pages, of different lengths, against the twin and each sequence alone."""

from __future__ import annotations

import os
import random

import pytest
import torch
from test_attend import Case, chunk, compiled, forms, sequence
from torch import Tensor

from mistral_7b.kernels.attend import Place, Remembered, attend, attend_twin
from mistral_7b.kernels.cpu import compiler

# (first new position, new tokens): decode, draft tokens and prompt chunks
RAGGED = [(130, 1), (0, 65), (63, 2), (70, 64), (64, 7), (200, 1), (0, 1), (5, 130), (12, 0), (150, 2)]
SHAPES = [(8, 2, 128), (6, 3, 10)]
if os.environ.get(compiler.VARIABLE):  # see test_linear.py
    SHAPES = SHAPES[1:]


class Packed:
    """Sequences cached in shuffled pages; all other slots are NaN, which any product would spread."""

    def __init__(
        self,
        cases: list[Case],
        spans: list[tuple[int, int]],
        window: int | None,
        page: int,
        held_at_most: int = 300,
    ) -> None:
        self.int8, self.window = cases[0].int8, window
        starts, lengths = ([span[i] for span in spans] for i in (0, 1))
        held = [min(s, held_at_most, (window or 300) - 1) for s in starts]
        columns = max(-(-(s + n) // page) for s, n in spans)
        last = len(cases) * columns  # a page of no sequence
        order = random.Random(1).sample(range(last), last)
        table = torch.tensor(order).view(len(cases), columns)
        self.rows: list[list[int]] = []  # the rows of each sequence's new tokens
        self.entries = [
            torch.full(
                ((last + 1) * page, *t.shape[1:]), torch.nan if t.is_floating_point() else 77, dtype=t.dtype
            )
            for t in self.kept(cases[0], 0, 1)
        ]
        for b, (case, (s, n)) in enumerate(zip(cases, spans, strict=True)):
            place = [int(table[b, p // page]) * page + p % page for p in range(s + n)]
            for entry, t in zip(self.entries, self.kept(case, s - held[b], s), strict=True):
                entry[place[s - held[b] : s]] = t
            self.rows.append(place[s:])
            table[b, : (s - held[b]) // page] = table[b, -(-(s + n) // page) :] = last
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        self.place = Place(torch.tensor(starts), torch.tensor(held), 1, 0, table, page, offsets)
        self.q = torch.cat([c.q[s : s + n] for c, (s, n) in zip(cases, spans, strict=True)])
        new = [self.kept(c, s, s + n) for c, (s, n) in zip(cases, spans, strict=True)]
        self.new = [torch.cat(ts) for ts in zip(*new, strict=True)]

    def kept(self, case: Case, begin: int, end: int) -> list[Tensor]:
        (k, k_scale), (v, v_scale) = (forms(t[begin:end], self.int8) for t in (case.k, case.v))
        return [t for t in (k, v, k_scale, v_scale) if t is not None]

    def run(self, twin: bool = False, keep: bool = False) -> tuple[Tensor, list[Tensor]]:
        """The attention result, and the pages after the call."""
        none = [] if self.int8 else [None, None]
        entries = [t.clone() for t in self.entries]
        old = Remembered(*entries, *none, self.place)
        out = (attend_twin if twin else attend)(self.q, *self.new, *none, old, self.window, keep)
        return out, entries


def bits(t: Tensor) -> Tensor:
    return t.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[t.element_size()])  # NaN equals itself


@compiled
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("window", [None, 8, 100])
@pytest.mark.parametrize(("H", "G", "K"), SHAPES)
def test_packed_queries_over_pages(H: int, G: int, K: int, window: int | None, page: int, int8: bool) -> None:
    cases = [sequence(202, H, G, K, int8, seed) for seed in range(len(RAGGED))]
    packed = Packed(cases, RAGGED, window, page)
    out, _ = packed.run()
    torch.testing.assert_close(out.float(), packed.run(twin=True)[0].float(), atol=0.02, rtol=0.01)
    offsets = packed.place.offsets.tolist()
    for b, (case, (start, n)) in enumerate(zip(cases, RAGGED, strict=True)):
        if n:
            alone = chunk([case], [start], n, window or 300, window)[0]  # over a ring
            assert torch.equal(out[offsets[b] : offsets[b + 1]], alone), (start, n)


@pytest.mark.parametrize("int8", [False, True])
def test_positions_before_held_are_not_read(int8: bool) -> None:
    cases = [sequence(202, 8, 2, 128, int8, seed) for seed in range(len(RAGGED))]
    packed = Packed(cases, RAGGED, None, 16, held_at_most=40)
    out = packed.run()[0]
    torch.testing.assert_close(out.float(), packed.run(twin=True)[0].float(), atol=0.02, rtol=0.01)
    assert not torch.equal(out, Packed(cases, RAGGED, None, 16).run()[0])  # the negative control


@pytest.mark.parametrize("int8", [False, True])
def test_new_keys_are_written_to_their_rows_only(int8: bool) -> None:
    cases = [sequence(202, 32, 8, 128, int8, seed) for seed in range(len(RAGGED))]  # enough for several threads
    packed = Packed(cases, RAGGED, 100, 16)
    out, entries = packed.run(keep=True)
    assert torch.equal(out, packed.run()[0])
    wanted, rows = [t.clone() for t in packed.entries], [row for rows in packed.rows for row in rows]
    for entry, t in zip(wanted, packed.new, strict=True):
        entry[rows] = t
    for got, theirs, entry in zip(entries, packed.run(twin=True, keep=True)[1], wanted, strict=True):
        assert torch.equal(bits(got), bits(entry))
        assert torch.equal(bits(theirs), bits(entry))


@compiled
def test_packed_queries_over_rings() -> None:
    """Rings support packed queries too; of a chunk longer than the ring only the end is written."""
    slots, spans = 70, [(30, 1), (64, 5), (3, 130)]
    cases = [sequence(202, 8, 2, 128, seed=seed) for seed in range(3)]
    laid = torch.full((2, 3 * slots, 2, 128), torch.nan).bfloat16()
    for b, (case, (s, _)) in enumerate(zip(cases, spans, strict=True)):
        rows = [b * slots + p % slots for p in range(s)]
        laid[0, rows], laid[1, rows] = case.k[:s], case.v[:s]
    starts = torch.tensor([s for s, _ in spans])
    offsets = torch.tensor([0, *(n for _, n in spans)]).cumsum(0)
    q, k, v = (torch.cat([c[i][s : s + n] for c, (s, n) in zip(cases, spans, strict=True)]) for i in range(3))
    old = Remembered(laid[0], laid[1], None, None, Place(starts, starts, slots, offsets=offsets))
    out = attend(q, k, v, None, None, old, None, keep=True)
    for b, (case, (s, n)) in enumerate(zip(cases, spans, strict=True)):
        assert torch.equal(out[offsets[b] : offsets[b + 1]], chunk([case], [s], n, 300, None)[0])
        last = range(max(0, s + n - slots), s + n)
        assert torch.equal(laid[0, [b * slots + p % slots for p in last]], case.k[last.start : last.stop])


@compiled
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("window", [None, 8, 100])
@pytest.mark.parametrize(("H", "G", "K"), SHAPES)
def test_float32_queries_over_pages(H: int, G: int, K: int, window: int | None, page: int, int8: bool) -> None:
    cases = [sequence(202, H, G, K, int8, seed) for seed in range(len(RAGGED))]
    packed = in_float32(Packed(cases, RAGGED, window, page))
    out, entries = packed.run(keep=True)
    expected, expected_entries = packed.run(twin=True, keep=True)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(entries, expected_entries, strict=True))
    offsets = packed.place.offsets.tolist()
    for b, span in enumerate(RAGGED):
        alone = in_float32(Packed(cases[b : b + 1], [span], window, page)).run()[0]
        assert torch.equal(out[offsets[b] : offsets[b + 1]], alone), span


def in_float32(packed: Packed) -> Packed:
    packed.q = packed.q.float() / 3  # not a bfloat16 number
    packed.new = [t.float() if t.is_floating_point() else t for t in packed.new]
    packed.entries = [t.float() if t.is_floating_point() else t for t in packed.entries]
    return packed
