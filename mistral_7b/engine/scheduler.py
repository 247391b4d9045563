"""The scheduler: which sequence feeds how many tokens in the next step.

    1. every sequence that is decoding feeds its newest token and its draft tokens
    2. the rest of the budget goes to running prefills, then to waiting requests, in order: the first of them gets
       at most half of it while others wait, so that a long prompt does not delay them
    3. a sequence whose grammar mask is not ready keeps its pages and computes nothing
    4. when pages run out, the last sequence in order is preempted: it frees its pages, waits, and is recomputed

A prefill chunk ends where a page ends, unless the prompt ends first: a sequence with a window never holds more
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
    """There are too few free pages, and no sequence may be preempted."""


def most_pages(tokens: int, window: int | None, config: EngineConfig) -> int:
    """The largest number of pages that a sequence of `tokens` tokens holds at a time."""
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
    cached_tokens: int = 0  # of these, found in the prefix cache
    computed_tokens: int = 0  # fed to the model, with recomputed tokens and rejected drafts
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    disk_queries: int = 0  # prompt tokens that were not in memory, looked up in the prefix cache on disk
    disk_hits: int = 0  # of these, found
    disk_read_bytes: int = 0
    disk_written_bytes: int = 0
    disk_dropped: int = 0  # pages that were not written because the disk was too slow
    finished: dict[str, int] = field(default_factory=dict)  # requests by finish reason, "abort" or "error"
    ended: int = 0  # requests, for any reason


class Scheduler:
    """The queue, the running sequences, and their pages."""

    def __init__(self, pool: PagePool, window: int | None, config: EngineConfig) -> None:
        self.pool, self.window, self.config = pool, window, config
        self.page = pool.page
        self.running: list[SequenceState] = []  # in order
        self.counts = Counts()
        self._waiting: list[tuple[tuple[int, int, int], SequenceState]] = []  # a heap; it may hold ended ones
        self.waiting = 0  # how many wait, without ended ones

    # ------------------------------------------------------------------ adding and ending requests

    def add(self, request: Request) -> None:
        """Queue a request. EngineError if it could never be computed."""
        self.check(request)
        self._wait(request.sequences[0])

    def check(self, request: Request) -> None:
        """EngineError for a request that would not fit even alone."""
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
        """The largest number of pages that a sequence of `tokens` tokens holds at a time."""
        return most_pages(tokens, self.window, self.config)

    def end(self, sequence: SequenceState) -> None:
        """End a sequence and free its pages."""
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
        """Start the other completions of a request, whose prompt is computed now."""
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
        """Sequences with the number of tokens that each feeds, drafts included. Their pages are allocated."""
        return self._planned(keep=False)

    def plan_without_loss(self) -> list[tuple[SequenceState, int]] | None:
        """`plan`, or None, with nothing changed, if a sequence would have to be preempted."""
        try:
            return self._planned(keep=True)
        except _PagesShortError:
            return None

    def _planned(self, keep: bool) -> list[tuple[SequenceState, int]]:
        planned: dict[SequenceState, int] = {}
        budget, preempted = self.config.max_batch_tokens, self.counts.preemptions
        decoding = [s for s in self.running if s.decoding and not s.complete and not s.late]
        for sequence in decoding:
            if sequence.running:  # not preempted for an earlier one
                budget -= self._plan(sequence, 1, planned, keep)
        for sequence in decoding:  # draft tokens may take a free page, and preempt no sequence
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
        """The size of the next prefill chunk of a sequence; `followed`: another prefill comes after it."""
        if followed or self.waiting:
            budget = max(budget // 2, min(budget, self.page))
        if sequence.need <= budget:
            return sequence.need
        return max(0, (sequence.computed + budget) // self.page * self.page - sequence.computed)

    def _plan(self, sequence: SequenceState, n: int, planned: dict[SequenceState, int], keep: bool) -> int:
        """Allocate pages for n more tokens, preempting from the end of the order: n, or 0 without pages."""
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
        """Add a sequence's draft tokens to the step: how many; 0 if there are no pages for them."""
        if not self._find_pages(sequence, 1 + len(sequence.draft)):
            sequence.draft = []
            return 0
        planned[sequence] += len(sequence.draft)
        return len(sequence.draft)

    def _find_pages(self, sequence: SequenceState, n: int) -> bool:
        """Allocate unshared pages for a sequence's next n tokens; False if too few are available."""
        pool, first = self.pool, sequence.computed // self.page
        missing = max(0, -(-(sequence.computed + n) // self.page) - sequence.stop)
        shared = [i for i in range(first, sequence.stop) if pool.holders[sequence.pages[i]] > 1] if n else []
        if missing + len(shared) > pool.available:
            return False
        for i in shared:  # copy on write: other sequences still read it
            old = int(sequence.pages[i])
            sequence.pages[i] = pool.copy(old)
            pool.release([old])
        for _ in range(missing):
            sequence.append(pool.take())
        return True

    def _preempt(self, sequence: SequenceState) -> None:
        assert not sequence.in_flight, "a preempted sequence has a token in flight"
        sequence.drop_all(self.pool)
        sequence.draft, sequence.guesser = [], None  # the result of its last draft will not reach its drafter
        self.running.remove(sequence)
        sequence.running = False
        self._wait(sequence)
        self.counts.preemptions += 1

    # ------------------------------------------------------------------ admission

    def _admit(self) -> SequenceState | None:
        """Start the first waiting sequence, with its cached prefix; None if it cannot start yet."""
        while self._waiting and self._waiting[0][1].ended:
            heapq.heappop(self._waiting)
        if not self._waiting:
            return None
        sequence = self._waiting[0][1]
        request = sequence.request
        if self._to_come() + request.to_come > self.config.max_sequences:
            return None
        start, found = self._prefix(sequence)
        # Its whole prompt and one page for each running sequence must fit, or it would soon be preempted.
        wanted = self.most_pages(len(sequence.tokens)) - len(found) + len(self.running)
        if self.running and wanted > self.pool.available - sum(map(self.pool.is_idle, found)):
            return None
        heapq.heappop(self._waiting)
        self.waiting -= 1
        sequence.waits = False
        self._begin(sequence, start, found)
        return sequence

    def _to_come(self) -> int:
        """Completions that run, or start as soon as their prompt is computed."""
        return sum(s.request.to_come for s in self.running)

    def _begin(self, sequence: SequenceState, start: int, found: list[int]) -> None:
        request = sequence.request
        for _ in range(start // self.page - len(found)):
            sequence.append(self.pool.scratch)  # outside the window: never read
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
        """The length of the cached prefix, and its pages that later tokens can see.

        At least one token is left to compute, because the next one is sampled from its logits. With a window,
        pages of the last W tokens are enough.
        """
        if not (self.config.prefix_caching and sequence.request.shares_prefixes):
            return 0, []
        most = (len(sequence.tokens) - 1) // self.page
        pages, best = [], 0
        run = 0  # consecutive cached pages
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
        """The first page that a query at this position or later can see."""
        return 0 if self.window is None else max(0, position - self.window + 1) // self.page

    # ------------------------------------------------------------------ after the step

    def advance(self, sequence: SequenceState, n: int) -> None:
        """Count n more tokens of a sequence as computed: by this step, or by one that is in flight.

        Full pages whose tokens are known enter the prefix cache; pages that left the window are freed.
        """
        sequence.computed += n
        if self.config.prefix_caching:
            full = min(sequence.computed, len(sequence.tokens)) // self.page
            for i in range(max(sequence.known, sequence.first), full):  # with a window of 1 some are already freed
                self.pool.know(int(sequence.pages[i]), sequence.key_of(i, self.page))
                sequence.known = i + 1
        sequence.drop(self.pool, self.first_seen(sequence.computed))

    def close(self) -> None:
        """Finish what runs beside the engine."""

    def check_pages(self) -> None:
        """AssertionError unless every page is accounted for."""
        self.pool.check(s.held for s in self._all())

    def _all(self) -> Iterable[SequenceState]:
        yield from self.running
        yield from (s for _, s in self._waiting)
