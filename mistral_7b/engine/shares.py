"""How much of an engine each client holds, and which sequence is preempted.

    client    seats of 64    pages of 4,000    share
    alice     60             2,100             0.94      <- its last sequence is preempted
    bob        2             2,400             0.60

A client's share is the larger one of its parts of seats and of pages: dominant resource fairness (Ghodsi et al.,
NSDI 2011).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .request import SequenceState


@dataclass(frozen=True)
class Shares:
    """Shares of an engine with so many seats for completions, and pages."""

    seats: int
    pages: int

    def of(self, seats: int, pages: int) -> float:
        """The share of these seats and pages."""
        return max(seats / self.seats, pages / self.pages)

    def held(self, running: Iterable[SequenceState]) -> dict[str, float]:
        """The share of each client that has running sequences."""
        seats: dict[str, int] = defaultdict(int)
        pages: dict[str, int] = defaultdict(int)
        for s in running:
            seats[s.request.client] += s.request.completions_per_sequence
            pages[s.request.client] += s.stop - s.first
        return {client: self.of(n, pages[client]) for client, n in seats.items()}

    def last(self, running: Sequence[SequenceState]) -> SequenceState:
        """The sequence to preempt when pages run out: with the largest priority number (served last), of the
        client that holds the most, the last in order. `running` is in order."""
        held, priority = self.held(running), running[-1].request.priority
        return max((s for s in running if s.request.priority == priority), key=lambda s: _order(s, held))

    def to_preempt(
        self, running: Sequence[SequenceState], head: SequenceState, pages: int
    ) -> SequenceState | None:
        """The sequence to preempt so that a waiting one, which needs `pages`, can start; None: it has to wait.

        Its client must hold twice what the waiting one's would hold: preempted tokens are computed twice.
        """
        held, client = self.held(running), head.request.client
        would = held.get(client, 0.0) + self.of(head.request.completions_per_sequence, pages)
        others = (s for s in running if s.request.client != client and s.request.priority >= head.request.priority)
        most = max(others, key=lambda s: _order(s, held), default=None)
        return most if most is not None and held[most.request.client] >= 2 * would else None


def _order(s: SequenceState, held: Mapping[str, float]) -> tuple[float, tuple[int, int, int]]:
    """The order of preemption, last first: by what its client holds, then by rank."""
    return held[s.request.client], s.rank
