"""Pages under a sliding window: which are needed, and how many at a time.

pages   0  1  2 [3  4  5] 6 ...      tokens up to the end of page 5 are computed, W = 2.5 pages
                 |        a later query sees keys from page 3 on: 0 to 2 are freed, and a cached prefix
                 first    of 6 pages needs only 3, 4 and 5
"""

from __future__ import annotations

from collections.abc import Callable

from .config import EngineConfig


def most_pages(tokens: int, window: int | None, config: EngineConfig) -> int:
    """The largest number of pages that a sequence of `tokens` tokens holds at a time."""
    page = config.page_size
    whole = -(-tokens // page)
    if window is None:
        return whole
    return min(whole, -(-(window + config.max_batch_tokens) // page) + 1)


def first_visible(position: int, window: int | None, page: int) -> int:
    """The first page that a query at this position or later can see; pages hold `page` tokens."""
    return 0 if window is None else max(0, position - window + 1) // page


def usable_prefix(most: int, cached: Callable[[int], bool], window: int | None, page: int) -> int:
    """The length in pages of the longest prefix, of at most `most`, whose visible pages are all cached."""
    best = run = 0  # run: consecutive cached pages
    for i in range(most):
        run = run + 1 if cached(i) else 0
        if run and run >= i + 1 - first_visible((i + 1) * page, window, page):
            best = i + 1
        elif window is None:
            break
    return best
