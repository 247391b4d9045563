"""Which grammars are compiled at one time: about as many as there are CPUs, and none for long while others wait.

    a new one -- waits its turn --> QUICK for a moment ----------------------------> compiled
                                      `-- takes long --> stands still --> SLOW ------^

An ordinary grammar takes milliseconds, and waits for those before it for a moment each, however many of them take
seconds: these are stopped by then, and take turns of their own, one after the other. What has grown large is so in
few processes at once; those that stand still have run for a moment.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from ...errors import AbandonedError, QueueFullError
from .processes import GrammarProcess

MOMENT = 0.25  # seconds of QUICK
LOOK = 0.1  # seconds between two looks of a waiting request
WAITING = 32  # grammars that may wait to be begun, and
STANDING = 16  # that may stand still; one more is refused
WAIT = 30.0  # seconds that either may take
Gone = threading.Event | None  # set when the client has disconnected


class Turns:
    """Gives out turns to compile. Everything is called with the lock of `changed` held."""

    def __init__(self, cpus: int) -> None:
        self.slow_at_once = max(1, cpus // 4)
        self.quick_at_once = max(2, cpus - self.slow_at_once)
        self.changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._quick: list[GrammarProcess] = []
        self._slow: list[GrammarProcess] = []
        self._standing: deque[GrammarProcess] = deque()

    def wait(self, known: Callable[[], GrammarProcess | None], gone: Gone) -> GrammarProcess | None:
        """A process that `known` has meanwhile, or None: the turn has come to begin one, in `began`.

        Raises QueueFullError where too many wait, or the turn does not come; AbandonedError when `gone` is set.
        """
        if len(self._waiting) >= WAITING and known() is None:
            raise QueueFullError(
                f"{WAITING} grammars wait to be compiled, and no more may", hint="try again later"
            )
        ticket, end = object(), time.monotonic() + WAIT
        self._waiting.append(ticket)
        try:
            while (found := known()) is None:
                self._look()
                if self._waiting[0] is ticket and len(self._quick) < self.quick_at_once:
                    break
                check(gone)
                if time.monotonic() > end:
                    raise QueueFullError(
                        f"the grammar's turn to be compiled did not come in {WAIT:g} s", hint="try again later"
                    )
                self.changed.wait(LOOK)
            return found
        finally:
            self._waiting.remove(ticket)
            self.changed.notify_all()

    def began(self, process: GrammarProcess) -> None:
        """A process has begun to compile."""
        process.since = time.monotonic()
        self._quick.append(process)

    def tend(self, process: GrammarProcess) -> None:
        """See that one that compiles takes no more than its turn; its waiters call this now and then."""
        now = time.monotonic()
        if process in self._quick and now > process.since + MOMENT:
            self._quick.remove(process)
            self.changed.notify_all()
            if len(self._standing) >= STANDING:
                process.end(QueueFullError(
                    f"{STANDING} grammars that take long to compile wait already, and no more may",
                    hint="try again later, or make it simpler",
                ))  # fmt: skip
            else:
                process.since = now
                process.stop()
                self._standing.append(process)
        elif process in self._standing and now > process.since + WAIT:
            process.end(QueueFullError(
                f"the grammar takes long to compile, and others before it took {WAIT:g} s",
                hint="try again later, or make it simpler",
            ))  # fmt: skip
        self._look()

    def done(self, process: GrammarProcess) -> None:
        """It is compiled, or has ended."""
        for those in (self._quick, self._slow, self._standing):
            if process in those:
                those.remove(process)
                self.changed.notify_all()
        self._look()

    def compiles(self, process: GrammarProcess) -> bool:
        """Whether it has a turn, or waits for its second one."""
        return process in self._quick or process in self._slow or process in self._standing

    def _look(self) -> None:
        """Forget those that have ended, and let those that stand still run where there is room."""
        before = len(self._quick)
        self._quick = [process for process in self._quick if not process.over]
        self._slow = [process for process in self._slow if not process.over]
        self._standing = deque(process for process in self._standing if not process.over)
        while self._standing and len(self._slow) < self.slow_at_once:
            self._slow.append(self._standing.popleft())
            self._slow[-1].resume()
        if len(self._quick) < before:
            self.changed.notify_all()


def check(gone: Gone) -> None:
    """AbandonedError when the client has disconnected."""
    if gone is not None and gone.is_set():
        raise AbandonedError("the client has disconnected")
