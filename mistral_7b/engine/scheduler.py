"""The scheduler: which sequence feeds how many tokens in the next step.

    1. every sequence that is decoding feeds its newest token and its draft tokens
    2. the rest of the budget goes to prompts, first to the client served least so far (queues.py): its running
       prefills, then its waiting requests, in order. The first gets at most half of it while others wait, so that
       a long prompt does not delay them
    3. a sequence whose grammar mask is not ready keeps its pages and computes nothing
    4. when pages run out, the last sequence of the client with the largest share (shares.py) is preempted: it
       frees its pages, waits, and is recomputed. Also, once a step: if the next request does not fit, and another
       client holds at least twice what the requester would then hold, one of its sequences is preempted

A prefill chunk ends where a page ends, unless the prompt ends first: a sequence with a window never holds more
than the window and one step's tokens.
"""

from __future__ import annotations

import bisect
import time
from collections import defaultdict, deque
from collections.abc import Iterable
from functools import partial
from operator import attrgetter

from ..errors import EngineError
from .config import EngineConfig
from .counts import Counts
from .pages import PagePool
from .queues import Queues
from .request import Request, SequenceState
from .shares import Shares
from .window import first_visible, most_pages, usable_prefix

RANK = attrgetter("rank")
Planned = dict[SequenceState, int]  # how many tokens each sequence feeds in the next step


class _PagesShortError(Exception):
    """There are too few free pages, and no sequence may be preempted."""


class Scheduler:
    """The queue, the running sequences, and their pages."""

    def __init__(self, pool: PagePool, window: int | None, config: EngineConfig) -> None:
        self.pool, self.window, self.config = pool, window, config
        self.page = pool.page
        self.most_pages = partial(most_pages, window=window, config=config)
        self.first_visible = partial(first_visible, window=window, page=pool.page)
        self.usable_prefix = partial(usable_prefix, window=window, page=pool.page)
        self.running: list[SequenceState] = []  # in order
        self.counts = Counts()
        self.queues, self.shares = Queues(), Shares(config.max_sequences, pool.n_pages)

    @property
    def waiting(self) -> int:
        return self.queues.waiting

    # ------------------------------------------------------------------ adding and ending requests

    def add(self, request: Request) -> None:
        """Queue a request, in one sequence unless it is forked. EngineError if it could never be computed."""
        self.check(request)
        for sequence in request.pending if request.forked else request.sequences[:1]:
            self.queues.enter(sequence)
            self.queues.push(sequence)

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

    def end(self, sequence: SequenceState) -> None:
        """End a sequence and free its pages."""
        if sequence.ended:
            return
        if sequence.running or sequence.waiting:
            self.queues.leave(sequence)
        if sequence.running:
            self.running.remove(sequence)
            sequence.running = False
        sequence.ended = True
        sequence.free_pages(self.pool)

    def fork(self, sequence: SequenceState) -> None:
        """Start the other completions of a request, whose prompt is computed now."""
        sequence.request.forked = True
        for other in sequence.request.sequences:
            if other is not sequence:
                other.fork_from(sequence, self.pool)
                self.queues.enter(other)
                self._run(other)

    def _run(self, sequence: SequenceState) -> None:
        bisect.insort(self.running, sequence, key=RANK)
        sequence.running = True

    # ------------------------------------------------------------------ the next step

    def plan(self) -> list[tuple[SequenceState, int]]:
        """Sequences with the number of tokens that each feeds, drafts included. Their pages are allocated."""
        return self._build_plan(may_preempt=True)

    def plan_without_preempting(self) -> list[tuple[SequenceState, int]] | None:
        """`plan`, or None, with nothing changed, if a sequence would have to be preempted."""
        try:
            return self._build_plan(may_preempt=False)
        except _PagesShortError:
            return None

    def _build_plan(self, may_preempt: bool) -> list[tuple[SequenceState, int]]:
        planned: Planned = {}
        budget = self.config.max_batch_tokens
        if self.waiting and self.queues.contended:
            self._make_way(may_preempt)
        preemptions = self.counts.preemptions
        decoding = [s for s in self.running if s.decoding and not s.at_token_limit and not s.late]
        for sequence in decoding:
            if sequence.running:  # not preempted for an earlier one
                budget -= self._allocate(sequence, 1, planned, may_preempt)
        for sequence in decoding:  # draft tokens may take a free page, and preempt no sequence
            if sequence.draft and sequence.running:
                budget -= self._add_draft(sequence, planned)
        self._plan_prefills(budget, planned, may_preempt, preemptions)
        if self.queues.contended:
            for sequence, n in planned.items():
                self.queues.charge(sequence.request.client, n)
        return list(planned.items())

    def _plan_prefills(self, budget: int, planned: Planned, may_preempt: bool, preemptions: int) -> None:
        """Plan chunks of running prefills and of admitted requests: each for the client served the least so far.

        Stops admitting once pages have run out in this step: when the count exceeds `preemptions`.
        """
        prefills: dict[str, deque[SequenceState]] = defaultdict(deque)
        for s in self.running:
            if not s.decoding and not s.late:
                prefills[s.request.client].append(s)
        left = sum(map(len, prefills.values()))
        planned_by_client: dict[str, int] = defaultdict(int)  # prefill tokens
        admitting = True
        while budget > 0:
            admitting = admitting and budget >= self.page and self.counts.preemptions == preemptions
            heads = [queue[0] for queue in prefills.values() if queue]
            if admitting and self.waiting:
                heads += [head for head in self.queues.heads() if not prefills.get(head.request.client)]
            if not heads:
                return
            sequence = heads[0] if len(heads) == 1 else self.queues.next(heads, planned_by_client)
            client = sequence.request.client
            if prefills.get(client):
                prefills[client].popleft()
                left -= 1
                if not sequence.running:  # preempted since
                    continue
            elif (fit := self._fit(sequence)) is None:
                admitting = False  # none may overtake it, or it might wait forever
                continue
            else:
                self._begin(sequence, *fit)
            n = self._allocate(sequence, self._chunk_size(sequence, budget, left > 0), planned, may_preempt)
            budget -= n
            planned_by_client[client] += n

    def _chunk_size(self, sequence: SequenceState, budget: int, followed: bool) -> int:
        """The size of the next prefill chunk of a sequence; `followed`: another prefill comes after it."""
        if followed or self.waiting:
            budget = max(budget // 2, min(budget, self.page))
        if sequence.uncomputed <= budget:
            return sequence.uncomputed
        return max(0, (sequence.computed + budget) // self.page * self.page - sequence.computed)

    def _allocate(self, sequence: SequenceState, n: int, planned: Planned, may_preempt: bool) -> int:
        """Allocate pages for n more tokens; returns n, or 0 if the sequence itself was preempted."""
        while not self._find_pages(sequence, n):
            if not may_preempt:
                raise _PagesShortError
            victim = self.shares.last(self.running) if self.queues.contended else self.running[-1]
            self._preempt(victim)
            planned.pop(victim, None)
            if victim is sequence:
                return 0
        if n:
            planned[sequence] = n
        return n

    def _add_draft(self, sequence: SequenceState, planned: Planned) -> int:
        """Add a sequence's draft tokens to the step; returns their number, 0 if there are no pages for them."""
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
            sequence.append_page(pool.take())
        return True

    def _preempt(self, sequence: SequenceState) -> None:
        assert not sequence.in_flight, "a preempted sequence has a token in flight"
        sequence.free_pages(self.pool)
        sequence.draft, sequence.speculator = [], None  # the result of its last draft will not reach its drafter
        self.running.remove(sequence)
        sequence.running = False
        self.queues.push(sequence)
        self.counts.preemptions += 1

    def _make_way(self, may_preempt: bool) -> None:
        """Preempt a sequence for the next client's first request, if this cannot start otherwise."""
        heads = self.queues.heads()
        if not heads or not self.running or self._fit(head := self.queues.next(heads)) is not None:
            return
        victim = self.shares.to_preempt(self.running, head, self.most_pages(len(head.tokens)))
        if victim is not None:
            if not may_preempt:
                raise _PagesShortError
            self._preempt(victim)

    # ------------------------------------------------------------------ admission

    def _fit(self, sequence: SequenceState) -> tuple[int, list[int]] | None:
        """The cached prefix of a waiting sequence, as `_prefix`; None if there is no room for the sequence."""
        if self._running_completions() + sequence.request.completions_per_sequence > self.config.max_sequences:
            return None
        start, found = self._prefix(sequence)
        # Its whole prompt and one page for each running sequence must fit, or it would soon be preempted.
        wanted = self.most_pages(len(sequence.tokens)) - len(found) + len(self.running)
        if self.running and wanted > self.pool.available - sum(map(self.pool.is_idle, found)):
            return None
        return start, found

    def _running_completions(self) -> int:
        """Completions that run, or start as soon as their prompt is computed."""
        return sum(s.request.completions_per_sequence for s in self.running)

    def _begin(self, sequence: SequenceState, start: int, found: list[int]) -> None:
        """Run a waiting sequence, whose cached prefix of `start` tokens has these visible pages."""
        self.queues.pop(sequence)
        request = sequence.request
        for _ in range(start // self.page - len(found)):
            sequence.append_page(self.pool.scratch)  # outside the window: never read
        sequence.first = sequence.stop
        for page in found:
            sequence.append_page(self.pool.share(page))
        sequence.computed, sequence.cached_pages = start, start // self.page
        if request.cached is None:
            request.cached = start
            request.metrics.started = time.perf_counter()
            self.counts.prompt_tokens += len(request.ids)
            self.counts.cached_tokens += start
        self._run(sequence)

    def _prefix(self, sequence: SequenceState) -> tuple[int, list[int]]:
        """The length of the cached prefix, and its pages that later tokens can see.

        Tokens whose logits are needed are left to compute, at least one. With a window, the last W tokens suffice.
        """
        if not (self.config.prefix_caching and sequence.request.shares_prefixes):
            return 0, []
        pages: dict[int, int | None] = {}

        def cached(i: int) -> bool:
            pages[i] = self.pool.find(sequence.key_of(i, self.page))
            return pages[i] is not None

        best = self.usable_prefix((len(sequence.tokens) - sequence.request.needed_rows) // self.page, cached)
        visible = range(self.first_visible(best * self.page), best)
        return best * self.page, [page for i in visible if (page := pages[i]) is not None]

    # ------------------------------------------------------------------ after the step

    def advance(self, sequence: SequenceState, n: int) -> None:
        """Count n more tokens of a sequence as computed: by this step, or by one that is in flight.

        Full pages of known tokens enter the prefix cache; pages before the window or of rejected drafts are freed.
        """
        sequence.computed += n
        if self.config.prefix_caching:
            full = min(sequence.computed, len(sequence.tokens)) // self.page
            for i in range(max(sequence.cached_pages, sequence.first), full):  # a window of 1 frees some before
                self.pool.register(int(sequence.pages[i]), sequence.key_of(i, self.page))
                sequence.cached_pages = i + 1
        stop = sequence.stop if sequence.draft else -(-sequence.computed // self.page)
        sequence.keep_pages(self.pool, self.first_visible(sequence.computed), stop)

    def close(self) -> None:
        """Hook for DiskScheduler; nothing to close here."""

    def check_pages(self) -> None:
        """AssertionError unless every page is accounted for."""
        self.pool.check(s.held for s in self._all())

    def _all(self) -> Iterable[SequenceState]:
        yield from self.running
        yield from self.queues.all()
