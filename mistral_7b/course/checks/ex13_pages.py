"""Pages: a chain of hashes, reference counts, and which page is reused first."""

from __future__ import annotations

from typing import Any

import torch

from mistral_7b.course.compare import equal, expect

IDLE = "a released page with a key is idle: put it in self._idle, where it can be found or reused"


def check(ex: Any) -> None:
    _check_keys(ex)
    pool = _pool(ex)
    equal(
        [pool.take() for _ in range(3)],
        [0, 1, 2],
        "the first three pages that take() returns",
        {(3, 2, 1): "free pages are a stack: pop() takes the last of self._free"},
    )
    equal(
        pool.holders,
        [1, 1, 1, 0],
        "the holders after taking three of four pages",
        {(0, 0, 0, 0): "take() counts the taker as the page's holder"},
    )
    equal(pool.share(1), 1, "share(1)", {None: "share returns the page"})
    equal(pool.holders[1], 2, "the holders of a page that is shared")
    pool.release([1])
    equal(
        pool.available,
        1,
        "available pages after one of two holders released a page",
        {2: "a page is freed with its last holder, not before"},
    )
    pool.release([0, 2])
    equal(pool.available, 3, "available pages after two pages were released")
    equal(
        pool.take(),
        2,
        "the page that is taken after pages 0 and 2 were released",
        {3: "a released page without a key goes on top of self._free", 0: "pages are released in the order given"},
    )
    _accounted(pool, [[1], [2]])
    _check_prefixes(ex)


def _pool(ex: Any) -> Any:
    return ex.PagePool(1, 1, 2, 4, 4, dtype=torch.float32)


def _accounted(pool: Any, holders: list[list[int]]) -> None:
    try:
        pool.check(holders)
    except AssertionError as error:
        expect(False, f"the pages are not accounted for: {error}")


def _check_keys(ex: Any) -> None:
    start = b"\0" * 32
    key = ex.next_key(start, [1, 23])
    expect(
        isinstance(key, bytes),
        f"next_key returns a {type(key).__name__}, expected bytes",
        "use hashlib.sha256(...).digest()",
    )
    equal(ex.next_key(start, [1, 23]), key, "the key of the same tokens, a second time")
    expect(
        ex.next_key(start, [23, 1]) != key,
        "tokens 1, 23 and 23, 1 have the same key",
        "the order of the tokens is lost",
    )
    expect(
        ex.next_key(start, [12, 3]) != key,
        "tokens 1, 23 and 12, 3 have the same key",
        "the digits are joined without a separator; hash fixed-size integers",
    )
    expect(
        ex.next_key(start, [256 + 1, 23]) != key,
        "tokens 1, 23 and 257, 23 have the same key",
        "ids do not fit one byte",
    )
    expect(
        ex.next_key(key, [1, 23]) != key,
        "a page's key does not depend on the page before it",
        "hash the key before together with the tokens: keys and values depend on the whole prefix",
    )


def _check_prefixes(ex: Any) -> None:
    pool, keys = _pool(ex), [bytes([i]) * 32 for i in range(4)]
    pages = [pool.take() for _ in range(3)]
    for page, key in zip(pages[:2], keys, strict=False):
        pool.register(page, key)
    equal(
        pool.find(keys[0]),
        0,
        "find(key) of a page that was registered",
        {None: "register enters the page in self.page_of and self._key_of"},
    )
    pool.register(2, keys[0])
    equal(
        pool.find(keys[0]),
        0,
        "find(key) after a second page was registered with the same key",
        {2: "the first page of a key keeps it: others hold it already"},
    )
    pool.release(pages)
    equal(pool.available, 4, "available pages after all were released", {2: IDLE})
    equal(
        pool.find(keys[1]),
        1,
        "find(key) of a released page",
        {None: "a released page keeps its key until it is reused"},
    )
    equal(
        sorted(pool._idle),
        [0, 1],
        "the idle pages",
        {(): IDLE, (0, 1, 2): "a page without a key is free, not idle"},
    )
    pool.share(0)
    equal(
        sorted(pool._idle),
        [1],
        "the idle pages after page 0 was shared",
        {(0, 1): "an idle page that is shared is held again: remove it from self._idle"},
    )
    pool.release([0])
    taken = [pool.take(), pool.take(), pool.take()]
    equal(
        taken[:2],
        [2, 3],
        "the two pages taken while pages 2 and 3 are free and 0 and 1 idle",
        {(0, 1): "free pages are taken before idle ones", (1, 0): "free pages are taken before idle ones"},
    )
    equal(
        taken[2],
        1,
        "the idle page that is reused: page 0 was used after page 1",
        {0: "the least recently used page is reused first: popitem(last=False)"},
    )
    equal(
        pool.find(keys[1]),
        None,
        "find(key) after its page was reused",
        {1: "a reused page loses its key: delete it from self.page_of and self._key_of"},
    )
    _accounted(pool, [[2], [3], [1]])
