"""What goes wrong in a step hits those that it concerns, says why, and leaves nothing behind."""

from __future__ import annotations

from multiprocessing import Pipe
from typing import Any

import numpy as np
import pytest
import torch
from automaton import Automaton, Oracle, check, request_of, run
from engines import GREEDY, add, broken, served, small
from torch import Tensor

from mistral_7b.engine.completion import TextPiece
from mistral_7b.engine.containment import request_error
from mistral_7b.engine.grammar.client import Masks
from mistral_7b.engine.request import Request
from mistral_7b.errors import EngineError, GenerationError
from mistral_7b.sampling.params import SamplingParams

# ------------------------------------------------------------------ the model fails


@pytest.mark.wording
def test_an_error_names_the_request_and_what_failed() -> None:
    request = request_of(small(), [1, 2], GREEDY)
    error = request_error(request, "the model's step", RuntimeError("the model broke"))
    assert str(error) == f"request {request.id}: the model's step failed: RuntimeError('the model broke')"


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
        assert str(request.error.__cause__) == "the model broke"
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
        assert requests[1].completions[0].token_ids == engine.model.greedy([7, 7, 7, 9], 3)


def test_logits_that_are_not_finite_after_a_rejected_draft_end_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
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


class _BrokenDrafts(Oracle):
    """Drafts that fail, or are no tokens."""

    def speculator(self, prompt: Any, max_length: int) -> Any:
        speculator = super().speculator(prompt, max_length)
        speculator.drafter.propose = self.propose  # type: ignore[method-assign]
        return speculator

    def propose(self, n: int, choose: Any) -> list[int]:
        raise RuntimeError("the drafter broke")


def test_a_drafter_that_fails_ends_its_own_request_alone() -> None:
    model = Automaton(8)
    engine = small(model)
    (good,) = add(engine, [1, 2, 3])
    (bad,) = add(engine, [3, 2, 1], speculation=_BrokenDrafts(model))
    served(engine, good)
    assert isinstance(bad.error, EngineError)
    assert "the drafter broke" in repr(bad.error.__cause__)


def test_a_draft_model_whose_logits_are_not_finite_costs_nobody_anything() -> None:
    model = Automaton(8)

    class NotFinite(_BrokenDrafts):
        def propose(self, n: int, choose: Any) -> list[int]:
            return [choose(torch.full((1, 11), float("nan")), []) for _ in range(n)]

    engine = small(model)
    requests = add(engine, [1, 2, 3], [3, 2, 1], speculation=NotFinite(model))
    served(engine, *requests)


class _BrokenGrammar:
    """A grammar that fails after some tokens, and until then allows everything."""

    over = late = False

    def __init__(self, error: Exception, after: int) -> None:
        self.error, self.after = error, after
        self.answer: Masks | None = None

    def ask(self, draft: Any) -> None:
        self.answer = Masks([np.full(1, -1, dtype=np.int32)] * (1 + len(draft)), [False] * len(draft))

    def wait(self, timeout: float) -> bool:
        if self.after == 0:
            raise self.error
        return True

    def take(self, tokens: list[int]) -> None:
        self.answer = None
        self.after -= len(tokens)


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
    again = add(engine, [5, 4, 3, 2, 1, 2, 3, 4, 5])
    served(engine, *again)


class _LateGrammar(_BrokenGrammar):
    """A grammar that allows everything, and of whose answers some come late: after so many waits."""

    def __init__(self, waits: list[int], most: int = 10**6) -> None:
        super().__init__(GenerationError("never"), most)
        self.waits, self.left = waits, 0
        self._connection, self._other = Pipe()

    @property
    def over(self) -> bool:  # type: ignore[override]
        return self.after <= 0

    def _late(self) -> None:
        self.left = self.waits.pop(0) if self.waits else 0
        self.late = True

    def ask(self, draft: Any) -> None:
        assert not self.late, "one question at a time"
        self.draft = draft
        self.asking = True
        self._late()

    def take(self, tokens: list[int]) -> None:
        super().take(tokens)
        self.asking = False
        self._late()

    def wait(self, timeout: float) -> bool:
        self.late = self.left > 0
        self.left -= 1
        if not self.late and self.asking:
            super().ask(self.draft)
        return not self.late


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("waits", [[3, 0, 0, 2], [0, 5], [1] * 20])
def test_a_late_grammar_changes_no_token_and_holds_up_no_other(n: int, waits: list[int]) -> None:
    """Late with masks, and with whether the text is over; for one completion, and for three from one row."""
    engine = small(max_sequences=6)
    (good,) = add(engine, [1, 2, 3, 4, 5])
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, n=n)
    slow = request_of(engine, [5, 4, 3, 2, 1, 2, 3, 4, 5], params)
    for i, s in enumerate(slow.sequences):
        s.grammar = _LateGrammar(list(waits) if i else [0] * 4 + waits)  # type: ignore[assignment]
    engine.add(slow)
    steps = 0
    while not good.finished:
        engine.step()
        check(engine)
        steps += 1
    assert steps <= 14, "it waits for another's grammar"
    served(engine, good, slow)


def test_a_late_grammar_may_say_that_the_text_is_over() -> None:
    engine = small()
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    slow = request_of(engine, [5, 4, 3], params)
    slow.sequences[0].grammar = _LateGrammar([0, 0, 0, 4], most=2)  # type: ignore[assignment]
    engine.add(slow)
    run(engine)
    assert slow.error is None
    assert slow.completions[0].finish_reason == "stop"
    assert slow.completions[0].token_ids == engine.model.greedy([5, 4, 3], 2)


# ------------------------------------------------------------------ what takes the output fails


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
