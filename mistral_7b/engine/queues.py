"""The waiting sequences: a queue for each client, and how many tokens each client was served.

    client     served    waiting
    alice      51,200    a1 a2 a3 ...
    bob        51,170    b1              <- next: the client that was served the least

Fair queueing over tokens, as virtual token counters (Sheng et al., "Fairness in Serving Large Language Models",
OSDI 2024): each token computed for a client counts, and the client with the lowest count is next. A client that
arrives gets the lowest count of those present, or its own if that is higher: absence earns no credit and forgives
no debt. When no client is present, all counts are forgotten.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import QueueFullError
from .request import SequenceState

Rank = tuple[int, int, int]
MAX_ABSENT = 4096  # clients whose counts are kept while they are absent


@dataclass
class _Client:
    served: int
    present: int = 0  # its sequences that run or wait
    waiting: int = 0
    heap: list[tuple[Rank, SequenceState]] = field(default_factory=list)  # by rank; it may hold ended sequences
    ended: int = 0  # how many


def queue_full(waiting: int) -> QueueFullError:
    """The error of a request that may not wait."""
    return QueueFullError(f"the queue is full: {waiting} requests are waiting", hint="try again later")


class Queues:
    """Which sequences wait, by client. `waiting` counts them all."""

    def __init__(self) -> None:
        self.waiting = 0
        self._clients: dict[str, _Client] = {}
        self._served: dict[str, int] = {}  # of clients that are absent while others are present

    @property
    def contended(self) -> bool:
        """Whether more than one client has sequences."""
        return len(self._clients) > 1

    def enter(self, sequence: SequenceState) -> None:
        """Count a sequence that will run or wait as its client's."""
        name = sequence.request.client
        if (client := self._clients.get(name)) is None:
            lowest = min((c.served for c in self._clients.values()), default=0)
            client = self._clients[name] = _Client(max(lowest, self._served.pop(name, 0)))
        client.present += 1

    def leave(self, sequence: SequenceState) -> None:
        """Count one sequence fewer of its client."""
        client = self._clients[sequence.request.client]
        if sequence.waiting:
            self.discard(sequence)
            client.ended += 1
            if 2 * client.ended > len(client.heap):
                client.heap = [(rank, s) for rank, s in client.heap if not s.ended and s is not sequence]
                heapq.heapify(client.heap)
                client.ended = 0
        client.present -= 1
        if not client.present:
            del self._clients[sequence.request.client]
            if not self._clients or len(self._served) >= MAX_ABSENT:
                self._served.clear()
            else:
                self._served[sequence.request.client] = client.served

    def push(self, sequence: SequenceState) -> None:
        """Let a sequence wait."""
        client = self._clients[sequence.request.client]
        heapq.heappush(client.heap, (sequence.rank, sequence))
        self._count(sequence, 1)

    def hold(self, sequence: SequenceState) -> None:
        """Count a sequence as waiting that is not in its client's queue yet; `discard` ends it."""
        self._count(sequence, 1)

    def pop(self, sequence: SequenceState) -> None:
        """Remove the first sequence of its client's queue."""
        taken = heapq.heappop(self._clients[sequence.request.client].heap)[1]
        assert taken is sequence, "it is not the first of its queue"
        self._count(sequence, -1)

    def discard(self, sequence: SequenceState) -> None:
        """Count a held or ended sequence as waiting no longer. It stays in the heap until it is the first."""
        self._count(sequence, -1)

    def _count(self, sequence: SequenceState, n: int) -> None:
        self._clients[sequence.request.client].waiting += n
        self.waiting += n
        sequence.waiting = n > 0

    def heads(self) -> list[SequenceState]:
        """The first waiting sequence of each client that has one."""
        heads = []
        for client in self._clients.values():
            while client.heap and client.heap[0][1].ended:
                heapq.heappop(client.heap)
                client.ended -= 1
            if client.heap:
                heads.append(client.heap[0][1])
        return heads

    def next(self, heads: Sequence[SequenceState], planned: Mapping[str, int] = {}) -> SequenceState:
        """The head to run next: by priority, then by tokens served to its client plus `planned` ones."""

        def turn(s: SequenceState) -> tuple[int, int, Rank]:
            client = s.request.client
            return s.request.priority, self._clients[client].served + planned.get(client, 0), s.rank

        return min(heads, key=turn)

    def charge(self, name: str, tokens: int) -> None:
        """Count tokens computed for a client."""
        self._clients[name].served += tokens

    def has_room(self, name: str, most: int, submitted: int = 0, submitted_of: int = 0) -> bool:
        """Whether a client may queue one more sequence, with a total limit of `most`.

        If the queue is full, a client may take the place of the one that has most in it (`to_drop`), as long as it
        has fewer itself. `submitted`, `submitted_of`: sequences on their way to the queue, of all clients and of
        this one. Other threads than the engine's may ask.
        """
        if self.waiting + submitted < most:
            return True
        own = (client.waiting if (client := self._clients.get(name)) else 0) + submitted_of
        others = [client.waiting for other, client in list(self._clients.items()) if other != name]
        return own + 1 < max(others, default=0)

    def to_drop(self, name: str) -> SequenceState | None:
        """The sequence that leaves a full queue for one of client `name`: the last, not begun, of the client that
        has most in it; None if there is none."""
        others = [client for other, client in self._clients.items() if other != name]
        longest = max(others, key=lambda client: client.waiting, default=None)
        heap = longest.heap if longest is not None else []
        return max(((r, s) for r, s in heap if not s.ended and s.request.cached is None), default=(None, None))[1]

    def all(self) -> Iterable[SequenceState]:
        """Every waiting sequence, ended ones among them."""
        for client in self._clients.values():
            yield from (sequence for _, sequence in client.heap)
