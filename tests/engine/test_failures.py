"""What goes wrong hits those that it concerns, says why, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from automaton import Automaton, Oracle, check, engine_of, request_of, run
from torch import Tensor

from mistral_7b.completion import TextPiece
from mistral_7b.engine.config import EngineConfig
from mistral_7b.engine.engine import Engine
from mistral_7b.engine.llm import LLM, RequestsFailedError
from mistral_7b.engine.request import Request
from mistral_7b.errors import AdapterError, ConfigError, EngineError, GenerationError, QueueFullError
from mistral_7b.sampling import SamplingParams
from mistral_7b.speculation import Speculation

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


def small(model: Automaton | None = None, n_pages: int = 60, **config: Any) -> Engine:
    settings = {"max_sequences": 4, "max_batch_tokens": 16, "page_size": 4, **config}
    engine = engine_of(model or Automaton(8), n_pages, **settings)
    engine._fail = Engine._fail.__get__(engine)  # type: ignore[method-assign]
    return engine


def add(engine: Engine, *prompts: list[int], params: SamplingParams = GREEDY, **asked: Any) -> list[Request]:
    requests = [request_of(engine, prompt, params, **asked) for prompt in prompts]
    for request in requests:
        engine.add(request)
    return requests


def served(engine: Engine, *requests: Request) -> None:
    """AssertionError unless these have come to a good end, as if nothing had happened beside them."""
    run(engine)
    for request in requests:
        assert request.error is None
        wanted = engine.model.greedy(request.ids, 12)  # type: ignore[operator]
        assert [c.token_ids for c in request.completions] == [wanted] * request.params.n
    assert engine.pool.held == 0
    assert engine.idle


def broken(monkeypatch: pytest.MonkeyPatch, engine: Engine, when: Callable[[Tensor], bool]) -> list[int]:
    """Let the model fail in steps whose tokens `when` says; the list counts them."""
    hidden, times = engine.model.hidden, [0]

    def failing(tokens: Tensor, batch: Any) -> Tensor:
        if when(tokens):
            times[0] += 1
            raise RuntimeError("the model broke")
        return hidden(tokens, batch)

    monkeypatch.setattr(engine.model, "hidden", failing)
    return times


# ------------------------------------------------------------------ the model fails


def test_a_step_that_fails_ends_its_own_requests_with_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = small(max_sequences=2)
    first, second, third = add(engine, [1, 2, 3], [4] * 30, [5, 6])
    steps = [0]

    def third_step(tokens: Tensor) -> bool:
        steps[0] += 1
        return steps[0] == 3

    broken(monkeypatch, engine, third_step)
    for _ in range(3):
        engine.step()
        check(engine)
    for request in (first, second):
        assert request.finished
        assert isinstance(request.error, EngineError)
        assert isinstance(request.error.__cause__, RuntimeError)
        assert request.id in str(request.error)
        assert "the model broke" in str(request.error)
        assert request.output().error is request.error
    assert not third.finished
    assert first.completions[0].token_ids == engine.model.greedy(first.ids, 12)[:2]  # what had come is not lost
    later = add(engine, [1, 2, 3])
    served(engine, third, *later)
    assert engine.counts.finished == {"error": 2, "length": 2}


def test_a_model_that_always_fails_fails_everyone_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = small()
    requests = add(engine, *([i, i + 1] for i in range(9)), params=SamplingParams(max_tokens=3, n=2))
    broken(monkeypatch, engine, lambda tokens: True)
    run(engine)
    assert all(isinstance(r.error, EngineError) for r in requests)
    assert engine.pool.held == 0


def test_logits_that_are_not_finite_fail_one_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = small(prefix_caching=False)
    logits = engine.model.logits
    for bad in (float("nan"), float("inf")):
        requests = add(engine, [1, 2, 3], [7, 7, 7, 9], [4, 5])
        poisoned = engine.model.number_of(requests[1].ids + engine.model.greedy(requests[1].ids, 3))

        def poison(hidden: Tensor, at: int = poisoned, bad: float = bad) -> Tensor:
            out = logits(hidden)
            out[hidden[:, 0] == at, 3] = bad
            return out

        monkeypatch.setattr(engine.model, "logits", poison)
        served(engine, requests[0], requests[2])
        assert isinstance(requests[1].error, GenerationError)
        assert "not finite" in str(requests[1].error)
        assert requests[1].completions[0].token_ids == engine.model.greedy([7, 7, 7, 9], 3)


def test_logits_that_are_not_finite_after_a_wrong_guess_matter_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Automaton(8)
    engine = small(model)
    logits = model.logits
    prompt = [1, 2, 3]
    text = prompt + model.greedy(prompt, 12)
    right = {model.number_of(text[:n]) for n in range(len(text) + 1)}

    def poison(hidden: Tensor) -> Tensor:
        out = logits(hidden)
        wrong = [i for i, number in enumerate(hidden[:, 0].tolist()) if int(number) not in right]
        out[wrong] = float("nan")
        return out

    monkeypatch.setattr(model, "logits", poison)
    (request,) = add(engine, prompt, speculation=Oracle(model, wrong=2))
    served(engine, request)
    assert engine.counts.drafted_tokens > engine.counts.accepted_tokens > 0


class _BrokenGuesses(Oracle):
    """Guesses that fail, or are no tokens."""

    def guesser(self, prompt: Any, room: int) -> Any:
        guesser = super().guesser(prompt, room)
        guesser.drafter.propose = self.propose  # type: ignore[method-assign]
        return guesser

    def propose(self, n: int, choose: Any) -> list[int]:
        raise RuntimeError("the drafter broke")


def test_a_drafter_that_fails_ends_its_own_request_alone() -> None:
    model = Automaton(8)
    engine = small(model)
    (good,) = add(engine, [1, 2, 3])
    (bad,) = add(engine, [3, 2, 1], speculation=_BrokenGuesses(model))
    served(engine, good)
    assert isinstance(bad.error, EngineError)
    assert "the drafter broke" in repr(bad.error.__cause__)


def test_a_draft_model_whose_logits_are_not_finite_costs_nobody_anything() -> None:
    model = Automaton(8)

    class NotFinite(_BrokenGuesses):
        def propose(self, n: int, choose: Any) -> list[int]:
            return [choose(torch.full((1, 11), float("nan")), []) for _ in range(n)]

    engine = small(model)
    requests = add(engine, [1, 2, 3], [3, 2, 1], speculation=NotFinite(model))
    served(engine, *requests)


class _BrokenGrammar:
    """A grammar that fails after some tokens, and until then allows everything."""

    finished = False

    def __init__(self, error: Exception, after: int) -> None:
        self.error, self.after = error, after

    def masks(self, draft: Any) -> tuple[list[np.ndarray], int]:
        if self.after == 0:
            raise self.error
        return [np.full(1, -1, dtype=np.int32)] * (1 + len(draft)), len(draft)

    def accept(self, token: int) -> None:
        self.after -= 1


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("n", [1, 2])
def test_a_grammar_that_fails_ends_its_own_request_alone(after: int, n: int) -> None:
    engine = small()
    (good,) = add(engine, [1, 2, 3, 4, 5])
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, n=n)
    bad = request_of(engine, [5, 4, 3, 2, 1, 2, 3, 4, 5], params)
    for s in bad.sequences:
        s.grammar = _BrokenGrammar(GenerationError("no way on"), after)
    engine.add(bad)
    served(engine, good)
    assert isinstance(bad.error, GenerationError)
    assert "no way on" in str(bad.error)
    again = add(engine, [5, 4, 3, 2, 1, 2, 3, 4, 5])
    served(engine, *again)


# ------------------------------------------------------------------ whoever takes the output fails


def test_a_sink_that_fails_loses_its_own_request_and_no_other() -> None:
    engine = small()
    seen: list[TextPiece] = []

    def sink(request: Request, pieces: list[TextPiece]) -> None:
        seen.extend(pieces)
        if len(seen) == 3:
            raise ValueError("full")

    bad, good = (request_of(engine, prompt, GREEDY) for prompt in ([1, 2, 3], [4, 5, 6]))
    bad.sink = sink
    engine.add(bad)
    engine.add(good)
    served(engine, good)
    assert bad.finished
    assert isinstance(bad.error, EngineError)
    assert isinstance(bad.error.__cause__, ValueError)
    assert len(seen) == 3


def test_a_sink_that_fails_at_the_end_says_so() -> None:
    engine = small()

    def sink(request: Request, pieces: list[TextPiece]) -> None:
        if request.finished:
            raise ValueError("gone")

    (request,) = (request_of(engine, [1, 2], GREEDY),)
    request.sink = sink
    engine.add(request)
    run(engine)
    assert isinstance(request.error, EngineError)
    assert len(request.completions[0].token_ids) == 12


@pytest.mark.parametrize("whom", ["itself", "the next", "one that waits"])
def test_a_sink_may_end_requests(whom: str) -> None:
    engine = small(max_sequences=2)
    requests = [request_of(engine, [i, i + 1], GREEDY) for i in range(4)]
    victim = {"itself": 0, "the next": 1, "one that waits": 3}[whom]

    def sink(request: Request, pieces: list[TextPiece]) -> None:
        if len(request.completions[0].token_ids) == 4:
            engine.abort(requests[victim].id)
            check(engine)

    requests[0].sink = sink
    for request in requests:
        engine.add(request)
    served(engine, *(r for i, r in enumerate(requests) if i != victim))
    assert requests[victim].finished
    assert engine.counts.finished == {"abort": 1, "length": 3}


def test_a_sink_may_add_requests() -> None:
    engine = small()
    later = request_of(engine, [9, 9, 9], GREEDY)

    def sink(request: Request, pieces: list[TextPiece]) -> None:
        if request.finished:
            engine.add(later)

    (first,) = (request_of(engine, [1, 2], GREEDY),)
    first.sink = sink
    engine.add(first)
    served(engine, first, later)


# ------------------------------------------------------------------ what cannot be served


def test_what_can_never_be_computed_is_refused_and_leaves_nothing() -> None:
    model = Automaton(None)
    engine = small(model, n_pages=5)  # 20 tokens
    fits = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
    (request,) = add(engine, [1] * 10, params=fits)
    for prompt, params, said in (
        ([1] * 11, fits, "6 pages of 4 tokens, and the engine has 5"),
        ([1] * 10, SamplingParams(max_tokens=11), "6 pages"),
        ([1], SamplingParams(n=5, max_tokens=1), "n=5"),
    ):
        with pytest.raises(EngineError, match=said):
            request_of(engine, prompt, params)
    with pytest.raises(GenerationError, match="empty"):
        request_of(engine, [], fits)
    with pytest.raises(GenerationError, match="no token"):
        request_of(engine, [11], fits)
    with pytest.raises(AdapterError, match="no adapter 'french'"):
        request_of(engine, [1], fits, adapter="french")
    with pytest.raises(GenerationError, match="need a tokenizer"):
        request_of(engine, [1], SamplingParams(stop="x"))
    run(engine)
    assert request.completions[0].token_ids == model.greedy([1] * 10, 10)


def test_a_window_lets_a_long_request_through_a_small_pool() -> None:
    model = Automaton(8)
    engine = small(model, n_pages=7, max_batch_tokens=16)
    params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    requests = add(engine, list(range(11)) * 10, [3] * 100, params=params)
    run(engine)
    for request in requests:
        assert request.completions[0].token_ids == model.greedy(request.ids, 60)
    with pytest.raises(EngineError, match="pages"):
        request_of(small(model, n_pages=6, max_batch_tokens=16), [1] * 100, GREEDY)


def test_a_pool_for_one_serves_any_number_one_after_another() -> None:
    model = Automaton(None)
    engine = small(model, n_pages=4)
    requests = add(engine, *([i, 4, 2, i] for i in range(8)))
    served(engine, *requests)
    requests = add(engine, [5, 4, 3, 2], params=SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, n=4))
    served(engine, *requests)
    assert engine.counts.preemptions > 0


def test_two_requests_of_one_name_and_a_full_queue() -> None:
    engine = small(max_sequences=1, max_waiting=2)
    (first,) = add(engine, [1, 2], request_id="same")
    with pytest.raises(EngineError, match="'same' is running"):
        add(engine, [3, 4], request_id="same")
    (second,) = add(engine, [3, 4])
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        add(engine, [5, 6])
    engine.step()
    (third,) = add(engine, [5, 6])
    engine.abort(second.id)
    (fourth,) = add(engine, [7, 8])
    served(engine, first, third, fourth)
    (again,) = add(engine, [1, 2], request_id="same")
    served(engine, again)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_sequences": 0}, {"max_batch_tokens": 0}, {"page_size": 0}, {"max_waiting": 0}, {"kv_cache_bytes": 0},
        {"max_sequences": 2.0}, {"page_size": True}, {"kv_dtype": "fp8"}, {"max_sequences": 250},
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        EngineConfig(**wrong)


# ------------------------------------------------------------------ LLM


def llm_of(engine: Engine) -> LLM:
    from mistral_7b.engine.reading import Reader

    llm = object.__new__(LLM)
    llm.reader, llm.engine = Reader(engine, None, "there is none here"), engine
    return llm


def test_llm_says_which_of_many_failed_and_has_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = small(max_sequences=1)
    broken(monkeypatch, engine, lambda tokens: 9 in tokens.tolist())
    params = SamplingParams(max_tokens=2, temperature=0, logit_bias={9: -100})
    with pytest.raises(RequestsFailedError, match=r"1 of 3 requests failed.*the model broke") as caught:
        llm_of(engine).generate([[1, 1, 1, 1], [9], [2, 2]], params)
    outputs = caught.value.outputs
    assert [o.error is None for o in outputs] == [True, False, True]
    assert all(o.finished for o in outputs)
    assert outputs[1].outputs[0].token_ids == []
    assert len(outputs[2].outputs[0].token_ids) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_llm_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, error: type) -> None:
    engine = small(max_sequences=2)
    llm, hidden, steps = llm_of(engine), engine.model.hidden, [0]

    def interrupted(tokens: Tensor, batch: Any) -> Tensor:
        steps[0] += 1
        if steps[0] == 4:
            raise error
        return hidden(tokens, batch)

    monkeypatch.setattr(engine.model, "hidden", interrupted)
    prompts = [[i, 3] for i in range(6)]
    with pytest.raises(error):
        llm.generate(prompts, GREEDY, request_id="mine")
    assert engine.idle
    check(engine)
    assert engine.scheduler.waiting == 0
    outputs = llm.generate(prompts, GREEDY, request_id="mine")
    assert [o.outputs[0].token_ids for o in outputs] == [engine.model.greedy(p, 12) for p in prompts]


def test_an_interrupt_in_the_callback_leaves_nothing_behind() -> None:
    engine = small()

    def on_output(request: Request, pieces: list[TextPiece]) -> None:
        if pieces:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm_of(engine).generate([[1, 2], [3]], GREEDY, on_output=on_output)
    assert engine.idle
    check(engine)


def test_one_bad_prompt_of_many_costs_nothing() -> None:
    engine = small()
    llm = llm_of(engine)
    for prompts, said in (([[1], []], "prompt 1 is empty"), ([[1], [2], [99]], "prompt 2")):
        with pytest.raises(GenerationError, match=said):
            llm.generate(prompts, GREEDY)
    with pytest.raises(EngineError, match="prompt 1: n=5"):
        llm.generate([[1], [2]], [GREEDY, SamplingParams(n=5)])
    assert engine.idle
    assert engine.counts.steps == 0
    assert llm.generate([], GREEDY) == []


def test_more_prompts_than_may_wait_are_fed_as_there_is_room() -> None:
    engine = small(max_sequences=1, max_waiting=1)
    prompts = [[i % 11, 3] for i in range(20)]
    outputs = llm_of(engine).generate(prompts, GREEDY)
    assert [o.outputs[0].token_ids for o in outputs] == [engine.model.greedy(p, 12) for p in prompts]


def test_a_name_twice_in_one_call_ends_the_call_and_leaves_nothing() -> None:
    from mistral_7b.engine.reading import Asked

    engine = small()
    with pytest.raises(EngineError, match="running already"):
        llm_of(engine).generate([[1], [2]], GREEDY, asked=[Asked("a"), Asked("a")])
    assert engine.idle
    check(engine)


def test_prompt_lookup_in_the_engine_is_measured_only_with_the_engine() -> None:
    """Speculation that a request brings itself works without the engine's own."""
    engine = small()
    requests = add(engine, [1, 2, 3, 1, 2, 3], speculation=Speculation())
    served(engine, *requests)
