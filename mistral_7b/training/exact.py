"""A policy in training whose log-probabilities are the engine's own, to the last bit.

A sampler and a trainer that compute the same weights by different kernels disagree in the last bits, and the ratio
pi(token) / pi_sampled(token) of an on-policy step is not 1: a bias that no clipping removes. Here the forward of
each block runs the engine's kernels, and only the gradient comes from plain operations:

    forward     y = served(x)              the block as it samples; only x is kept
    backward    y' = trained(x), dL/dx     the same block with gradients, computed again from x

This is activation recomputation whose forward is exact: the gradient is that of y' at the exact x, in which the
factors of the adapter are rounded as they are served. The served and the trained model share the base's weights.
Rows of the engine's kernels do not depend on the other rows (docs/engine.md), so that prefill of packed documents
gives the bits of decoding token by token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..cache import Memory, Stateless
from ..engine.engine import Engine
from ..engine.llm import make_deterministic
from ..errors import TrainingError
from ..kernels.attend import Place, Remembered, attend
from ..kernels.backend import ATTENTION, Backend, uses
from ..lora.trainable import trained_adapter
from ..model import Mistral7B, rope_phases
from .log_probs import ModelPolicy
from .supervised import Packed

ADAPTER = "policy"  # its name in the engine


class _Exactly(torch.autograd.Function):
    """served(x), with the gradients of trained(x); parameters accumulate theirs during the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, served: Callable[[Tensor], Tensor], trained: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.trained = trained
        ctx.save_for_backward(x)
        return served(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.trained(x)
        y.backward(grad)
        return x.grad, None, None


class PackedDocuments(Memory):
    """Attention of packed documents by the kernel of the engine's pages, none of which are read or written."""

    def __init__(self, sequence_ids: Tensor, window: int | None) -> None:
        """`sequence_ids` (T,) are 0, 1, 2... in order."""
        ends = torch.bincount(sequence_ids).cumsum(0)
        offsets = torch.cat([ends.new_zeros(1), ends])
        zeros = torch.zeros_like(ends)
        self.place = Place(zeros, zeros, slots=1, table=zeros[:, None], offsets=offsets)
        self.window = window

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pages = Remembered(k[:1], v[:1], None, None, self.place)
        return attend(q, k, v, None, None, pages, self.window)


def prepare(model: Mistral7B) -> None:
    """Give a model, before it is adapted, the products that the engine samples with, in place.

    TrainingError if the engine's kernels do not give equal bits for this model.
    """
    weight = model.norm.weight
    if not uses(Backend.CPU, ATTENTION, weight.new_empty(0)):  # bfloat16 alone
        raise TrainingError(
            "sampling and training with equal bits needs a bfloat16 model (its weights may be int8 or int4) on a "
            f"CPU with the compiled kernels, not {str(weight.dtype).removeprefix('torch.')} on {weight.device}",
            field="method",
            hint='take dtype "bfloat16" and device "cpu"; `mistral-7b doctor` says whether the kernels compile',
        )
    make_deterministic(model)


def serve(model: Mistral7B, engine: Engine) -> None:
    """Load a model's trained adapter, as it is by now, into the engine of its base, in place of the one before."""
    if ADAPTER in engine.adapters.names:
        engine.unload_adapter(ADAPTER)
    engine.adapters.load(ADAPTER, trained_adapter(model))


class ExactPolicy:
    """A Policy whose values are those of an engine, with the gradients of `model`.

    engine    serves `without_adapter(model)`
    adapter   its adapter, loaded by `serve` after each update; None: the base alone
    """

    def __init__(self, model: Mistral7B, engine: Engine, adapter: str | None = ADAPTER) -> None:
        self.model, self.engine, self.adapter = model, engine, adapter

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    def hidden(self, batch: Packed) -> Tensor:
        args, model = self.model.args, self.model
        exact, plain = PackedDocuments(batch.sequence_ids, args.sliding_window), Stateless(args.sliding_window)
        positions = plain.extend(batch.tokens, batch.sequence_ids)
        x = model.tok_embeddings(batch.tokens).detach().requires_grad_(torch.is_grad_enabled())
        rope = rope_phases(positions, args, x.dtype)

        def over(memory: Memory, block: Any) -> Callable[[Tensor], Tensor]:
            return lambda x: block(x, rope, memory)

        with self.engine.adapters.over([(self.adapter, len(batch.tokens))]) as served:
            for block, trained in zip(served.layers, model.layers, strict=True):
                x = _Exactly.apply(x, over(exact, block), over(plain, trained))
            return _Exactly.apply(x, served.norm, model.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        return _Exactly.apply(hidden, self.engine.model.logits, self.model.logits)


@torch.no_grad()
def cost(policy: ExactPolicy, batch: Packed) -> str:
    """One line that says what the exact forward takes beside that of PyTorch's operations, on the same tokens."""
    seconds = []
    for each in (policy, ModelPolicy(policy.model)):
        began = time.perf_counter()
        each.hidden(batch)
        seconds.append(time.perf_counter() - began)
    return (
        f"sampler and trainer agree in every bit; the exact forward of {len(batch.tokens)} tokens takes "
        f"{seconds[0]:.3g} s, {seconds[0] / seconds[1]:.2f} times that of PyTorch's operations"
    )
