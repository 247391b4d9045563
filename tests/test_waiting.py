"""Waits and limits on durations in tests: a pause is forgiven, and code that is always slow is not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import waiting
from waiting import less, soon, until


def clock(*ticks: float) -> Callable[[], float]:
    """A clock that shows these times, one after the other."""
    times = iter(ticks)
    return lambda: next(times)


def test_one_attempt_below_the_limit_is_enough() -> None:
    done: list[int] = []
    soon(1, lambda: done.append(1), clock=clock(0, 3, 10, 10.5))
    assert len(done) == 2
    less(1, clock(3, 2, 0.9))


def test_what_is_always_slow_fails_with_its_figures() -> None:
    with pytest.raises(AssertionError, match=r"never less than 1: 1, 2, 3$"):
        less(1, clock(1, 2, 3), attempts=3)
    with pytest.raises(AssertionError, match="2, 2"):
        soon(1, lambda: None, clock=clock(0, 2, 2, 4), attempts=2)


def test_a_failed_action_is_not_repeated() -> None:
    done: list[int] = []
    with pytest.raises(ZeroDivisionError):
        soon(1, lambda: done.append(1) or 1 // 0)
    assert done == [1]


def test_a_pause_of_the_process_ends_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def times() -> Iterator[float]:
        yield from (0.0, 60.0)  # it was paused for a minute
        now = 60.0
        while True:
            yield (now := now + 0.01)

    now = times()
    monkeypatch.setattr(waiting.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(waiting.time, "monotonic", lambda: next(now))
    looks = iter([False] * 5 + [True])
    assert until(lambda: next(looks), 1)
    assert not until(lambda: False, 1)


def test_a_wait_ends() -> None:
    began = time.monotonic()
    assert not until(lambda: False, 0.02)
    assert time.monotonic() - began >= 0.02
