"""Limits how many grammars compile at once, so that slow ones do not delay ordinary ones.

    new grammar -- waits its turn --> quick, for TIME_SLICE ------------------------> compiled
                                        `-- not ready --> suspended --> slow -------^

An ordinary grammar compiles in milliseconds. It waits at most TIME_SLICE for each grammar ahead of it, because a
grammar that takes longer is suspended (SIGSTOP) and later runs to its end among a few other slow ones. Only slow
grammars can use much memory, and only few of them run at once.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from ...errors import AbandonedError, QueueFullError
from .processes import GrammarProcess

TIME_SLICE = 0.25  # seconds that a new grammar compiles before it is suspended
POLL_INTERVAL = 0.1  # seconds between two checks of a waiting request
MAX_WAITING = 32  # grammars waiting for their first turn; one more is refused
MAX_SUSPENDED = 16  # suspended grammars; one more is refused
QUEUE_TIMEOUT = 30.0  # seconds that a grammar may wait for its first turn, or stay suspended
Disconnected = threading.Event | None  # set when the client has disconnected


class CompileQueue:
    """The processes that compile or wait to. Call every method with the lock of `changed` held."""

    def __init__(self, cpus: int) -> None:
        self.max_slow = max(1, cpus // 4)
        self.max_quick = max(2, cpus - self.max_slow)
        self.changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._quick: list[GrammarProcess] = []
        self._slow: list[GrammarProcess] = []
        self._suspended: deque[GrammarProcess] = deque()

    def wait_for_turn(
        self, find: Callable[[], GrammarProcess | None], disconnected: Disconnected
    ) -> GrammarProcess | None:
        """Wait until `find` returns a process, or the caller may start one and `add` it (None).

        Raises QueueFullError if too many wait, or after QUEUE_TIMEOUT; AbandonedError when `disconnected` is set.
        """
        if len(self._waiting) >= MAX_WAITING and find() is None:
            raise QueueFullError(
                f"{MAX_WAITING} grammars wait to be compiled; no more are accepted", hint="try again later"
            )
        ticket, end = object(), time.monotonic() + QUEUE_TIMEOUT
        self._waiting.append(ticket)
        try:
            while (found := find()) is None:
                self._update()
                if self._waiting[0] is ticket and len(self._quick) < self.max_quick:
                    break
                raise_if_disconnected(disconnected)
                if time.monotonic() > end:
                    raise QueueFullError(
                        f"the grammar's turn to be compiled did not come in {QUEUE_TIMEOUT:g} s",
                        hint="try again later",
                    )
                self.changed.wait(POLL_INTERVAL)
            return found
        finally:
            self._waiting.remove(ticket)
            self.changed.notify_all()

    def add(self, process: GrammarProcess) -> None:
        """Register a process that has started to compile."""
        process.turn_started = time.monotonic()
        self._quick.append(process)

    def enforce_turn(self, process: GrammarProcess) -> None:
        """Suspend or end a process that has used up its turn. Requests that wait for it call this regularly."""
        now = time.monotonic()
        if process in self._quick and now > process.turn_started + TIME_SLICE:
            self._quick.remove(process)
            self.changed.notify_all()
            if len(self._suspended) >= MAX_SUSPENDED:
                process.kill(QueueFullError(
                    f"{MAX_SUSPENDED} grammars that take long to compile wait already; no more are accepted",
                    hint="try again later, or simplify the grammar",
                ))  # fmt: skip
            else:
                process.turn_started = now
                process.suspend()
                self._suspended.append(process)
        elif process in self._suspended and now > process.turn_started + QUEUE_TIMEOUT:
            process.kill(QueueFullError(
                f"the grammar takes long to compile, and others before it took {QUEUE_TIMEOUT:g} s",
                hint="try again later, or simplify the grammar",
            ))  # fmt: skip
        self._update()

    def remove(self, process: GrammarProcess) -> None:
        """Forget a process that has compiled or ended."""
        for processes in (self._quick, self._slow, self._suspended):
            if process in processes:
                processes.remove(process)
                self.changed.notify_all()
        self._update()

    def is_compiling(self, process: GrammarProcess) -> bool:
        """Whether a process compiles, or is suspended while it does."""
        return process in self._quick or process in self._slow or process in self._suspended

    def _update(self) -> None:
        """Forget processes that have ended, and resume suspended ones while a slow slot is free."""
        before = len(self._quick)
        self._quick = [process for process in self._quick if not process.terminated]
        self._slow = [process for process in self._slow if not process.terminated]
        self._suspended = deque(process for process in self._suspended if not process.terminated)
        while self._suspended and len(self._slow) < self.max_slow:
            self._slow.append(self._suspended.popleft())
            self._slow[-1].resume()
        if len(self._quick) < before:
            self.changed.notify_all()


def raise_if_disconnected(disconnected: Disconnected) -> None:
    """Raise AbandonedError if the client has disconnected."""
    if disconnected is not None and disconnected.is_set():
        raise AbandonedError("the client has disconnected")
