"""Who computes what in the next step.

    1. every sequence that is decoding feeds its newest token, and what was guessed after it
    2. what is left of the budget goes to prompts that have begun, then to those that wait, in order: the first
       of them gets at most half of what is left while others wait behind it, so that a long prompt holds up nobody
    3. a sequence whose grammar has not said yet what may come next keeps its pages and computes nothing
    4. when pages run out, the last in order loses its own, goes back to wait, and is computed again later

A part of a prompt ends where a page ends, unless the prompt does: so a sequence with a window never holds more
than the window and one step's tokens.
"""

from __future__ import annotations

import bisect
import heapq
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter

from ..errors import EngineError
from .config import EngineConfig
from .pages import PagePool
from .request import Request, SequenceState

RANK = attrgetter("rank")


class _PagesShortError(Exception):
    """Pages are short, and nobody may lose his own."""


def most_pages(tokens: int, window: int | None, config: EngineConfig) -> int:
    """The most pages that a sequence of so many tokens ever holds."""
    page = config.page_size
    whole = -(-tokens // page)
    if window is None:
        return whole
    return min(whole, -(-(window + config.max_batch_tokens) // page) + 1)


@dataclass
class Counts:
    """What an engine has done since it was made."""

    steps: int = 0
    prompt_tokens: int = 0  # of prompts that have begun
    cached_tokens: int = 0  # of these, those found computed
    computed_tokens: int = 0  # fed to the model, tokens computed again and wrong guesses included
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    finished: dict[str, int] = field(default_factory=dict)  # requests by finish reason; "abort", "error"
    ended: int = 0  # requests, by whatever reason


class Scheduler:
    """The queue, the running sequences, and their pages."""

    def __init__(self, pool: PagePool, window: int | None, config: EngineConfig) -> None:
        self.pool, self.window, self.config = pool, window, config
        self.page = pool.page
        self.running: list[SequenceState] = []  # in order
        self.counts = Counts()
        self._waiting: list[tuple[tuple[int, int, int], SequenceState]] = []  # a heap, ended ones too
        self.waiting = 0  # how many wait, those that have ended not counted

    # ------------------------------------------------------------------ requests come and go

    def add(self, request: Request) -> None:
        """Let a request wait. EngineError if it could never be computed."""
        self.check(request)
        self._wait(request.sequences[0])

    def check(self, request: Request) -> None:
        """EngineError for a request that would not fit if it were alone."""
        n, longest = len(request.completions), len(request.ids)
        if request.pooling is None:
            longest += request.completions[0].max_tokens
        if n > self.config.max_sequences:
            raise EngineError(
                f"n={n} completions at once are more than the engine's {self.config.max_sequences}",
                field="n",
                hint="lower n, or raise max_sequences",
            )
        if self.most_pages(longest) > self.pool.n_pages:
            raise EngineError(
                f"a prompt of {len(request.ids)} tokens with {longest - len(request.ids)} more needs "
                f"{self.most_pages(longest)} pages of {self.page} tokens, and the engine has {self.pool.n_pages}",
                hint="shorten it, or raise kv_cache_bytes",
            )

    def most_pages(self, tokens: int) -> int:
        """The most pages that a sequence of so many tokens ever holds."""
        return most_pages(tokens, self.window, self.config)

    def end(self, sequence: SequenceState) -> None:
        """A sequence needs no more: its pages are free at once."""
        if sequence.ended:
            return
        if sequence.running:
            self.running.remove(sequence)
            sequence.running = False
        elif sequence.waits:
            self.waiting -= 1
            sequence.waits = False
        sequence.ended = True
        sequence.drop_all(self.pool)

    def fork(self, sequence: SequenceState) -> None:
        """Let the other completions of a request begin, now that its prompt is computed."""
        sequence.request.forked = True
        for other in sequence.request.sequences:
            if other is not sequence:
                other.fork(sequence, self.pool)
                self._run(other)

    def _wait(self, sequence: SequenceState) -> None:
        heapq.heappush(self._waiting, (sequence.rank, sequence))
        sequence.waits = True
        self.waiting += 1

    def _run(self, sequence: SequenceState) -> None:
        bisect.insort(self.running, sequence, key=RANK)
        sequence.running = True

    # ------------------------------------------------------------------ the next step

    def plan(self) -> list[tuple[SequenceState, int]]:
        """Sequences with the number of tokens that each feeds, drafts included. Their pages are there."""
        return self._planned(keep=False)

    def plan_without_loss(self) -> list[tuple[SequenceState, int]] | None:
        """`plan`, or None if somebody would have to lose his pages for it; nobody has then."""
        try:
            return self._planned(keep=True)
        except _PagesShortError:
            return None

    def _planned(self, keep: bool) -> list[tuple[SequenceState, int]]:
        planned: dict[SequenceState, int] = {}
        budget, preempted = self.config.max_batch_tokens, self.counts.preemptions
        decoding = [s for s in self.running if s.decoding and not s.complete and not s.late]
        for sequence in decoding:
            if sequence.running:  # and has not lost its pages to one before it
                budget -= self._plan(sequence, 1, planned, keep)
        for sequence in decoding:  # a guess is worth a page that nobody wants, and not one that somebody has
            if sequence.draft and sequence.running:
                budget -= self._lengthen(sequence, planned)
        unread = [s for s in self.running if not s.decoding and not s.late]
        for i, sequence in enumerate(unread):
            if sequence.running:
                budget -= self._plan(sequence, self._part(sequence, budget, i + 1 < len(unread)), planned, keep)
        while budget >= self.page and self.counts.preemptions == preempted and (head := self._admit()):
            budget -= self._plan(head, self._part(head, budget, False), planned, keep)
        return list(planned.items())

    def _part(self, sequence: SequenceState, budget: int, followed: bool) -> int:
        """How many of its tokens a sequence feeds, that needs more than one."""
        if followed or self.waiting:
            budget = max(budget // 2, min(budget, self.page))
        if sequence.need <= budget:
            return sequence.need
        return max(0, (sequence.computed + budget) // self.page * self.page - sequence.computed)

    def _plan(self, sequence: SequenceState, n: int, planned: dict[SequenceState, int], keep: bool) -> int:
        """Find pages for n tokens more, from whoever comes last: n, or 0 if there are none."""
        while not self._find_pages(sequence, n):
            if keep:
                raise _PagesShortError
            victim = self.running[-1]
            self._preempt(victim)
            planned.pop(victim, None)
            if victim is sequence:
                return 0
        if n:
            planned[sequence] = n
        return n

    def _lengthen(self, sequence: SequenceState, planned: dict[SequenceState, int]) -> int:
        """Let a sequence feed what was guessed as well: how many tokens more; none if there are no pages."""
        if not self._find_pages(sequence, 1 + len(sequence.draft)):
            sequence.draft = []
            return 0
        planned[sequence] += len(sequence.draft)
        return len(sequence.draft)

    def _find_pages(self, sequence: SequenceState, n: int) -> bool:
        """Let a sequence hold pages of its own for its next n tokens, if there are so many."""
        pool, first = self.pool, sequence.computed // self.page
        missing = max(0, -(-(sequence.computed + n) // self.page) - sequence.stop)
        shared = [i for i in range(first, sequence.stop) if pool.holders[sequence.pages[i]] > 1] if n else []
        if missing + len(shared) > pool.available:
            return False
        for i in shared:  # somebody else reads on in it
            old = int(sequence.pages[i])
            sequence.pages[i] = pool.copy(old)
            pool.release([old])
        for _ in range(missing):
            sequence.append(pool.take())
        return True

    def _preempt(self, sequence: SequenceState) -> None:
        assert not sequence.flying, "a token would come for a sequence that has begun anew"
        sequence.drop_all(self.pool)
        sequence.draft, sequence.guesser = [], None  # its drafter will not hear what came of the last guess
        self.running.remove(sequence)
        sequence.running = False
        self._wait(sequence)
        self.counts.preemptions += 1

    # ------------------------------------------------------------------ admission

    def _admit(self) -> SequenceState | None:
        """The first that waits, if it can begin: now running, with whatever of it was computed before."""
        while self._waiting and self._waiting[0][1].ended:
            heapq.heappop(self._waiting)
        if not self._waiting:
            return None
        sequence = self._waiting[0][1]
        request = sequence.request
        if self._to_come() + request.to_come > self.config.max_sequences:
            return None
        start, found = self._prefix(sequence)
        # All of it must find room now, and a page more for each that runs: or it would soon be thrown out again.
        wanted = self.most_pages(len(sequence.tokens)) - len(found) + len(self.running)
        if self.running and wanted > self.pool.available - sum(map(self.pool.is_idle, found)):
            return None
        heapq.heappop(self._waiting)
        self.waiting -= 1
        sequence.waits = False
        self._begin(sequence, start, found)
        return sequence

    def _to_come(self) -> int:
        """Completions that run, or will as soon as their prompt is computed."""
        return sum(s.request.to_come for s in self.running)

    def _begin(self, sequence: SequenceState, start: int, found: list[int]) -> None:
        request = sequence.request
        for _ in range(start // self.page - len(found)):
            sequence.append(self.pool.scratch)  # out of the window: never looked at
        sequence.first = sequence.stop
        for page in found:
            sequence.append(self.pool.share(page))
        sequence.computed, sequence.known = start, start // self.page
        if request.cached is None:
            request.cached = start
            request.metrics.started = time.perf_counter()
            self.counts.prompt_tokens += len(request.ids)
            self.counts.cached_tokens += start
        self._run(sequence)

    def _prefix(self, sequence: SequenceState) -> tuple[int, list[int]]:
        """How many tokens need not be computed again, and the pages that whoever comes after them can see.

        One token at least is left to compute: from it the next is sampled. With a window the last W tokens
        are enough, whatever has become of those before.
        """
        if not (self.config.prefix_caching and sequence.request.shares_prefixes):
            return 0, []
        most = (len(sequence.tokens) - 1) // self.page
        pages, best = [], 0
        run = 0  # known pages on end
        for i in range(most):
            found = self.pool.find(sequence.key_of(i, self.page))
            pages.append(found)
            run = run + 1 if found is not None else 0
            if run and run >= i + 1 - self.first_seen((i + 1) * self.page):
                best = i + 1
            elif self.window is None:
                break
        return best * self.page, [p for p in pages[self.first_seen(best * self.page) : best] if p is not None]

    def first_seen(self, position: int) -> int:
        """The first page that a query at this position, or after it, can see."""
        return 0 if self.window is None else max(0, position - self.window + 1) // self.page

    # ------------------------------------------------------------------ after the step

    def advance(self, sequence: SequenceState, n: int) -> None:
        """n tokens more of a sequence are computed, or will be before whatever is launched from now on.

        Full pages become known, if their tokens have been read; those that left the window are free.
        """
        sequence.computed += n
        if self.config.prefix_caching:
            full = min(sequence.computed, len(sequence.tokens)) // self.page
            for i in range(max(sequence.known, sequence.first), full):  # with a window of 1 some are gone unknown
                self.pool.know(int(sequence.pages[i]), sequence.key_of(i, self.page))
                sequence.known = i + 1
        sequence.drop(self.pool, self.first_seen(sequence.computed))

    def check_pages(self) -> None:
        """AssertionError unless every page is accounted for."""
        self.pool.check(s.held for s in self._all())

    def _all(self) -> Iterable[SequenceState]:
        yield from self.running
        yield from (s for _, s in self._waiting)
