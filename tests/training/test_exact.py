"""Trap 29: sampler and trainer give the same bits, and the gradient is that of the trained model."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from preference_data import encoded
from refusals import refused
from tiny import tiny_args, tiny_model
from torch import nn

from mistral_7b.engine.config import EngineConfig
from mistral_7b.engine.inputs import InputProcessor, RequestOptions
from mistral_7b.engine.llm import open_engine, run
from mistral_7b.errors import TrainingError
from mistral_7b.lora.trainable import LoraArgs, adapt, without_adapter
from mistral_7b.model import Mistral7B
from mistral_7b.quantization import quantize
from mistral_7b.sampling.params import SamplingParams
from mistral_7b.training.exact import ADAPTER, ExactPolicy, prepare, serve
from mistral_7b.training.log_probs import ModelPolicy, backward, log_probs
from mistral_7b.training.supervised import Packed, pack


def adapted(scheme: str | None, dtype: torch.dtype = torch.bfloat16) -> tuple[Mistral7B, list[nn.Parameter]]:
    """A model with an adapter that changes it."""
    model = tiny_model(tiny_args(), dtype)
    if scheme is not None:
        if scheme != "plain":
            quantize(model, scheme)
        prepare(model)
    factors = adapt(model, LoraArgs(rank=5), 0)
    noise = torch.Generator().manual_seed(3)
    for p in factors:
        p.data += 0.1 * torch.randn(p.shape, generator=noise)
    return model, factors


def served(model: Mistral7B) -> InputProcessor:
    inputs = open_engine(without_adapter(model), EngineConfig(deterministic=True), None, None, [96] * 16)
    serve(model, inputs.engine)
    return inputs


def sampled(inputs: InputProcessor) -> tuple[Packed, torch.Tensor]:
    """Completions of prompts of many lengths, several of each, with the sampler's log-probabilities."""
    draw = np.random.default_rng(0)
    requests = []
    for seed in range(6):
        params = SamplingParams(n=2, max_tokens=int(draw.integers(3, 40)), seed=seed, logprobs=0, ignore_eos=True)
        prompt = draw.integers(3, 67, draw.integers(1, 30)).tolist()
        requests.append(inputs.text(prompt, params, RequestOptions(adapter=ADAPTER)))
    run(inputs.engine, requests)
    completions = [(r.ids, c) for r in requests for c in r.completions]
    values = [e[t].logprob for _, c in completions for e, t in zip(c.logprobs, c.token_ids, strict=True)]
    return pack([encoded(ids, c.token_ids) for ids, c in completions]), torch.tensor(values)


@pytest.mark.parametrize("scheme", ["plain", "bf16", "int8", "int4"])
def test_trap_29_every_log_probability_of_the_trainer_is_the_samplers(scheme: str) -> None:
    model, factors = adapted(scheme)
    inputs = served(model)
    packed, values = sampled(inputs)
    policy = ExactPolicy(model, inputs.engine)
    assert torch.equal(log_probs(policy, packed), values)
    assert not torch.equal(log_probs(ModelPolicy(model), packed), values), "PyTorch's operations would pass too"
    with torch.no_grad():
        factors[0] += 0.1
    assert torch.equal(log_probs(policy, packed), values), "not served yet"
    serve(model, inputs.engine)
    updated = log_probs(policy, packed)
    assert (updated != values).float().mean() > 0.9
    again = sampled(inputs)
    assert torch.equal(log_probs(policy, again[0]), again[1])


def test_the_gradient_is_that_of_the_trained_model() -> None:
    """In float64, where served and trained blocks agree: an engine that serves the trained model itself."""
    model, factors = adapted(None, torch.float64)

    @contextmanager
    def over(runs: Any) -> Any:
        yield model

    engine: Any = SimpleNamespace(adapters=SimpleNamespace(over=over), model=model)
    draw = np.random.default_rng(1)
    packed = pack([encoded([1, *draw.integers(3, 67, 4)], draw.integers(3, 67, n).tolist()) for n in (3, 20, 9)])
    weights = torch.from_numpy(draw.normal(size=32))
    found = []
    for policy in (ExactPolicy(model, engine), ModelPolicy(model)):
        loss = backward(policy, packed, lambda values: (values * weights).sum())
        found.append([loss, *(p.grad for p in factors)])
        for p in factors:
            p.grad = None
    for exact, plain in zip(*found, strict=True):
        torch.testing.assert_close(exact, plain, atol=1e-6, rtol=1e-6)  # the factors are float32


def test_models_without_equal_bits_are_refused() -> None:
    with refused(TrainingError, field="method"):
        prepare(tiny_model())
