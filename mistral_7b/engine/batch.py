"""The cache of one step: packed tokens of many sequences, each of which remembers in pages of its own.

    tokens   a a a b c c          (N,) of sequences a, b, c: 3, 1 and 2 new ones
    offsets  0     3 4   6        where those of each begin
    table    [[7, 2], [5, 0], [1, 4]]   page p // size of each sequence's position p

The rule of what is visible is that of every cache: by position, and never across sequences.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..attention import banded_attention, bands
from ..cache import Entries, KernelCache, KeysAndValues, compressed, expanded, four
from ..errors import CacheError
from ..kernels.attend import Place, Remembered, attend
from ..kernels.backend import PAGED_ATTENTION, Backend, uses
from ..sampling import put
from .pages import PagePool


class Paged(Protocol):
    """Whose keys and values lie in pages: position p in pages[p // size], of which `first` to `stop` are there.

    `computed` positions are remembered. A SequenceState is such.
    """

    pages: np.ndarray
    first: int
    stop: int
    computed: int


@dataclass
class PaddingRow:
    """A row that belongs to no request: it remembers nothing, and writes to a page that no request has."""

    pages: np.ndarray
    first: int = 0
    stop: int = 1
    computed: int = 0


Parts = Sequence[tuple[Paged, int]]


class PagedBatch(KernelCache):
    """Sequences with the number of tokens that each feeds; their pages must be there.

    Its tensors stay in place when it is given others: a table of so many `columns` then, if not only as wide as it
    has to be.
    """

    def __init__(self, pool: PagePool, window: int | None, parts: Parts, columns: int = 0) -> None:
        self.pool, self.window = pool, window
        self.layers = [_PagedMemory(self, entries) for entries in pool.layers]
        self.device = pool.layers[0][0].device
        arrays = self._lay_out(parts, columns or max(s.stop for s, _ in parts))
        self.table, start, held, offsets, self.positions = self._tensors = [put(a, self.device) for a in arrays]
        self._place = Place(start, held, slots=1, table=self.table, page=pool.page, offsets=offsets)

    def refill(self, parts: Parts) -> None:
        """Take others, as many and with as many tokens, in the same tensors."""
        for t, array in zip(self._tensors, self._lay_out(parts, self.table.shape[1]), strict=True):
            t.copy_(put(array, self.device), non_blocking=True)

    def _lay_out(self, parts: Parts, columns: int) -> list[np.ndarray]:
        """Table, start, held, offsets and positions on the host."""
        table = np.zeros((len(parts), columns), dtype=np.int64)
        for row, (s, _) in zip(table, parts, strict=True):
            row[: s.stop] = s.pages[: s.stop]
        self.runs = [(s.computed, s.computed - s.first * self.pool.page, n) for s, n in parts]
        start, held, lengths = zip(*self.runs, strict=True)
        positions = [np.arange(first, first + n) for first, _, n in self.runs]
        return [
            table,
            np.array(start),
            np.array(held),
            np.array([0, *accumulate(lengths)]),
            np.concatenate(positions),
        ]

    @property
    def place(self) -> Place:
        return self._place

    @property
    def dtype(self) -> torch.dtype:
        return self.pool.dtype

    def writable(self) -> PagedBatch:
        return self

    def extend(self, tokens: Tensor, sequence_ids: Tensor | None = None) -> Tensor:
        if tokens.shape != self.positions.shape or sequence_ids is not None:
            raise CacheError(
                f"this batch takes its {len(self.positions)} packed tokens, not {tuple(tokens.shape)}"
            )
        return self.positions

    def rows(self, b: int, first: int, last: int) -> Tensor:
        """The rows of pages, page * size + place, in which positions first..last of sequence b lie."""
        p = torch.arange(first, last, device=self.table.device)
        return self.table[b, p // self.pool.page] * self.pool.page + p % self.pool.page


class _PagedMemory(KeysAndValues):
    """One layer of the pages: entries (pages, page, G, K)."""

    def __init__(self, batch: PagedBatch, entries: Entries) -> None:
        # Weakly, as the batch has its layers: a ring would keep each step's tensors until the collector comes.
        self.batch, self.entries = weakref.proxy(batch), entries

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (N, H, K), (N, G, K)
        batch = self.batch
        new = compressed(k, v, batch.pool.int8)
        if not uses(Backend.PYTORCH, PAGED_ATTENTION, q):
            old = Remembered(*four(self.entries), batch.place)
            return attend(q, *four(new), old, batch.window, keep=True)
        held = tuple(t.flatten(0, 1) for t in self.entries)  # (rows, G, K)
        out, at = torch.empty_like(q), 0
        for b, (start, before, n) in enumerate(batch.runs):
            own = slice(at, at + n)
            rows = batch.rows(b, start - before, start + n)
            for t, fresh in zip(held, new, strict=True):
                t[rows[before:]] = fresh[own]
            keys, values = expanded(tuple(t[rows] for t in held), q.dtype)
            p = torch.arange(start - before, start + n, device=q.device)
            plan = bands(p[before:], p, batch.window, consecutive=True)
            out[own] = banded_attention(q[own], keys, values, plan)
            at += n
        return out
