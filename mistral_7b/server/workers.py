"""Worker threads that accounts share: one account's long queue of slow functions delays no other's.

alice    f5 f6 f7 ...    8 running
bob      g1              0 running     <- next: the account that has the fewest running
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, TypeVar

from .http.limits import Account

Result = TypeVar("Result")

# The account that the current HTTP request is counted in; the guard sets it.
current_account: ContextVar[Account] = ContextVar("current_account", default=Account())  # noqa: B039


class Workers:
    """Runs functions on `threads` threads. For one event loop's thread only.

    If there are several accounts, each gets at most three quarters of the threads, so that another's function
    never waits for slow ones to end.
    """

    def __init__(self, threads: int, accounts: int) -> None:
        self._pool = ThreadPoolExecutor(threads, "read")
        self._threads = threads
        self._most = threads if accounts == 1 else max(1, 3 * threads // 4)  # for one account
        self._running: Counter[str] = Counter()
        self._waiting: dict[str, deque[tuple[Callable[[], Any], asyncio.Future[Any]]]] = {}

    async def run(self, function: Callable[[], Result]) -> Result:
        """Return what the function returns, for the current account. Raises what it raises."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(current_account.get().name, deque()).append((function, future))
        self._start()
        try:
            return await future
        finally:
            del future  # an error's traceback has this frame, and the future the error: a cycle

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        while self._running.total() < self._threads:
            ready = [name for name in self._waiting if self._running[name] < self._most]
            if not ready:
                return
            name = min(ready, key=self._running.__getitem__)
            function, future = self._waiting[name].popleft()
            if not self._waiting[name]:
                del self._waiting[name]
            self._running[name] += 1
            loop.run_in_executor(self._pool, function).add_done_callback(
                lambda done, name=name, future=future: self._end(name, future, done)  # type: ignore[misc]
            )

    def _end(self, name: str, future: asyncio.Future[Any], done: asyncio.Future[Any]) -> None:
        self._running[name] -= 1
        if not self._running[name]:
            del self._running[name]
        self._start()
        if future.cancelled():
            return
        if (error := done.exception()) is not None:
            future.set_exception(error)
        else:
            future.set_result(done.result())
