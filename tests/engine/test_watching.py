"""Requests that record or steer, in the running batch: their results, and those of their neighbours."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from refusals import refused
from tiny import tiny_args, tiny_model, tokens_of
from torch import Tensor

from mistral_7b import LLM, SamplingParams
from mistral_7b.engine.completion import RequestOutput
from mistral_7b.engine.config import EngineConfig
from mistral_7b.engine.llm import RequestsFailedError
from mistral_7b.engine.speculation import Speculation
from mistral_7b.engine.watching import PositionRecorder, Steering
from mistral_7b.errors import GenerationError, InterpretError
from mistral_7b.generate import generate
from mistral_7b.lora.files import Adapter, Factors
from mistral_7b.model import Mistral7B
from mistral_7b.quantization import Scheme, quantize

PROMPTS = [tokens_of((n,), seed=n).tolist() for n in (19, 3, 30, 1)]
PARAMS = SamplingParams(temperature=0, max_tokens=12, logprobs=3, ignore_eos=True)
VECTOR = torch.randn(40, generator=torch.Generator().manual_seed(0))
KINDS = ["int8", "int4", "bfloat16", "int8 keys"]
POINTS = ["embedding", "residual", "q", "attention", "z", "ffn", "norm"]


@functools.cache
def model_of(kind: str) -> Mistral7B:
    model = tiny_model(tiny_args(head_dim=16) if kind == "bfloat16" else tiny_args(), torch.bfloat16)
    scheme = Scheme("bf16", deterministic=True) if kind == "bfloat16" else Scheme(kind.split()[0])  # type: ignore[arg-type]
    return quantize(model, scheme)


def adapter() -> Adapter:
    draw = torch.Generator().manual_seed(1)
    wq = Factors(torch.randn(4, 40, generator=draw), torch.randn(60, 4, generator=draw), 0.3)
    return Adapter({"layers.0.attention.wq": wq}, {}, 4)


def llm_of(kind: str, **config: Any) -> LLM:
    settings = {"max_batch_tokens": 16, "page_size": 4, "max_sequences": 4, **config}
    kv = {"kv_dtype": "int8"} if kind == "int8 keys" else {}
    return LLM(model_of(kind), EngineConfig(**settings, **kv))


def results(outputs: list[RequestOutput]) -> list[Any]:
    return [(c.token_ids, c.logprobs) for o in outputs for c in o.outputs]


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_keep_their_bits(kind: str) -> None:
    """And so does the request that records."""
    alone = results(llm_of(kind).generate(PROMPTS, PARAMS))
    beside = llm_of(kind).generate(PROMPTS, PARAMS, asked=[options(record=POINTS), options(), options(), options()])
    assert results(beside) == alone
    assert [o.recorded is not None for o in beside] == [True, False, False, False]
    steered = llm_of(kind).generate(
        PROMPTS, PARAMS, asked=[options(), options(steer=Steering(0, VECTOR, 8)), options(), options(record="q")]
    )
    assert [a == b for a, b in zip(results(steered), alone, strict=True)] == [True, False, True, True]


def options(**fields: Any) -> Any:
    from mistral_7b.engine.inputs import RequestOptions

    return RequestOptions(**fields)
