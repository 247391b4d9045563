"""PagePool against a model of it: who holds what, what is found, what is thrown out, what lies in the pages."""

from __future__ import annotations

import pytest
import torch
from example_counts import SOME
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mistral_7b.engine.pages import Key, PagePool, first_key, next_key


class Pages(RuleBasedStateMachine):
    """The model: pages' holders, keys and marks in plain lists and dictionaries, written from the docstrings."""

    @initialize(n=st.integers(1, 5), int8=st.booleans())
    def begin(self, n: int, int8: bool) -> None:
        self.pool = PagePool(2, 1, 4, n, 3, dtype=torch.float32, int8=int8)
        self.held: list[int] = []  # one entry for each holder
        self.idle: list[int] = []  # the one used longest ago first
        self.keys: dict[Key, int] = {}
        self.marks: dict[int, int] = {}  # what was written into a page
        self.made = 0

    def mark(self, page: int) -> None:
        self.made += 1
        self.marks[page] = self.made
        for entries in self.pool.layers:
            for t in entries:
                t[page] = self.made % 100

    @precondition(lambda self: self.pool.available)
    @rule()
    def take(self) -> None:
        free = set(range(self.pool.n_pages)) - set(self.held) - set(self.idle)
        page = self.pool.take()
        if free:
            assert page in free
        else:
            assert page == self.idle.pop(0), "not the page that was used longest ago"
            self.keys = {k: p for k, p in self.keys.items() if p != page}
        self.held.append(page)
        self.mark(page)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 99))
    def share(self, which: int) -> None:
        page = self.held[which % len(self.held)]
        assert self.pool.share(page) == page
        self.held.append(page)

    @precondition(lambda self: self.keys)
    @rule(which=st.integers(0, 99))
    def find(self, which: int) -> None:
        key = list(self.keys)[which % len(self.keys)]
        page = self.pool.find(key)
        assert page == self.keys[key]
        assert page is not None
        assert self.pool.is_idle(page) == (page in self.idle)
        self.pool.share(page)
        if page in self.idle:
            self.idle.remove(page)
        self.held.append(page)

    @precondition(lambda self: self.held)
    @rule(which=st.lists(st.integers(0, 99), min_size=1, max_size=4))
    def release(self, which: list[int]) -> None:
        given = [self.held.pop(i % len(self.held)) for i in which if self.held]
        self.pool.release(given)
        for i, page in enumerate(given):
            if page not in self.held and page not in given[i + 1 :] and page in self.keys.values():
                self.idle.append(page)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 99), name=st.integers(0, 5))
    def know(self, which: int, name: int) -> None:
        page, key = self.held[which % len(self.held)], first_key(str(name))
        self.pool.register(page, key)
        if key not in self.keys and page not in self.keys.values():
            self.keys[key] = page

    @precondition(lambda self: self.pool.available)
    @rule(name=st.integers(0, 5))
    def leave(self, name: int) -> None:
        """A page is filled, made known and given back: what a request leaves behind."""
        self.take()
        self.know(len(self.held) - 1, name)
        self.release([len(self.held) - 1])

    @precondition(lambda self: self.held and self.pool.available)
    @rule(which=st.integers(0, 99))
    def copy(self, which: int) -> None:
        source = self.held[which % len(self.held)]
        had = self.marks[source]
        free = set(range(self.pool.n_pages)) - set(self.held) - set(self.idle)
        page = self.pool.copy(source)
        if page not in free:
            assert page == self.idle.pop(0)
            self.keys = {k: p for k, p in self.keys.items() if p != page}
        assert page not in self.held
        self.held.append(page)
        self.marks[page] = had

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        self.keys = {k: p for k, p in self.keys.items() if p not in self.idle}
        self.idle = []

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check([[page] for page in self.held])
        assert self.pool.held == len(set(self.held))
        assert self.pool.available == self.pool.n_pages - len(set(self.held))
        assert {key: self.pool.find(key) for key in self.keys} == self.keys
        assert all(self.pool.find(first_key(str(i))) == self.keys.get(first_key(str(i))) for i in range(6))
        for page in {*self.held, *self.idle}:
            for entries in self.pool.layers:
                assert all(bool((t[page] == self.marks[page] % 100).all()) for t in entries)


TestPages = Pages.TestCase
TestPages.settings = settings(
    SOME, derandomize=True, stateful_step_count=30, suppress_health_check=list(HealthCheck)
)


def test_a_key_stands_for_everything_before_it() -> None:
    keys = set()
    for salt in (None, "a", "b", "('a',)"):
        for tokens in ([], [1], [1, 2], [2, 1], [1, 2, 3], [258], [1, 0], [0, 1]):
            key = first_key(salt)
            for at in range(0, len(tokens), 2):
                key = next_key(key, tokens[at : at + 2])
            keys.add(key)
    assert len(keys) == 4 * 8
    firsts = {first_key(*parts) for parts in (("a", None), (None, "a"), ("a",), ("a", "None"), ())}
    assert len(firsts) == 5
    assert next_key(next_key(first_key(), [1, 2]), [3]) != next_key(next_key(first_key(), [1]), [2, 3])


def test_check_finds_whatever_is_wrong() -> None:
    def pool() -> tuple[PagePool, int, int]:
        p = PagePool(1, 1, 2, 4, 2, dtype=torch.float32)
        a, b = p.take(), p.take()
        p.register(b, first_key())
        p.release([b])
        p.check([[a]])
        return p, a, b

    p, a, b = pool()
    with pytest.raises(AssertionError, match="reference counts"):
        p.check([])
    with pytest.raises(AssertionError, match="reference counts"):
        p.check([[a], [a]])
    p._free.append(p._free[0])
    with pytest.raises(AssertionError, match="free twice"):
        p.check([[a]])
    p, a, b = pool()
    p._free.pop()
    with pytest.raises(AssertionError, match="lost"):
        p.check([[a]])
    p, a, b = pool()
    p._free.append(b)
    with pytest.raises(AssertionError, match="free and idle"):
        p.check([[a]])
    p, a, b = pool()
    del p._key_of[b]
    with pytest.raises(AssertionError, match="no key"):
        p.check([[a]])
    p, a, b = pool()
    with pytest.raises(AssertionError, match="no holder"):
        p.release([b])
