"""One step ahead of the tokens, forced on where nothing is gained by it: requests get what they get without.

While a step is in flight requests come, end, are given up and fail, and pages go to others.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from automaton import Automaton, V, check, engine_of, request_of, run
from tiny import tiny_args, tiny_model, tokens_of
from torch import Tensor

from mistral_7b.engine import request as request_module
from mistral_7b.engine.batch import PaddingRow, PagedBatch
from mistral_7b.engine.config import EngineConfig
from mistral_7b.engine.engine import Engine
from mistral_7b.engine.in_flight import InFlightStep
from mistral_7b.engine.inputs import InputProcessor, RequestOptions
from mistral_7b.engine.llm import LLM
from mistral_7b.engine.pages import PagePool, first_key, next_key
from mistral_7b.engine.request import Request
from mistral_7b.engine.speculation import Speculation
from mistral_7b.errors import EngineError, GenerationError
from mistral_7b.model import Mistral7B
from mistral_7b.sampling.params import SamplingParams

PAGE = 4
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
MODELS = {
    window: tiny_model(tiny_args(sliding_window=window, max_seq_len=400), torch.float64) for window in (None, 8, 1)
}
PAGE_BYTES = 2 * 2 * 3 * 10 * 8 * PAGE  # layers, k and v, heads, width, float64


def llm_of(window: int | None = 8, pages: int = 200, ahead: bool = True, **config: Any) -> LLM:
    settings = {"max_sequences": 5, "max_batch_tokens": 20, "page_size": PAGE, **config}
    llm = LLM(MODELS[window], EngineConfig(kv_cache_bytes=pages * PAGE_BYTES, **settings))
    llm.engine.forward.overlaps = ahead
    return llm


def add(llm: LLM, prompt: list[int], params: SamplingParams = GREEDY, **asked: Any) -> Request:
    request = llm.inputs.text(prompt, params, RequestOptions(**asked))
    llm.engine.add(request)
    return request


def finish(engine: Engine) -> None:
    while not engine.idle:
        engine.step()
        engine.check()
    assert engine.pool.held == 0


def got(request: Request) -> list[tuple[list[int], str | None, object]]:
    return [(c.token_ids, c.finish_reason, c.stop_reason) for c in request.completions]


def alone(window: int | None, request: Request) -> list[tuple[list[int], str | None, object]]:
    """What it gets with nothing beside it, and nothing in flight between steps."""
    llm = llm_of(window, ahead=False, prefix_caching=False)
    same = add(llm, request.ids, request.params)
    finish(llm.engine)
    return got(same)


class Keys:
    """What every key stands for, noted as keys are made; and whether pages hold it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens: dict[bytes, list[int]] = {}
        monkeypatch.setattr(request_module, "next_key", self.next_key)

    def next_key(self, before: bytes, tokens: list[int]) -> bytes:
        assert len(tokens) == PAGE, "a page was made known before its tokens were"
        key = next_key(before, tokens)
        self.tokens[key] = self.tokens.get(before, []) + list(tokens)
        return key

    def check(self, pool: PagePool, model: Mistral7B, draw: random.Random, some: int = 3) -> int:
        """Compare some pages with what is computed from their tokens in one go."""
        known = list(pool.page_of.items())
        for key, page in draw.sample(known, min(some, len(known))):
            tokens = self.tokens[key]
            for mine, wanted in zip(pool.layers, contents(model, tokens), strict=True):
                for a, b in zip(mine, wanted, strict=True):
                    torch.testing.assert_close(a[page], b[len(tokens) // PAGE - 1], atol=1e-9, rtol=1e-9)
        return min(some, len(known))


@torch.inference_mode()
def contents(model: Mistral7B, tokens: list[int]) -> list[tuple[Tensor, ...]]:
    """Keys and values of tokens, in pages one after another."""
    args, n = model.args, len(tokens) // PAGE
    pool = PagePool(args.n_layers, args.n_kv_heads, args.head_dim, n, PAGE, dtype=torch.float64)
    batch = PagedBatch(pool, args.sliding_window, [(PaddingRow(np.arange(n), stop=n), len(tokens))])
    model.hidden(torch.tensor(tokens), batch)
    return pool.layers


PARAMS = [
    GREEDY,
    SamplingParams(temperature=0, max_tokens=30),  # ends by EOS, if that comes
    SamplingParams(seed=1, temperature=1.5, max_tokens=25, stop_token_ids=list(range(0, 60, 5))),
    SamplingParams(seed=2, top_p=0.8, max_tokens=1),
    SamplingParams(seed=3, temperature=2.0, max_tokens=20, logit_bias={2: 4.0}),
    SamplingParams(seed=4, top_k=9, max_tokens=30, min_tokens=6, stop_token_ids=list(range(40))),
    SamplingParams(seed=5, temperature=1.2, max_tokens=15, n=3),
    SamplingParams(seed=6, max_tokens=9, logprobs=1),
    SamplingParams(seed=7, max_tokens=12, repetition_penalty=1.4),
]


@pytest.mark.parametrize("window", [None, 8, 1])
def test_every_request_gets_what_it_gets_alone(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bursts over a pool that is mostly too small, beginnings that are shared, and some who are given up."""
    keys = Keys(monkeypatch)
    flights = compared = preemptions = cached = 0
    for seed in range(4):
        draw = random.Random(seed)
        few = 18 if window is None else 8  # what the longest alone may need
        llm = llm_of(window, pages=few + draw.choice([0, 1, 5]), prefix_caching=seed > 0)
        engine, requests, cut = llm.engine, [], set()
        base = tokens_of((40,), seed=seed).tolist()
        while len(requests) < 14 or not engine.idle:
            for _ in range(draw.choice([0, 0, 1, 3]) if len(requests) < 14 else 0):
                prompt = base[: draw.choice([1, 4, 15, 16, 33, 40])] + draw.choice([[], [draw.randrange(67)]])
                kind = draw.choice(PARAMS[:6]) if draw.random() < 0.8 else draw.choice(PARAMS)
                requests.append(add(llm, prompt, kind, priority=draw.choice([0, 0, 1])))
            engine.step()
            engine.check()
            flights += engine._in_flight is not None
            if draw.random() < 0.1 and requests:
                request = draw.choice(requests)
                cut |= set() if request.finished else {request.id}
                engine.abort(request.id)
                assert not any(s.held for s in request.sequences)
                engine.check()
            if draw.random() < 0.2:
                compared += keys.check(engine.pool, engine.model, draw)
        assert engine.pool.held == 0
        assert engine._in_flight is None or all(s.ended for s, _ in engine._in_flight.plan)
        for request in requests:
            assert request.error is None
            for (mine, *why), (wanted, *because) in zip(got(request), alone(window, request), strict=True):
                assert mine == wanted[: len(mine)]
                assert request.id in cut or (mine, why) == (wanted, because)
        counts = engine.counts
        preemptions, cached = preemptions + counts.preemptions, cached + counts.cached_tokens
    assert flights > 60
    assert compared > 20
    assert preemptions > 3 or window == 1  # then everybody holds a page at most, once he is read
    assert cached > 30


def test_texts_and_stops_are_the_same() -> None:
    prompts = ["import os\n", "def add(a, b):\n", "class Stack:\n    ", "for i in "]
    params = [
        SamplingParams(temperature=0, max_tokens=20, stop=["\n\n", "return"]),
        SamplingParams(seed=1, max_tokens=24, stop=["e"], min_tokens=3),
        SamplingParams(seed=2, temperature=0.7, max_tokens=30, stop=["self", ":"]),
        SamplingParams(seed=3, max_tokens=25),
    ]
    llm = LLM("demo", EngineConfig(max_sequences=4, max_batch_tokens=64), dtype=torch.float32)
    wanted = llm.generate(prompts, params)
    llm.engine.forward.overlaps = True
    outputs = llm.generate(prompts, params)
    assert [r.outputs for r in outputs] == [r.outputs for r in wanted]
    assert {r.outputs[0].finish_reason for r in outputs} == {"stop", "length"}
    llm.engine.check()


def events_of(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    events: list[str] = []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            events.append(name)
            return function(*args)

        return call

    for name in ("_launch", "_process"):
        monkeypatch.setattr(engine, name, noted(name[1:], getattr(engine, name)))
    return events


def test_a_step_is_launched_before_the_tokens_of_the_last_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = llm_of()
    events = events_of(llm.engine, monkeypatch)
    request = add(llm, [1, 2, 3], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    finish(llm.engine)
    assert events == ["launch", "launch", "process", "launch", "process", "launch", "process", "process"]
    assert len(request.completions[0].token_ids) == 4
    assert llm.engine.counts.computed_tokens == 3 + 3  # its last token is known to be the last: nothing in vain


def test_on_a_cpu_nothing_is_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(MODELS[8], EngineConfig(max_sequences=2, max_batch_tokens=20, page_size=PAGE))
    events = events_of(llm.engine, monkeypatch)
    add(llm, [1, 2, 3], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    finish(llm.engine)
    assert events == ["launch", "process"] * 3


WAITING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "penalties": ({"presence_penalty": 0.5}, {}),
    "logprobs": ({"logprobs": 0}, {}),
    "log-probabilities of the prompt": ({"prompt_logprobs": 0}, {}),
    "guesses": ({}, {"speculation": Speculation(row_cost=0.01)}),
}


@pytest.mark.parametrize("what", WAITING)
def test_who_needs_tokens_gets_them_before_the_next_step(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside one who does not, and who goes ahead again as soon as the other has ended."""
    more, asked = WAITING[what]
    llm = llm_of()
    plain = add(llm, [1, 2, 3], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    for _ in range(3):
        llm.engine.step()
    other = add(
        llm, [3, 4, 5, 6] * 4, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, **more), **asked
    )
    while not other.finished:
        llm.engine.step()
        assert llm.engine._in_flight is None
    llm.engine.step()
    assert llm.engine._in_flight is not None
    finish(llm.engine)
    assert got(plain) == alone(8, plain)
    assert got(other) == alone(8, other)


def test_completions_go_ahead_once_they_have_forked() -> None:
    llm = llm_of(None)
    request = add(llm, [7] * 6, SamplingParams(seed=1, max_tokens=9, n=3, ignore_eos=True))
    llm.engine.step()
    assert llm.engine._in_flight is None
    llm.engine.step()
    assert llm.engine._in_flight is not None
    finish(llm.engine)
    assert got(request) == alone(None, request)


def test_embeddings_are_the_same() -> None:
    prompts = [tokens_of((n,), seed=n).tolist() for n in (3, 40)]
    wanted = [e.embedding for e in llm_of(ahead=False).embed(prompts)]
    llm = llm_of()
    add(llm, [1, 2], SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))
    assert [e.embedding for e in llm.embed(prompts)] == wanted


@pytest.mark.parametrize("window", [None, 8])
def test_pages_of_who_is_given_up_in_flight_go_to_the_next(window: int | None) -> None:
    """His row is on its way to a page that another has before it is read."""
    llm = llm_of(window, pages=12, prefix_caching=False)
    engine = llm.engine
    first = add(llm, [5] * 6, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    for _ in range(4):
        engine.step()
    assert engine._in_flight is not None
    his = set(first.sequences[0].held)
    engine.abort(first.id)
    assert engine.pool.held == 0
    second = add(llm, [9] * 21, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    engine.step()
    s = second.sequences[0]
    assert his & set(s.pages[: s.stop].tolist())
    finish(engine)
    assert got(second) == alone(window, second)
    assert got(first) == [(alone(window, first)[0][0][:3], "abort", None)]


def failing(monkeypatch: pytest.MonkeyPatch, engine: Engine, at: int) -> None:
    """Let the model fail in its `at`th step from now on."""
    real, steps = engine.forward.hidden, [0]

    def hidden(plan: Any, tokens: Tensor) -> Tensor:
        steps[0] += 1
        if steps[0] == at:
            raise RuntimeError("the model broke")
        return real(plan, tokens)

    monkeypatch.setattr(engine.forward, "hidden", hidden)


@pytest.mark.parametrize("at", range(1, 7))
def test_a_launch_that_fails_takes_nothing_from_what_was_launched_before(
    at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = Keys(monkeypatch)
    llm = llm_of(None)
    engine = llm.engine
    short = add(llm, [1, 2, 3], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    long = add(llm, [4] * 9, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    failing(monkeypatch, engine, at)
    finish(engine)
    wanted = {r.id: alone(None, r)[0] for r in (short, long)}
    for request in (short, long):
        if request is short and at >= 5:  # its last token was in flight, and nothing of it in the step that failed
            assert got(request) == [wanted[request.id]]
            assert request.error is None
            continue
        assert isinstance(request.error, EngineError)
        assert str(request.error.__cause__) == "the model broke"
        assert request.completions[0].token_ids == wanted[request.id][0][: at - 1]
    third = add(llm, [4] * 9)
    finish(engine)
    assert got(third) == alone(None, third)
    keys.check(engine.pool, engine.model, random.Random(0), 20)


def test_tokens_that_cannot_be_read_fail_their_own_requests_and_are_not_found_again() -> None:
    """An error of the device itself shows when somebody waits for it."""
    llm = llm_of(None)
    engine = llm.engine
    requests = [add(llm, [i] * 9, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)) for i in (4, 5)]
    for _ in range(3):
        engine.step()
    late = add(llm, [6] * 9)
    flight = engine._in_flight
    assert flight is not None

    class Lost:
        def __getitem__(self, places: Tensor) -> Tensor:
            return flight.tokens[places]

        def tolist(self) -> list[int]:
            raise RuntimeError("the device broke")

    engine._in_flight = InFlightStep(flight.plan, flight.picks, Lost(), flight.logits)  # type: ignore[arg-type]
    engine.step()
    assert all(str(r.error.__cause__) == "the device broke" for r in requests)  # type: ignore[union-attr]
    finish(engine)
    assert got(late) == alone(None, late)
    assert add(llm, [4] * 9).cached is None
    finish(engine)
    assert engine.counts.cached_tokens == 0


def test_logits_that_are_not_finite_end_their_own_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """-1 is sampled, and the next step has its row already."""
    llm = llm_of()
    engine, logits, steps = llm.engine, llm.engine.forward.logits, [0]

    def poison(hidden: Tensor, rows: Any) -> Tensor:
        out = logits(hidden, rows)
        steps[0] += 1
        if steps[0] == 3:
            out[1] = float("nan")
        return out

    monkeypatch.setattr(engine.forward, "logits", poison)
    good, bad, other = (add(llm, [i, 2, 3]) for i in range(3))
    finish(engine)
    assert isinstance(bad.error, GenerationError)
    assert got(bad)[0][0] == alone(8, bad)[0][0][:2]
    for request in (good, other):
        assert got(request) == alone(8, request)


def test_nobody_loses_pages_while_a_token_of_his_is_in_flight() -> None:
    """Pages are short at every other step; the assertion is the scheduler's own."""
    llm = llm_of(None, pages=10, prefix_caching=False)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    requests = [add(llm, [i] * (3 + i), params) for i in range(5)]
    finish(llm.engine)
    assert llm.engine.counts.preemptions > 5
    for request in requests:
        assert got(request) == alone(None, request)


def test_a_page_is_found_as_soon_as_its_last_token_was_read_and_not_before() -> None:
    llm = llm_of(None)
    engine = llm.engine
    request = add(llm, [3, 1, 4], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
    s, key = request.sequences[0], first_key(None, "0")
    seen = []
    while not request.finished:
        engine.step()
        tokens, computed = len(s.tokens), s.computed
        known = [i for i in range(2) if tokens >= PAGE * (i + 1) and _found(engine, key, s.tokens, i)]
        seen.append((min(tokens, computed) // PAGE, len(known)))
        assert len(engine.pool.page_of) == len(known)
    assert all(full == found for full, found in seen[:-1]), seen
    assert max(found for _, found in seen) == 2


def _found(engine: Engine, key: bytes, tokens: list[int], page: int) -> bool:
    for i in range(page + 1):
        key = next_key(key, tokens[i * PAGE : (i + 1) * PAGE])
    return engine.pool.find(key) is not None


def test_a_launch_asks_the_device_for_nothing() -> None:
    """On meta there are no values to ask for: two steps are launched, and what waits for them fails there."""
    model = Mistral7B(tiny_args(), device="meta").requires_grad_(False)
    config = EngineConfig(max_sequences=3, max_batch_tokens=40, page_size=PAGE)
    engine = Engine(model, PagePool(2, 3, 10, 20, PAGE, dtype=torch.bfloat16, device="meta"), config)
    engine.forward.overlaps = True
    reader = InputProcessor(engine, None, "there is none here")
    for n, params in enumerate([GREEDY, SamplingParams(seed=1, top_p=0.9, max_tokens=9, logit_bias={3: 1.0})]):
        engine.add(reader.text([1, 2, 3, 4, 5][n:], params, RequestOptions()))
    engine.step()
    assert engine._in_flight is not None
    with torch.inference_mode():
        second = engine._launch(engine.scheduler.plan(), None)
    assert second.tokens.shape == (2,)
    with pytest.raises(RuntimeError, match="meta"):  # the control
        second.tokens.tolist()


@pytest.mark.parametrize("window", [None, 2, 8])
def test_every_step_sees_in_its_pages_what_its_sequence_has_read(window: int | None) -> None:
    """By the automaton, which reads back all that is visible, in vain rows too."""
    flights = preemptions = 0
    for seed in range(6):
        draw, model = random.Random(seed), Automaton(window)
        engine = engine_of(model, draw.choice([9, 12, 18]), max_sequences=5, max_batch_tokens=20, page_size=PAGE)
        engine.forward.overlaps = True
        requests = []
        for _ in range(60):
            if draw.random() < 0.4:
                params = SamplingParams(
                    temperature=0, max_tokens=draw.choice([3, 12, 20]), ignore_eos=True,
                    stop_token_ids=[draw.randrange(V)], n=draw.choice([1, 1, 1, 2]),
                )  # fmt: skip
                requests.append(request_of(engine, [draw.randrange(3)] * draw.randint(1, 14), params))
                engine.add(requests[-1])
            engine.step()
            check(engine)
            flights += engine._in_flight is not None
            if requests and draw.random() < 0.1:
                engine.abort(draw.choice(requests).id)
        run(engine)
        preemptions += engine.counts.preemptions
        for request in requests:
            for c in request.completions:
                wanted = model.greedy(request.ids, c.max_tokens)
                assert c.token_ids == wanted[: len(c.token_ids)]
        assert engine.pool.held == 0
    assert flights > 100
    assert preemptions > 5 or window is not None
