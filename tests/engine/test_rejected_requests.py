"""What cannot be served is refused and leaves nothing; an LLM that is interrupted leaves nothing either."""

from __future__ import annotations

from typing import Any

import pytest
from automaton import Automaton, check, request_of, run
from engines import GREEDY, add, broken, served, small
from refusals import refused
from torch import Tensor

from mistral_7b.engine.completion import TextPiece
from mistral_7b.engine.config import EngineConfig
from mistral_7b.engine.engine import Engine
from mistral_7b.engine.inputs import InputProcessor, RequestOptions
from mistral_7b.engine.llm import LLM, RequestsFailedError
from mistral_7b.engine.request import Request
from mistral_7b.engine.speculation import Speculation
from mistral_7b.errors import (
    AdapterError,
    ConfigError,
    EngineError,
    GenerationError,
    PromptTooLongError,
    QueueFullError,
)
from mistral_7b.sampling.params import SamplingParams


def test_what_can_never_be_computed_is_refused_and_leaves_nothing() -> None:
    model = Automaton(None)
    engine = small(model, n_pages=5)  # 20 tokens
    fits = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
    (request,) = add(engine, [1] * 10, params=fits)
    for prompt, params, field in (
        ([1] * 11, fits, "prompt"),
        ([1] * 10, SamplingParams(max_tokens=11), "prompt"),
        ([1], SamplingParams(n=5, max_tokens=1), "n"),
    ):
        with refused(EngineError, field=field):
            request_of(engine, prompt, params)
    for prompt in ([], [11]):
        with refused(GenerationError, field="prompt"):
            request_of(engine, prompt, fits)
    with refused(AdapterError, field="adapter"):
        request_of(engine, [1], fits, adapter="french")
    with refused(GenerationError, field="stop"):
        request_of(engine, [1], SamplingParams(stop="x"))
    run(engine)
    assert request.completions[0].token_ids == model.greedy([1] * 10, 10)


def test_without_a_limit_a_completion_is_as_long_as_there_is_memory() -> None:
    engine = small(Automaton(None), n_pages=5)  # 20 tokens, of a longer context
    endless = SamplingParams(max_tokens=None, temperature=0, ignore_eos=True)
    (request,) = add(engine, [1] * 12, params=endless)
    run(engine)
    assert (len(request.completions[0].token_ids), request.completions[0].finish_reason) == (8, "length")
    with refused(PromptTooLongError, field="prompt"):
        request_of(engine, [1] * 20, endless)


def test_a_window_lets_a_long_request_through_a_small_pool() -> None:
    model = Automaton(8)
    engine = small(model, n_pages=7, max_batch_tokens=16)
    params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    requests = add(engine, list(range(11)) * 10, [3] * 100, params=params)
    run(engine)
    for request in requests:
        assert request.completions[0].token_ids == model.greedy(request.ids, 60)
    with refused(EngineError, field="prompt"):
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
    with refused(EngineError, field="request_id"):
        add(engine, [3, 4], request_id="same")
    (second,) = add(engine, [3, 4])
    with pytest.raises(QueueFullError):
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
    with refused(ConfigError, field="max_batch_tokens" if wrong == {"max_sequences": 250} else next(iter(wrong))):
        EngineConfig(**wrong)


# ------------------------------------------------------------------ LLM


def llm_of(engine: Engine) -> LLM:
    llm = object.__new__(LLM)
    llm.inputs, llm.engine = InputProcessor(engine, None, "there is none here"), engine
    return llm


def test_llm_says_which_of_many_failed_and_has_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = small(max_sequences=1)
    broken(monkeypatch, engine, lambda tokens: 9 in tokens.tolist())
    params = SamplingParams(max_tokens=2, temperature=0, logit_bias={9: -100})
    with pytest.raises(RequestsFailedError) as caught:
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
    for prompts in ([[1], []], [[1], [2], [99]]):
        with refused(GenerationError, field="prompt"):
            llm.generate(prompts, GREEDY)
    with refused(EngineError, field="n"):
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
    engine = small()
    with refused(EngineError, field="request_id"):
        llm_of(engine).generate([[1], [2]], GREEDY, asked=[RequestOptions("a"), RequestOptions("a")])
    assert engine.idle
    check(engine)


def test_prompt_lookup_in_the_engine_is_measured_only_with_the_engine() -> None:
    """Speculation that a request brings itself works without the engine's own."""
    engine = small()
    requests = add(engine, [1, 2, 3, 1, 2, 3], speculation=Speculation())
    served(engine, *requests)
