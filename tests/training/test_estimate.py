"""Memory before a run: what blocks keep, and how many are recomputed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from finetune_data import base_model
from tiny import TINY

from mistral_7b.cache import Stateless
from mistral_7b.lora.trainable import LoraArgs, adapt
from mistral_7b.quantization.fused import fuse
from mistral_7b.training.estimate import block_activations, estimate, fewest, last_gradient, trained_numbers
from mistral_7b.training.finetune_args import FinetuneArgs

ARGS = FinetuneArgs(seq_len=48, rows=2, accumulate=2, rank=2, dtype="float32")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_a_block_keeps_is_what_autograd_saves(method: Any) -> None:
    """Counted without numbers, and in a real forward pass of two blocks less one."""

    def saved(layers: int) -> int:
        model = base_model(trained=True)
        model.layers = type(model.layers)(model.layers[:layers])
        if method == "lora":
            fuse(model)
            adapt(model, LoraArgs(rank=2), 0)
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def keep(t: torch.Tensor) -> torch.Tensor:
            kept[t.untyped_storage()._cdata] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            tokens = torch.arange(40)
            hidden = model.hidden(tokens, Stateless(None), torch.zeros_like(tokens))
        assert hidden.requires_grad
        return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)

    shape = base_model().args
    counted = block_activations(dataclasses.replace(ARGS, method=method), shape, 40)
    rope = 2 * 40 * shape.head_dim // 2 * 4  # is one for all blocks
    assert counted - rope == pytest.approx(saved(2) - saved(1), rel=0.03)


def test_the_trained_weights_are_counted() -> None:
    model = base_model(trained=True)
    full = sum(p.numel() for p in model.parameters())
    assert trained_numbers(dataclasses.replace(ARGS, method="full"), model.args) == full
    factors = sum(p.numel() for p in adapt(model, LoraArgs(rank=2), 0))
    assert trained_numbers(ARGS, model.args) == factors


def test_the_fewest_blocks_are_recomputed() -> None:
    assert fewest(kept=100, inputs=10, layers=4, room=1000) == 0
    assert fewest(kept=100, inputs=10, layers=4, room=399) == 2, "of recomputed blocks, one is whole at a time"
    assert fewest(kept=100, inputs=10, layers=4, room=1) == 4


def test_the_last_gradient_is_there_in_two_types() -> None:
    """While `Weights.collect` casts it, in the order of the parameters; a float32 one is not cast."""
    model = base_model(trained=True)
    *_, last = model.parameters()
    args = dataclasses.replace(ARGS, dtype="bfloat16")
    assert last_gradient(dataclasses.replace(args, method="full"), model.args) == 2 * last.numel()
    assert last_gradient(args, model.args) == 0, "factors are float32"


def test_an_estimate_grows_with_what_is_kept(monkeypatch: Any) -> None:
    few, many, longer = (
        estimate(dataclasses.replace(ARGS, **changes), TINY, weights=10**6)
        for changes in ({"recompute": 2}, {"recompute": 0}, {"recompute": 0, "seq_len": 96})
    )
    assert few.parts["activations"] < many.parts["activations"] < longer.parts["activations"]
    assert few.peak == sum(few.parts.values())
    assert few.seconds > 0
    monkeypatch.setattr("mistral_7b.machine.memory", lambda: (0, 0))
    assert estimate(ARGS, TINY, 10**6).recomputed == TINY.n_layers
    assert "activations" in many.table()
