"""Clients share one engine: a greedy client delays another by a few steps at most; busy ones get equal shares."""

from __future__ import annotations

import random
from typing import Any

import pytest
from automaton import Automaton, V, check, engine_of, run

from mistral_7b.engine.engine import Engine
from mistral_7b.engine.inputs import InputProcessor, RequestOptions
from mistral_7b.engine.request import Request
from mistral_7b.errors import QueueFullError
from mistral_7b.sampling.params import SamplingParams


def engine(n_pages: int = 2000, **config: Any) -> Engine:
    return engine_of(
        Automaton(None), n_pages, **{"max_sequences": 16, "max_batch_tokens": 32, "page_size": 4} | config
    )


def add(to: Engine, client: str, length: int = 8, tokens: int = 1, n: int = 1, **asked: Any) -> Request:
    draw = random.Random(to._arrivals)
    prompt = [draw.randrange(V) for _ in range(length)]
    params = SamplingParams(max_tokens=tokens, n=n, temperature=0, ignore_eos=True)
    inputs = InputProcessor(to, None, "there is none here")
    request = inputs.text(prompt, params, RequestOptions(client=client, **asked))
    to.add(request)
    return request


def steps_until_finished(of: Engine, request: Request, most: int) -> int:
    for n in range(1, most + 1):
        of.step()
        check(of)
        if request.finished:
            return n
    raise AssertionError(f"not finished after {most} steps")


def many_requests(of: Engine) -> None:
    for _ in range(500):
        add(of, "greedy", tokens=128)


def many_completions(of: Engine) -> None:
    for _ in range(128):
        add(of, "greedy", tokens=128, n=16)


def long_prompts(of: Engine) -> None:
    for _ in range(100):
        add(of, "greedy", length=300, tokens=4)


def embeddings(of: Engine) -> None:
    inputs = InputProcessor(of, None, "there is none here")
    for i in range(100):
        draw = random.Random(i)
        text = [draw.randrange(V) for _ in range(300)]
        of.add(inputs.embedding(text, "last", RequestOptions(client="greedy")))


@pytest.mark.parametrize("load", [many_requests, many_completions, long_prompts, embeddings])
def test_a_small_request_of_another_client_is_served_within_some_steps(load: Any) -> None:
    shared = engine()
    load(shared)
    for _ in range(20):
        shared.step()
    for _ in range(5):
        assert steps_until_finished(shared, add(shared, "modest"), 40) <= 6
    alone = engine()  # the negative control: one client's requests wait for each other
    load(alone)
    for _ in range(20):
        alone.step()
    with pytest.raises(AssertionError, match="not finished"):
        steps_until_finished(alone, add(alone, "greedy"), 40)


def run_steps(of: Engine, n: int) -> None:
    for _ in range(n):
        of.step()
        check(of)


def computed(requests: list[Request]) -> dict[str, int]:
    """Tokens computed for each client, prompts included."""
    tokens: dict[str, int] = {}
    for r in requests:
        begun = len(r.ids) if r.cached is not None else 0
        tokens[r.client] = tokens.get(r.client, 0) + begun + len(r.completions[0].token_ids)
    return tokens


def test_equally_busy_clients_get_equal_tokens() -> None:
    shared = engine(max_sequences=8)
    requests = [add(shared, client, tokens=20) for client in ["a"] * 200 + ["b"] * 100 + ["c"] * 100]
    run_steps(shared, 300)
    tokens = computed(requests).values()
    assert max(tokens) <= 1.15 * min(tokens)
    assert shared.counts.preemptions <= 8  # preempted tokens are computed twice: only while shares settle


def test_a_client_that_was_absent_has_no_credit() -> None:
    shared = engine(max_sequences=8)
    requests = [add(shared, client, tokens=20) for client in ["a"] * 200 + ["b"] * 200]
    run_steps(shared, 200)
    requests += [add(shared, "late", tokens=20) for _ in range(200)]
    before = computed(requests)
    run_steps(shared, 200)
    after = computed(requests)
    got = {client: after[client] - before[client] for client in after}
    assert 0.8 < 2 * got["late"] / (got["a"] + got["b"]) < 1.25


def test_priority_comes_before_shares() -> None:
    shared = engine()
    many_requests(shared)
    run_steps(shared, 20)
    idle = add(shared, "modest", priority=1)
    with pytest.raises(AssertionError, match="not finished"):
        steps_until_finished(shared, idle, 40)
    urgent = add(shared, "greedy", priority=-1)
    assert steps_until_finished(shared, urgent, 140) <= 140


def test_when_memory_runs_out_the_client_that_holds_most_gives_way() -> None:
    """The newest sequence is not preempted if it is another client's, and small."""
    shared = engine(n_pages=130, max_sequences=16, prefix_caching=False)
    for _ in range(8):
        add(shared, "greedy", length=8, tokens=200)
    run_steps(shared, 30)
    modest = add(shared, "modest", length=8, tokens=40)
    assert steps_until_finished(shared, modest, 60) <= 50
    assert shared.counts.preemptions > 0
    run(shared)
    check(shared)


def test_a_full_queue_has_room_for_another_client() -> None:
    """It takes the place of the last request of the client that has most in it."""
    shared = engine(max_waiting=20)
    with pytest.raises(QueueFullError):
        many_requests(shared)
    greedy = list(shared.requests.values())
    for _ in range(10):
        add(shared, "modest")
        assert shared.scheduler.waiting == 20
    assert [isinstance(r.error, QueueFullError) for r in greedy] == [False] * 10 + [True] * 10
    with pytest.raises(QueueFullError):
        add(shared, "modest")
    for _ in range(6):
        add(shared, "third")
    with pytest.raises(QueueFullError):
        add(shared, "third")
    run(shared)
    check(shared)


def test_aborted_requests_do_not_stay_in_the_queue() -> None:
    shared = engine(max_sequences=1)
    add(shared, "a", tokens=1000)
    for _ in range(3):
        shared.step()
    add(shared, "a")
    for _ in range(500):
        shared.abort(add(shared, "a", priority=1).id)
    assert shared.scheduler.waiting == 1
    assert len(list(shared.scheduler.queues.all())) <= 4


def test_debt_outlives_a_short_absence() -> None:
    shared = engine(max_sequences=4)
    for _ in range(60):
        add(shared, "steady", tokens=20)
    burst = [add(shared, "burst", tokens=20) for _ in range(4)]
    while not all(r.finished for r in burst):
        shared.step()
    queues = shared.scheduler.queues
    owed = queues._served["burst"]
    again = add(shared, "burst")
    assert queues._clients["burst"].served == max(owed, queues._clients["steady"].served)
    assert owed > 0
    shared.abort(again.id)
    run(shared)
    assert not queues._served
