"""The cache of one step: packed tokens of many sequences, whose keys and values are in pages.

    tokens   a a a b c c          (N,) new tokens of sequences a, b, c: 3, 1 and 2
    offsets  0     3 4   6        where each sequence's tokens begin (cu_seqlens)
    table    [[7, 2], [5, 0], [1, 4]]   block table: the page of each sequence's positions p // size

Visibility is by position, as in every cache, and never crosses sequences.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..attention import Band, banded_attention, bands
from ..cache import KernelCache, KeysAndValues
from ..cache.entries import Entries, compressed, expanded, four
from ..errors import CacheError
from ..kernels.attend import Place, Remembered, attend
from ..kernels.backend import PAGED_ATTENTION, Backend, uses
from ..sampling.choice import to_device
from .pages import PagePool


class Paged(Protocol):
    """A sequence with pages, such as a SequenceState: position p is in pages[p // size].

    It holds pages[first:stop]; keys and values of `computed` positions are stored.
    """

    pages: np.ndarray
    first: int
    stop: int
    computed: int


@dataclass
class PaddingRow:
    """A row of no request, which pads a step: it has no cached positions; its keys go to the scratch page."""

    pages: np.ndarray
    first: int = 0
    stop: int = 1
    computed: int = 0


Parts = Sequence[tuple[Paged, int]]


class VisibleRows(NamedTuple):
    """Where the keys that a sequence's new tokens see are stored: rows of the flattened pages."""

    own: slice  # its new tokens in the batch
    new: Tensor | slice  # rows of these tokens
    runs: list[slice]  # runs of consecutive rows of all visible keys, in order of position
    plan: tuple[Band, ...]


class PagedBatch(KernelCache):
    """The cache of sequences with the number of tokens that each feeds. Their pages must be allocated.

    `columns` is the width of the block table; 0 makes it as wide as needed. `refill` reuses the tensors.
    """

    def __init__(self, pool: PagePool, window: int | None, parts: Parts, columns: int = 0) -> None:
        self.pool, self.window = pool, window
        self.layers = [_PagedMemory(self, entries) for entries in pool.layers]
        self.device = pool.layers[0][0].device
        arrays = self._lay_out(parts, columns or max(s.stop for s, _ in parts))
        self._tensors = [to_device(array, self.device) for array in arrays]
        self.table, start, held, offsets, self.positions = self._tensors
        self._place = Place(start, held, slots=1, table=self.table, page=pool.page, offsets=offsets)

    def refill(self, parts: Parts) -> None:
        """Replace the sequences by as many others with equally many tokens, in the same tensors."""
        for t, array in zip(self._tensors, self._lay_out(parts, self.table.shape[1]), strict=True):
            t.copy_(to_device(array, self.device), non_blocking=True)

    def _lay_out(self, parts: Parts, columns: int) -> list[np.ndarray]:
        """Block table, start, held, offsets and positions, on the host."""
        table = np.zeros((len(parts), columns), dtype=np.int64)
        for row, (s, _) in zip(table, parts, strict=True):
            row[: s.stop] = s.pages[: s.stop]
        self.runs = [(s.computed, s.computed - s.first * self.pool.page, n) for s, n in parts]
        self._pages = table
        self._visible: list[VisibleRows] = []
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
            raise CacheError(f"this batch takes {len(self.positions)} packed tokens, not {tuple(tokens.shape)}")
        return self.positions

    @property
    def visible_rows(self) -> list[VisibleRows]:
        """The visible rows of each sequence, for attention without a kernel; computed once for all layers."""
        if not self._visible:
            at, size = 0, self.pool.page
            for pages, (start, before, n) in zip(self._pages, self.runs, strict=True):
                first = start - before if self.window is None else max(start - before, start + 1 - self.window)
                p = np.arange(first, start + n)
                rows = pages[p // size] * size + p % size
                cuts = np.flatnonzero(np.diff(rows) != 1) + 1
                runs = [slice(int(run[0]), int(run[-1]) + 1) for run in np.split(rows, cuts)]
                last = runs[-1].stop
                new = to_device(rows[-n:], self.device) if n > last - runs[-1].start else slice(last - n, last)
                positions = to_device(p, self.device)
                plan = bands(positions[-n:], positions, self.window, consecutive=True)
                self._visible.append(VisibleRows(slice(at, at + n), new, runs, plan))
                at += n
        return self._visible


class _PagedMemory(KeysAndValues):
    """One layer of the pages: entries (pages, page, G, K)."""

    def __init__(self, batch: PagedBatch, entries: Entries) -> None:
        # A strong reference would be a cycle, which keeps each step's tensors until garbage collection.
        self.batch, self.entries = weakref.proxy(batch), entries

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (N, H, K), (N, G, K)
        batch = self.batch
        new = compressed(k, v, batch.pool.int8)
        if not uses(Backend.PYTORCH, PAGED_ATTENTION, q):
            old = Remembered(*four(self.entries), batch.place)
            return attend(q, *four(new), old, batch.window, keep=True)
        held = tuple(t.flatten(0, 1) for t in self.entries)  # (rows, G, K)
        outs = []
        for own, rows, runs, plan in batch.visible_rows:
            for t, fresh in zip(held, new, strict=True):
                t[rows] = fresh[own]
            seen = [[t[run] for run in runs] for t in held]
            outs.append(banded_attention(q[own], *expanded(tuple(map(_joined, seen)), q.dtype), plan))
        return _joined(outs)


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts concatenated; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
