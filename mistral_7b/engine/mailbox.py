"""Hands a request's pieces from the engine's thread to the coroutine that reads them.

engine's thread     deliver ... deliver     wake, once a step for each event loop
event loop                                  notify -> wait returns -> take
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress

from .completion import TextPiece


class Mailbox:
    """Pieces of one request that its coroutine has not taken yet. Made in the coroutine's event loop."""

    def __init__(self) -> None:
        self.pieces: deque[TextPiece] = deque()
        self.loop = asyncio.get_running_loop()
        self.throttled = False  # whether only the request's end wakes the coroutine, until a timer expires
        self.ended = False
        self._event = asyncio.Event()

    def deliver(self, pieces: Sequence[TextPiece], ended: bool) -> bool:
        """Add pieces, in the engine's thread; return whether the coroutine is to be woken."""
        self.pieces.extend(pieces)
        self.ended = ended
        return ended or not self.throttled  # a throttled coroutine looks for pieces when its timer expires

    def take(self) -> list[TextPiece]:
        """Remove the pieces, joined into one for each completion."""
        taken: dict[int, list[TextPiece]] = {}
        for _ in range(len(self.pieces)):  # the engine's thread may append meanwhile
            piece = self.pieces.popleft()
            taken.setdefault(piece.index, []).append(piece)
        return [TextPiece.joined(pieces) for pieces in taken.values()]

    def notify(self) -> None:
        """Wake the coroutine, unless it is throttled and the request has not ended."""
        if self.ended or not self.throttled:
            self._event.set()

    async def wait(self, interval: float) -> None:
        """Wait for the request's end, or for pieces at the next multiple of `interval` seconds; 0: at once."""
        self._event.clear()
        if self.ended:
            return
        if interval > 0:
            self.throttled = True
            timer = self.loop.call_at((self.loop.time() // interval + 1) * interval, self._expire)
        elif self.pieces:
            return
        try:
            await self._event.wait()
        finally:
            if interval > 0:
                timer.cancel()
                self.throttled = False

    def _expire(self) -> None:
        self.throttled = False
        if self.pieces:
            self._event.set()


def wake(mailboxes: Iterable[Mailbox]) -> None:
    """Notify mailboxes from the engine's thread, with one call into each event loop."""
    loops: dict[asyncio.AbstractEventLoop, list[Mailbox]] = {}
    for mailbox in mailboxes:
        loops.setdefault(mailbox.loop, []).append(mailbox)
    for loop, own in loops.items():
        with suppress(RuntimeError):  # the loop is closed: no coroutine waits in it
            loop.call_soon_threadsafe(_notify_all, own)


def _notify_all(mailboxes: Sequence[Mailbox]) -> None:
    for mailbox in mailboxes:
        mailbox.notify()
