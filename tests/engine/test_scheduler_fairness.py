"""Who waits how long: long prompts hold up nobody, priorities hold, nobody starves, a long queue costs nothing."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from typing import Any

import pytest
from automaton import Automaton, Oracle, V, check, engine_of, request_of, run

from mistral_7b.engine.engine import Engine
from mistral_7b.engine.request import Request
from mistral_7b.sampling.params import SamplingParams


def params(n: int) -> SamplingParams:
    return SamplingParams(max_tokens=n, temperature=0, ignore_eos=True)


def add(engine: Engine, length: int, n: int, **asked: Any) -> Request:
    """A request of a prompt that begins like no other."""
    draw = random.Random(len(engine.requests) + 31 * engine._arrivals)
    request = request_of(engine, [draw.randrange(V) for _ in range(length)], params(n), **asked)
    engine.add(request)
    return request


def steps_to_first_token(engine: Engine, request: Request) -> int:
    for n in range(1, 1000):
        engine.step()
        check(engine)
        if request.completions[0].token_ids:
            return n
    raise AssertionError("it never began")


def test_a_long_prompt_does_not_hold_up_short_ones() -> None:
    engine = engine_of(Automaton(None), 1000, max_sequences=8, max_batch_tokens=32, page_size=4)
    long = add(engine, 1000, 4)
    short = [add(engine, 5, 4) for _ in range(3)]
    assert steps_to_first_token(engine, short[0]) <= 2
    assert steps_to_first_token(engine, short[2]) <= 3
    later = add(engine, 5, 4)  # and one that comes in the midst of it
    assert steps_to_first_token(engine, later) <= 3
    assert not long.completions[0].token_ids
    assert run(engine) < 1000 / 16 + 20  # nor does it get less than half of each step


def test_a_long_prompt_alone_gets_all() -> None:
    engine = engine_of(Automaton(None), 1000, max_sequences=8, max_batch_tokens=32, page_size=4)
    assert steps_to_first_token(engine, add(engine, 960, 2)) == 30


def test_decoding_goes_on_beside_any_prompt() -> None:
    engine = engine_of(Automaton(None), 1000, max_sequences=8, max_batch_tokens=16, page_size=4)
    talking = add(engine, 3, 40)
    engine.step()
    for _ in range(4):
        add(engine, 300, 2)
    for n in range(2, 40):
        engine.step()
        assert len(talking.completions[0].token_ids) == n, "a token each step, whatever is read beside it"


def test_lower_priority_numbers_go_first_and_equals_in_the_order_of_arrival() -> None:
    engine = engine_of(Automaton(None), 100, max_sequences=1, max_batch_tokens=32, page_size=4)
    order: list[int] = []
    for i, priority in enumerate([5, 0, 0, -3, 5, -3]):
        request = request_of(engine, [i, 1, 2], params(3), priority=priority)
        request.sink = lambda r, pieces, i=i: order.append(i) if r.finished else None
        engine.add(request)
    run(engine)
    assert order == [3, 5, 1, 2, 0, 4]


def test_who_came_first_keeps_its_pages_and_goes_on() -> None:
    """The last in order is thrown out, and comes back before any who came after it."""
    engine = engine_of(Automaton(None), 10, max_sequences=3, max_batch_tokens=16, page_size=4)
    order: list[int] = []
    requests = []
    for i in range(4):
        request = request_of(engine, [i, 4, i, 4], params(30))
        request.sink = lambda r, pieces, i=i: order.append(i) if r.finished else None
        engine.add(request)
        requests.append(request)
    lengths = []
    while not requests[0].finished:
        engine.step()
        check(engine)
        lengths.append(len(requests[0].completions[0].token_ids))
    assert lengths == list(range(1, 31)), "the first of them waits for nobody"
    run(engine)
    assert order == [0, 1, 2, 3]
    assert engine.counts.preemptions > 0


@pytest.mark.parametrize("who", [0, 1])
def test_a_guess_that_finds_no_pages_is_given_up_and_nobody_thrown_out(who: int) -> None:
    engine = engine_of(Automaton(None), 20, max_sequences=2, max_batch_tokens=20, page_size=1)
    requests = [add(engine, 3, 6), add(engine, 3, 6)]
    for _ in range(2):
        engine.step()
    guessing = engine.scheduler.running[who]
    guessing.draft = [1, 2, 3]
    taken = [engine.pool.take() for _ in range(engine.pool.available - 2)]  # a page for each of both is left
    assert [n for _, n in engine.scheduler.plan()] == [1, 1]
    assert guessing.draft == []
    assert engine.counts.preemptions == 0
    engine.pool.release(taken)
    for request in requests:
        engine.abort(request.id)
    check(engine)


def test_a_large_request_is_not_starved_by_small_ones_that_keep_coming() -> None:
    engine = engine_of(Automaton(None), 24, max_sequences=4, max_batch_tokens=16, page_size=4)
    for _ in range(4):
        add(engine, 8, 8)
    engine.step()
    large = add(engine, 80, 8)
    for _ in range(60):
        if len(engine.requests) < 8:
            add(engine, 8, 8)
        engine.step()
    assert large.finished
    check(engine)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("clients", ["a", "ab", "abc"])
def test_a_storm_of_preemptions_ends_and_changes_nothing(seed: int, window: int | None, clients: str) -> None:
    """A pool for one, and many at once that grow until it is full, again and again."""
    draw, model = random.Random(seed), Automaton(window)
    page = draw.choice([1, 2, 4])
    config = {"max_sequences": 6, "max_batch_tokens": 6 + page + draw.choice([0, 8]), "page_size": page}
    n_pages = engine_of(model, 1, **config).scheduler.most_pages(60) + draw.choice([0, 1, 2])
    engine = engine_of(model, n_pages, prefix_caching=bool(seed % 2), **config)
    requests = []
    for i in range(10):
        prompt = [draw.randrange(V) for _ in range(draw.randint(1, 12))]
        guess = Oracle(model) if i % 3 == 0 else None
        p = replace(params(draw.choice([20, 48])), n=draw.choice([1, 1, 3]))
        requests.append(
            request_of(
                engine,
                prompt,
                p,
                speculation=guess,
                priority=draw.choice([0, 0, 1]),
                client=clients[i % len(clients)],
            )
        )
        engine.add(requests[-1])
        for _ in range(draw.choice([0, 0, 5])):
            engine.step()
            check(engine)
    run(engine)
    assert engine.counts.preemptions >= 4
    for r in requests:
        wanted = model.greedy(r.ids, r.params.max_tokens or 0)
        assert [c.token_ids for c in r.completions] == [wanted] * r.params.n
    # No step is in vain: nothing is computed again and again without a token coming of it.
    assert engine.counts.steps <= engine.counts.generated_tokens + sum(len(r.ids) for r in requests)


def planning_time(waiting: int) -> float:
    """Seconds of the fastest step's planning with so many requests waiting, some of them given up."""
    engine = engine_of(Automaton(None), 300, max_sequences=8, max_batch_tokens=40, page_size=4)
    for _ in range(8):
        add(engine, 6, 1000)
    for _ in range(3):
        engine.step()
    for i in range(waiting):
        request = request_of(engine, [i % V] * 9, params(4))
        engine.add(request)
        if i % 3 == 0:
            engine.abort(request.id)
    assert engine.scheduler.waiting == waiting - (waiting + 2) // 3
    best = 1.0
    for _ in range(30):
        began = time.perf_counter()
        engine.drafts.propose(engine.scheduler.running, engine._fail_request)
        plan = engine.scheduler.plan()
        best = min(best, time.perf_counter() - began)
        assert len(plan) == 8
    return best


def test_ten_thousand_that_wait_cost_a_step_nothing() -> None:
    few, many = planning_time(10), planning_time(10_000)
    assert many < 4 * few + 1e-4


def test_the_queue_looks_at_its_head_alone() -> None:
    """Counted, not timed: with 3000 waiting a step looks at no more of them than it takes in, and one."""
    engine = engine_of(Automaton(None), 300, max_sequences=8, max_batch_tokens=40, page_size=4)
    for i in range(3000):
        engine.add(request_of(engine, [i % V, i // V % V, 3], params(4)))
    looks = 0
    prefix = engine.scheduler._prefix

    def counted(sequence: Any) -> Any:
        nonlocal looks
        looks += 1
        return prefix(sequence)

    engine.scheduler._prefix = counted  # type: ignore[method-assign]
    for _ in range(40):
        before, running = looks, len(engine.scheduler.running)
        engine.step()
        assert looks - before <= 8 - running + 1
    assert looks > 40
