"""A small engine over an automaton, for the tests of what goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from automaton import Automaton, engine_of, request_of, run
from torch import Tensor

from mistral_7b.engine.engine import Engine
from mistral_7b.engine.request import Request
from mistral_7b.sampling.params import SamplingParams

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


def small(model: Automaton | None = None, n_pages: int = 60, **config: Any) -> Engine:
    settings = {"max_sequences": 4, "max_batch_tokens": 16, "page_size": 4, **config}
    engine = engine_of(model or Automaton(8), n_pages, **settings)
    engine._fail_step = Engine._fail_step.__get__(engine)  # type: ignore[method-assign]
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
