"""Requests that record or steer in the running batch: their results, and those of their neighbours."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from refusals import refused
from tiny import tiny_args, tiny_model, tokens_of
from torch import Tensor

from mistral_7b import LLM, SamplingParams
from mistral_7b.activations.tape import Tape
from mistral_7b.engine.completion import RequestOutput
from mistral_7b.engine.config import EngineConfig
from mistral_7b.engine.inputs import RequestOptions
from mistral_7b.engine.llm import RequestsFailedError
from mistral_7b.engine.resume import job_of
from mistral_7b.engine.speculation import Speculation
from mistral_7b.engine.watching import PositionRecorder, Steering
from mistral_7b.errors import EngineError, InterpretError
from mistral_7b.generate import generate
from mistral_7b.lora.files import Adapter, Factors
from mistral_7b.model import Mistral7B
from mistral_7b.quantization import Scheme, quantize

PROMPTS = [tokens_of((n,), seed=n).tolist() for n in (19, 3, 30, 1)]
PARAMS = SamplingParams(temperature=0, max_tokens=12, logprobs=3, ignore_eos=True)
VECTOR = torch.randn(40, generator=torch.Generator().manual_seed(0))
KINDS = ["int8", "int4", "bfloat16", "int8 keys", "int8 without a window"]
POINTS = ["embedding", "residual", "q", "attention", "z", "ffn", "norm"]
PLAIN = RequestOptions()


@functools.cache
def model_of(kind: str) -> Mistral7B:
    changes: dict[str, Any] = {"head_dim": 16} if kind == "bfloat16" else {}
    changes |= {"sliding_window": None} if "without" in kind else {}
    model = tiny_model(tiny_args(**changes), torch.bfloat16)
    name = kind.split()[0]
    return quantize(model, Scheme("bf16", deterministic=True) if name == "bfloat16" else Scheme(name))


def llm_of(kind: str, adapters: Any = None, **config: Any) -> LLM:
    settings = {"max_batch_tokens": 16, "page_size": 4, "max_sequences": 4, **config}
    kv = {"kv_dtype": "int8"} if kind == "int8 keys" else {}
    return LLM(model_of(kind), EngineConfig(**settings, **kv), adapters=adapters)


def results(outputs: list[RequestOutput]) -> list[Any]:
    return [(c.token_ids, c.logprobs) for o in outputs for c in o.outputs]


def alone(kind: str, output: RequestOutput) -> Tape:
    """The recording of the same tokens by the model itself, in one forward."""
    model = model_of(kind)
    tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids[:-1]]
    with torch.inference_mode(), model.record(*POINTS) as tape:
        model(torch.tensor([tokens]), model.rolling_cache(kv_dtype=torch.int8 if kind == "int8 keys" else None))
    return tape


def same(recorded: Tape | None, wanted: Tape, exact: bool = True) -> None:
    assert recorded is not None
    assert set(recorded) == set(wanted)
    for place in wanted:
        if exact and place[0] != "attention":  # the weights' float32 sums are in another order
            assert torch.equal(recorded[place], wanted[place][0]), place
        else:
            torch.testing.assert_close(recorded[place], wanted[place][0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_keep_their_bits(kind: str) -> None:
    """And the request that records gets the same tokens, and what the model itself records."""
    wanted = results(llm_of(kind).generate(PROMPTS, PARAMS))
    record, steer = RequestOptions(record=POINTS), RequestOptions(steer=Steering(0, VECTOR, 8))
    beside = llm_of(kind).generate(PROMPTS, PARAMS, asked=[record, PLAIN, record, PLAIN])
    assert results(beside) == wanted
    for output, recorded in zip(beside, (True, False, True, False), strict=True):
        if recorded:
            same(output.recorded, alone(kind, output), exact=kind != "bfloat16")
        else:
            assert output.recorded is None
    steered = llm_of(kind).generate(PROMPTS, PARAMS, asked=[PLAIN, steer, record, steer])
    assert [a == b for a, b in zip(results(steered), wanted, strict=True)] == [True, False, True, False]


def test_neighbours_with_adapters_keep_their_bits() -> None:
    draw = torch.Generator().manual_seed(1)
    wq = Factors(torch.randn(4, 40, generator=draw), torch.randn(60, 4, generator=draw), 0.3)
    adapters, wide = {"own": Adapter({"layers.0.attention.wq": wq})}, RequestOptions(adapter="own")
    asked = [wide, PLAIN, wide, PLAIN]
    wanted = results(llm_of("int8", adapters).generate(PROMPTS, PARAMS, asked=asked))
    record = RequestOptions(record="residual", adapter="own")
    assert results(llm_of("int8", adapters).generate(PROMPTS, PARAMS, asked=[record, *asked[1:]])) == wanted
    assert wanted != results(llm_of("int8").generate(PROMPTS, PARAMS))


def test_steering_is_that_of_the_model_and_of_these_positions() -> None:
    for positions in (None, slice(5, None), slice(2, 9), [4, 20]):
        (output,) = llm_of("int8").generate(
            [PROMPTS[0]], PARAMS, record="residual", steer=[Steering(0, VECTOR.tolist(), 3.0, positions)]
        )
        model, tokens = model_of("int8"), [*PROMPTS[0], *output.outputs[0].token_ids[:-1]]
        with (
            torch.inference_mode(),
            model.steer(0, VECTOR, scale=3.0, positions=positions),
            model.record() as tape,
        ):
            model(torch.tensor([tokens]), model.rolling_cache())
        assert output.recorded is not None
        assert torch.equal(output.recorded["residual"], tape["residual"][:, 0])


@pytest.mark.parametrize("config", [
    {"kv_cache_bytes": 1},  # set below: so few pages that requests are preempted
    {"speculation": Speculation(max_draft=3, row_cost=0.0)},
    {"max_batch_tokens": 8},
], ids=["preempted", "speculation", "chunks"])  # fmt: skip
def test_each_position_is_recorded_once_however_it_was_computed(config: dict[str, Any]) -> None:
    kind = "int8 without a window"
    prompts = [(p * 10)[:20] for p in ([5, 9, 5, 7], [3, 3, 1], [8, 2])]  # they repeat: drafts are accepted
    if "kv_cache_bytes" in config:
        whole = llm_of(kind, kv_cache_bytes=1 << 20)
        config = {"kv_cache_bytes": (1 << 20) // whole.engine.pool.n_pages * 17}
    llm = llm_of(kind, **config)
    outputs = llm.generate(prompts, PARAMS, record=POINTS)
    counts = llm.engine.counts
    assert counts.preemptions or "kv_cache_bytes" not in config
    assert counts.drafted_tokens > counts.accepted_tokens > 0 or "speculation" not in config
    for output in outputs:
        assert output.recorded is not None
        assert output.recorded["residual", 0].shape == (31, 40)
        same(output.recorded, alone(kind, output))


def test_what_records_computes_its_prompt_and_what_is_steered_shares_with_its_equals(tmp_path: Any) -> None:
    steer, other = Steering(1, VECTOR, 4), Steering(1, VECTOR, 4.5)
    for config in ({}, {"prefix_cache": str(tmp_path)}):
        llm, prompt = llm_of("int8", kv_cache_bytes=1 << 20, **config), PROMPTS[2]

        def cached(llm: LLM = llm, prompt: list[int] = prompt, **fields: Any) -> int:
            return llm.generate([prompt], PARAMS, **fields)[0].num_cached_tokens

        assert cached() == 0
        assert cached() == 28
        assert cached(record="residual") == 0
        assert cached(steer=steer) == 0
        assert cached(steer=steer) == 28
        assert cached(steer=steer, record="residual") == 0
        assert cached(steer=other) == 0
        assert cached(steer=[steer, steer]) == 0
        assert cached(cache_salt="a") == 0
        assert cached() == 28


def test_pages_on_disk_are_not_shared_with_the_steered(tmp_path: Any) -> None:
    def cached(**fields: Any) -> int:
        llm = llm_of("int8", prefix_cache=str(tmp_path))
        (output,) = llm.generate([PROMPTS[2]], PARAMS, **fields)
        llm.engine.scheduler._finalize()  # type: ignore[attr-defined]
        return output.num_cached_tokens

    steer = Steering(1, VECTOR, 4)
    assert [cached(), cached(steer=steer), cached(), cached(steer=steer)] == [0, 0, 28, 28]


def test_wrong_requests_are_refused_before_they_are_queued() -> None:
    llm = llm_of("int8")
    for field, fields in (
        ("record", {"record": "residul"}),
        ("record", {"record": [("residual", 2)]}),
        ("record", {"record": "logits"}),
        ("record", {"record": "residual", "n": 2}),
        ("steer[0].layer", {"steer": Steering(2, VECTOR)}),
        ("steer[0].vector", {"steer": Steering(0, VECTOR[:39])}),
        ("steer[0].vector", {"steer": Steering(0, [float("nan")] * 40)}),
        ("steer[0].vector", {"steer": Steering(0, VECTOR, float("inf"))}),
        ("steer[0].positions", {"steer": Steering(0, VECTOR, positions=[-1])}),
    ):
        with refused(InterpretError, field=field):
            llm.generate([PROMPTS[0]], max_tokens=2, **fields)
    with refused(InterpretError, field="record"):
        llm.embed([PROMPTS[0]], record="residual")
    assert llm.embed([PROMPTS[0]], steer=Steering(0, VECTOR))[0] != llm.embed([PROMPTS[0]])[0]
    assert llm.engine.idle


def test_a_request_that_is_watched_has_no_job_for_other_engines() -> None:
    inputs = llm_of("int8").inputs
    for field, options in (
        ("record", RequestOptions(record=["residual"])),
        ("steer", RequestOptions(steer=[Steering(0, VECTOR)])),
    ):
        with refused(InterpretError, field=field):
            job_of(inputs.text(PROMPTS[0], PARAMS, options), "a")


def test_a_watcher_that_fails_ends_its_own_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: PositionRecorder, point: str, layer: int | None, x: Tensor, positions: Tensor) -> Tensor:
        raise MemoryError("no memory for it")

    wanted = results(llm_of("int8").generate(PROMPTS, PARAMS))
    monkeypatch.setattr(PositionRecorder, "see", failing)
    llm = llm_of("int8")
    with pytest.raises(RequestsFailedError) as caught:
        llm.generate(PROMPTS, PARAMS, asked=[PLAIN, RequestOptions(record="z"), PLAIN, PLAIN])
    outputs = caught.value.outputs
    assert [type(o.error) for o in outputs] == [type(None), EngineError, type(None), type(None)]
    assert [r for i, r in enumerate(results(outputs)) if i != 1] == [r for i, r in enumerate(wanted) if i != 1]
    llm.engine.check()


@pytest.mark.parametrize("value", [3.4e38, 1e25])
def test_steering_without_bounds_ends_its_own_request(value: float) -> None:
    """Finite, and yet too much for bfloat16, or for a norm's sum of squares."""
    wanted, huge = results(llm_of("int8").generate(PROMPTS, PARAMS)), torch.full((40,), value)
    llm, steer = llm_of("int8"), [Steering(0, VECTOR), Steering(0, huge)]
    with pytest.raises(RequestsFailedError) as caught:
        llm.generate(PROMPTS, PARAMS, asked=[PLAIN, RequestOptions(steer=steer), PLAIN, PLAIN])
    outputs = caught.value.outputs
    assert [type(o.error) for o in outputs] == [type(None), InterpretError, type(None), type(None)]
    assert isinstance(outputs[1].error, InterpretError)
    assert outputs[1].error.field == "steer[1].vector"
    assert [r for i, r in enumerate(results(outputs)) if i != 1] == [r for i, r in enumerate(wanted) if i != 1]


def test_without_a_watching_request_the_model_itself_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    import mistral_7b.engine.watching as room

    monkeypatch.setattr(room, "Watched", None)
    assert llm_of("int8").generate(PROMPTS, PARAMS)


def test_a_models_own_context_does_not_reach_into_an_engine() -> None:
    """Its other requests would be steered too, and its cached prefixes spoilt."""
    model, tokens = model_of("int8"), PROMPTS[1]
    with refused(InterpretError), model.steer(0, VECTOR):
        generate(model, [tokens], PARAMS)
    assert generate(model, [tokens], PARAMS)
