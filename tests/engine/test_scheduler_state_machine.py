"""Hypothesis looks for a course of events in which pages go wrong, or a request gets other tokens than alone."""

from __future__ import annotations

import random

import pytest
import torch
from automaton import Automaton, Oracle, V, check, engine_of, request_of, run
from example_counts import FEW
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mistral_7b.engine.engine import Engine
from mistral_7b.engine.request import Request
from mistral_7b.engine.speculation import Speculation
from mistral_7b.errors import EngineError
from mistral_7b.sampling.params import SamplingParams

BASES = [torch.randint(0, V, (80,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(3)]

tokens = st.integers(0, V - 1)


class Course(RuleBasedStateMachine):
    """Requests come, are given up and end over a pool that is mostly too small for them."""

    @initialize(
        window=st.sampled_from([None, 2, 5, 8]),
        page=st.sampled_from([1, 2, 4, 5]),
        capacity=st.sampled_from([36, 44, 56, 72, 110]),  # tokens; one request may need 80
        sequences=st.integers(2, 6),
        spare=st.integers(0, 12),
        caching=st.booleans(),
    )
    def begin(
        self, window: int | None, page: int, capacity: int, sequences: int, spare: int, caching: bool
    ) -> None:
        self.model = Automaton(window)
        self.engine: Engine = engine_of(
            self.model, capacity // page, page_size=page, max_sequences=sequences,
            max_batch_tokens=sequences + page + spare, prefix_caching=caching,
        )  # fmt: skip
        self.requests: list[Request] = []
        self.aborted: set[str] = set()

    @rule(
        base=st.integers(0, 2),
        length=st.one_of(st.integers(1, 9), st.sampled_from([4, 8, 16, 20, 40])),
        end=st.lists(tokens, max_size=3),
        room=st.sampled_from([1, 2, 6, 15, 20, 25, 30]),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        seed=st.one_of(st.none(), st.integers(0, 5)),
        stop=st.one_of(st.none(), tokens),
        priority=st.sampled_from([0, 0, 0, -1, 1]),
        guess=st.sampled_from(["", "oracle", "lookup"]),
        repeat=st.booleans(),
        client=st.sampled_from(["", "", "a", "b"]),
    )
    def add(
        self, base: int, length: int, end: list[int], room: int, n: int, seed: int | None, stop: int | None,
        priority: int, guess: str, repeat: bool, client: str,
    ) -> None:  # fmt: skip
        prompt = BASES[base][:length] + end
        if repeat and self.requests:  # what has been computed before, and the tokens that came of it
            request = self.requests[-1]
            prompt = (request.ids + request.completions[0].token_ids)[: length + 10]
        params = SamplingParams(
            max_tokens=room, n=n, temperature=0.0 if seed is None else 1.0, seed=seed, ignore_eos=True,
            stop_token_ids=None if stop is None else [stop],
        )  # fmt: skip
        speculation = {"": None, "oracle": Oracle(self.model), "lookup": Speculation(row_cost=0.01)}[guess]
        try:
            request = request_of(
                self.engine, prompt, params, priority=priority, speculation=speculation, client=client
            )
        except EngineError:
            return
        self.engine.add(request)
        self.requests.append(request)

    @rule(seed=st.integers(0, 2**16))
    def flood(self, seed: int) -> None:
        """Six at once, that begin small and grow: pages run out while they run."""
        draw = random.Random(seed)
        for _ in range(6):
            self.add(
                draw.randrange(3), draw.randint(1, 9), [draw.randrange(V)], draw.choice([5, 15, 25, 30]),
                draw.choice([1, 1, 2]), draw.choice([None, 1, 2]), None, draw.choice([0, 0, 1]),
                draw.choice(["", "oracle", "lookup"]), draw.random() < 0.3, draw.choice(["", "a", "b"]),
            )  # fmt: skip

    @rule(n=st.integers(1, 8))
    def step(self, n: int) -> None:
        for _ in range(n):
            self.engine.step()
            check(self.engine)

    @rule(which=st.integers(0, 30))
    def abort(self, which: int) -> None:
        if which < len(self.requests):
            request = self.requests[which]
            if not request.finished:
                self.aborted.add(request.id)
            self.engine.abort(request.id)
            assert request.finished
            assert not any(s.held for s in request.sequences)

    @rule()
    def forget(self) -> None:
        self.engine.pool.forget()
        assert self.engine.pool.available == len(self.engine.pool._free)

    @invariant()
    def whole(self) -> None:
        if hasattr(self, "engine"):
            check(self.engine)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        run(self.engine)
        assert self.engine.pool.held == 0
        assert self.engine.pool.available == self.engine.pool.n_pages
        for request in self.requests:
            assert request.finished
            assert request.error is None, request.error
            self.same_as_alone(request)

    def same_as_alone(self, request: Request) -> None:
        got = [c.token_ids for c in request.completions]
        p = request.params
        if p.greedy and not p.stop_token_ids:
            wanted = [self.model.greedy(request.ids, p.max_tokens or 0)] * p.n
        else:
            wanted = alone(self.model, request)
        if request.id in self.aborted:
            wanted = [w[: len(g)] for w, g in zip(wanted, got, strict=True)]
        assert got == wanted


def alone(model: Automaton, request: Request) -> list[list[int]]:
    """What a request gets with an engine of its own, of plenty, that keeps and guesses nothing."""
    engine = engine_of(model, 200, max_sequences=3, max_batch_tokens=200, page_size=16, prefix_caching=False)
    same = request_of(engine, request.ids, request.params)
    engine.add(same)
    run(engine)
    return [c.token_ids for c in same.completions]


@pytest.mark.parametrize(("window", "page"), [(8, 4), (8, 2), (8, 3), (2, 2), (16, 3), (None, 4)])
def test_a_prefix_is_taken_only_where_all_that_is_visible_is_there(window: int | None, page: int) -> None:
    """Pages are thrown out one after another, the oldest first: while the last window is there, it is enough."""
    prompt = BASES[0][:41]
    whole = 40 // page  # pages that may be found
    needed = whole if window is None else whole - (whole * page - window + 1) // page
    for gone in range(whole + 1):
        engine = engine_of(Automaton(window), 60, max_sequences=2, max_batch_tokens=30, page_size=page)
        first = request_of(engine, prompt, SamplingParams(max_tokens=1, temperature=0))
        engine.add(first)
        run(engine)
        pool = engine.pool
        taken = [pool.take() for _ in range(len(pool._free) + gone)]
        pool.release(taken)
        again = request_of(engine, prompt, SamplingParams(max_tokens=9, temperature=0, ignore_eos=True))
        engine.add(again)
        run(engine)
        assert again.completions[0].token_ids == engine.model.greedy(prompt, 9)  # type: ignore[operator]
        if gone == 0 or (window is not None and gone <= whole - needed):
            assert again.cached == whole * page


def test_only_requests_of_one_salt_share_pages() -> None:
    model = Automaton(8)
    engine = engine_of(model, 60, max_sequences=2, max_batch_tokens=30, page_size=4)
    cached = []
    for salt in (None, None, "a", "b", "a"):
        request = request_of(engine, BASES[0][:17], SamplingParams(max_tokens=1), cache_salt=salt)
        engine.add(request)
        while not request.finished:
            engine.step()
            engine.check()
        cached.append(request.cached)
    assert cached == [0, 16, 0, 0, 16]


TestCourse = Course.TestCase
TestCourse.settings = settings(
    FEW, derandomize=True, stateful_step_count=14, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("window", [None, 5])
def test_pages_of_rejected_drafts_are_freed_in_the_same_step(window: int | None) -> None:
    """A step of 5 tokens takes 3 pages, of which two are free after it if its drafts are wrong."""
    model = Automaton(window)
    engine = engine_of(model, 30, max_sequences=2, max_batch_tokens=16, page_size=2, prefix_caching=False)
    params = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    request = request_of(engine, BASES[0][:6], params, speculation=Oracle(model, wrong=1))
    engine.add(request)
    sequence, rejecting = request.sequences[0], 0
    while not request.finished:
        rows, counts = model.rows, engine.counts
        rejected = counts.drafted_tokens - counts.accepted_tokens
        engine.step()
        check(engine)
        if counts.drafted_tokens - counts.accepted_tokens - rejected >= 2 and not request.finished:
            rejecting += 1
            assert model.rows - rows > 2
            assert engine.pool.held == -(-sequence.computed // 2) - sequence.first
    assert rejecting > 0
    assert request.completions[0].token_ids == model.greedy(BASES[0][:6], 30)
    assert engine.pool.available == 30
