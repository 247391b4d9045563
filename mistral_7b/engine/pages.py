"""KV pages: allocation, reference counts and the prefix cache.

    page    free   ->  held by 1 or more sequences  ->  free: contents undefined
                                  |   ^
                                  v   | found again by its key
                              idle: held by no sequence, and still the keys and values of a known prefix

A full page gets a key, a hash of its tokens and of the key of the page before it: a key identifies everything from
the first token on. A sequence with the same prefix finds the page by its key and shares it. When no page is free,
the idle page that was used least recently is reused.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch

from ..cache.entries import Entries, blank_entries

Key = bytes


def first_key(*parts: str | tuple[str | None, str] | None) -> Key:
    """The key before the first page; it separates what must never be shared (tenants, adapters)."""
    return hashlib.sha256(repr(parts).encode()).digest()


def next_key(before: Key, tokens: Sequence[int]) -> Key:
    """The key of a page of `tokens` after the page of key `before`: SHA-256, which cannot be forged."""
    return hashlib.sha256(before + array("I", tokens).tobytes()).digest()


class PagePool:
    """`n_pages` pages of `page` tokens each, for all layers of a model.

    layers[n] holds keys and values of layer n, (n_pages + 1, page, G, K), in int8 their scales too. The last
    page belongs to no sequence: it takes writes that are never read.
    """

    def __init__(
        self, n_layers: int, n_kv_heads: int, head_dim: int, n_pages: int, page: int,
        *, dtype: torch.dtype, device: torch.device | str = "cpu", int8: bool = False,
    ) -> None:  # fmt: skip
        self.n_pages, self.page, self.dtype, self.int8 = n_pages, page, dtype, int8
        self.layers: list[Entries] = [
            blank_entries((n_pages + 1, page, n_kv_heads, head_dim), dtype, torch.device(device), int8)
            for _ in range(n_layers)
        ]
        self.scratch = n_pages
        self.holders = [0] * n_pages  # how many sequences hold each page
        self._free = list(range(n_pages - 1, -1, -1))  # a stack
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self.page_of: dict[Key, int] = {}  # of the prefix cache, in order of registration
        self._key_of: dict[int, Key] = {}
        self.copies: list[tuple[int, int]] | None = None  # since the last step, where other ranks repeat them

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        """Pages that some sequence holds."""
        return self.n_pages - self.available

    def take(self) -> int:
        """Allocate a page, with undefined contents. One must be `available`."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            del self.page_of[self._key_of.pop(page)]
        self.holders[page] = 1
        return page

    def share(self, page: int) -> int:
        """Count one more holder of a page, and return it."""
        if self.holders[page] == 0:
            del self._idle[page]
        self.holders[page] += 1
        return page

    def release(self, pages: Iterable[int]) -> None:
        """Count one holder fewer of each page. Of pages released together, the first is reused first."""
        for page in pages:
            assert self.holders[page] > 0, "a released page has no holder"
            self.holders[page] -= 1
            if self.holders[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def register(self, page: int, key: Key) -> None:
        """Enter a full page into the prefix cache. If the key is known, its first page keeps it."""
        if key not in self.page_of and page not in self._key_of:
            self.page_of[key], self._key_of[page] = page, key

    def find(self, key: Key) -> int | None:
        """The page of this key; None if it is not cached."""
        return self.page_of.get(key)

    def is_idle(self, page: int) -> bool:
        """Whether no sequence holds the page."""
        return self.holders[page] == 0

    def copy(self, source: int) -> int:
        """Allocate a copy of `source`. One page must be `available`."""
        target = self.take()
        self.copy_contents(source, target)
        if self.copies is not None:
            self.copies.append((source, target))
        return target

    def copy_contents(self, source: int, target: int) -> None:
        """Copy the keys and values of a page."""
        for entries in self.layers:
            for t in entries:
                t[target] = t[source]

    def forget(self) -> None:
        """Empty the prefix cache: every idle page becomes free."""
        for page in [p for p in self._key_of if p in self._idle]:
            del self._idle[page], self.page_of[self._key_of.pop(page)]
            self._free.append(page)

    def check(self, holders: Iterable[Iterable[int]]) -> None:
        """AssertionError unless every page is free, idle, or held by exactly these holders."""
        counts = [0] * self.n_pages
        for pages in holders:
            for page in pages:
                counts[page] += 1
        assert counts == self.holders, "reference counts disagree with the sequences"
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free), "a page is free twice"
        assert not free & idle, "a page is free and idle"
        assert free | idle == {p for p, n in enumerate(counts) if n == 0}, "a page is lost"
        assert idle <= set(self._key_of), "an idle page has no key"
        assert not free & set(self._key_of), "a free page has a key"
        assert {k: p for p, k in self._key_of.items()} == self.page_of, "keys and pages disagree"
