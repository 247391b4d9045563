"""Memory and time of fine-tuning, before any weight is loaded.

    peak = program + weights + masters + AdamW + neutral text + the larger of
           backward:  gradients + activations + max(logits, gradients in a block)
           update:    gradients in float32, and the last of them in the type of its weight

What a block keeps for its backward pass is counted, not computed by a formula: a block without numbers (on the
meta device) runs once, and what autograd saves is added up.

T tokens of a part of an update · D width · V vocabulary
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor

from .. import machine
from ..lora.trainable import LoraArgs, adapt
from ..model import Mistral7B, ModelArgs, rope_phases
from ..quantization.fused import fuse
from .finetune_args import FinetuneArgs
from .loss import LOGITS
from .measures import NEUTRAL
from .weights import adamw

LOGIT_COPIES = 2.5  # of a chunk in float32: bfloat16 logits, float32 logits, and their softmax
RUNTIME = 45 * 10**6  # on first use: 17 MB of libraries' code is read, and oneDNN keeps 27 MB for its products
GRADIENTS = "gradients of what is trained"
GRADIENT_COPIES = 3  # of the widest activation of a block, in its backward pass


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes by component, and seconds of an update at the speed of matrix products on this machine."""

    parts: dict[str, int]
    seconds: float
    recomputed: int  # blocks
    tokens: int  # of an update

    @property
    def peak(self) -> int:
        """The bytes of all parts."""
        return sum(self.parts.values())

    def table(self) -> str:
        """The estimate as lines of text."""
        rows = [*self.parts.items(), ("peak", self.peak)]
        lines = [f"{name:<44}{size / 1e9:8.2f} GB" for name, size in rows]
        lines.append(f"{'blocks that are recomputed':<44}{self.recomputed:8}")
        lines.append(f"{f'an update of {self.tokens:,} tokens':<44}{self.seconds:8.1f} s")
        return "\n".join(lines)


class _Attention(torch.autograd.Function):
    """Attention that computes nothing and keeps what the fused kernels of PyTorch keep."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (T, heads, K)
        out, log_sums = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, log_sums)
        return out


class _Memory:
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = _Attention.apply(q, k, v)
        return out


def _one_block(args: FinetuneArgs, shape: ModelArgs) -> Mistral7B:
    """A model of one block as it is trained, without numbers."""
    model = Mistral7B(dataclasses.replace(shape, n_layers=1), dtype=getattr(torch, args.dtype), device="meta")
    if args.method != "full":
        fuse(model)
        adapt(model, LoraArgs(args.rank, args.alpha, args.dropout, args.targets, args.rslora), 0)
    return model


def block_activations(args: FinetuneArgs, shape: ModelArgs, tokens: int) -> int:
    """Return the bytes that one block keeps for its backward pass on packed tokens."""
    model = _one_block(args, shape)
    own = {t.untyped_storage()._cdata for t in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    x = torch.empty(tokens, shape.dim, dtype=model.norm.weight.dtype, device="meta", requires_grad=True)
    rope = rope_phases(torch.empty(tokens, device="meta"), shape, x.dtype)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.layers[0](x, rope, _Memory())
    return sum(t.untyped_storage().nbytes() for storage, t in kept.items() if storage not in own)


def trained_numbers(args: FinetuneArgs, shape: ModelArgs) -> int:
    """Return how many numbers are trained."""
    model = _one_block(args, shape)
    in_block = sum(p.numel() for p in model.layers.parameters() if p.requires_grad)
    outside = sum(p.numel() for p in model.parameters() if p.requires_grad) - in_block
    return in_block * shape.n_layers + outside


def last_gradient(args: FinetuneArgs, shape: ModelArgs) -> int:
    """Return the bytes of the last gradient of `Weights.collect`: it is there twice while it becomes float32."""
    *_, last = (p for p in _one_block(args, shape).parameters() if p.requires_grad)
    return 0 if last.dtype == torch.float32 else last.nbytes


def estimate(args: FinetuneArgs, shape: ModelArgs, weights: int) -> Estimate:
    """Estimate a run on a model of this shape, whose weights will take `weights` more bytes in memory.

    What else the run needs, as its data, should be in memory: it is counted as part of the program.
    """
    adamw([torch.zeros(1)], args.peak, args.betas, 0.0)  # PyTorch loads more of itself on first use
    fixed, backward = _parts(args, shape, weights)
    recomputed = blocks_to_recompute(args, shape, weights)
    kept, inputs = _per_block(args, shape)
    backward["activations"] = _activations(kept, inputs, shape.n_layers, recomputed)
    update = {GRADIENTS: 4 * trained_numbers(args, shape) + last_gradient(args, shape)}  # no activation is left
    larger = max(backward, update, key=lambda phase: sum(phase.values()))
    return Estimate(fixed | larger, _seconds(args, shape, recomputed), recomputed, args.seq_len * args.rows)


def blocks_to_recompute(args: FinetuneArgs, shape: ModelArgs, weights: int) -> int:
    """Return how many blocks must be recomputed, so that a run fits the memory that is free."""
    if args.recompute is not None:
        return min(args.recompute, shape.n_layers)
    fixed, backward = _parts(args, shape, weights)
    room = _available(args.device) - sum(fixed.values()) - sum(backward.values())
    return fewest(*_per_block(args, shape), shape.n_layers, room)


def _parts(args: FinetuneArgs, shape: ModelArgs, weights: int) -> tuple[dict[str, int], dict[str, int]]:
    """Return the bytes that are there throughout, and those of the backward pass but for activations."""
    tokens, width = args.seq_len * args.rows // args.accumulate, getattr(torch, args.dtype).itemsize
    numbers = trained_numbers(args, shape)
    logits = int(LOGIT_COPIES * 4 * LOGITS) + 4 * tokens * shape.dim
    gradients = GRADIENT_COPIES * tokens * max(shape.hidden_dim, shape.dim) * width
    fixed = {
        "program": machine.resident_memory() + RUNTIME,
        "weights": weights,
        "masters of what is trained, and AdamW": 12 * numbers,
        "log-probabilities of the neutral text": 4 * NEUTRAL * shape.vocab_size,
    }
    backward = {
        GRADIENTS: numbers * (width if args.method == "full" else 4),
        "logits, or gradients in a block": max(logits, gradients),
    }
    return fixed, backward


def _per_block(args: FinetuneArgs, shape: ModelArgs) -> tuple[int, int]:
    """Return the bytes of a block's activations, and of its input alone."""
    tokens = args.seq_len * args.rows // args.accumulate
    return block_activations(args, shape, tokens), tokens * shape.dim * getattr(torch, args.dtype).itemsize


def _activations(kept: int, inputs: int, layers: int, recomputed: int) -> int:
    """Return the bytes of all blocks' activations; of recomputed ones, one is whole at a time."""
    return (layers - recomputed) * kept + recomputed * inputs + (kept if recomputed else 0)


def fewest(kept: int, inputs: int, layers: int, room: int) -> int:
    """Return the least number of blocks to recompute, so that the activations fit `room` bytes; else all."""
    fitting = (n for n in range(layers) if _activations(kept, inputs, layers, n) <= room)
    return next(fitting, layers)


def _available(device: str) -> int:
    """Bytes that a run may take in all: nine tenths of the memory that is free now, and this program's own."""
    if torch.device(device).type == "cuda":
        return int(0.9 * torch.cuda.mem_get_info(device)[0]) + machine.resident_memory()
    return int(0.9 * machine.memory()[1]) + machine.resident_memory()


def _seconds(args: FinetuneArgs, shape: ModelArgs, recomputed: int) -> float:
    """Return the seconds of an update if all products run as fast as one that is measured now."""
    head = 2 * shape.n_heads * shape.head_dim + 2 * shape.n_kv_heads * shape.head_dim
    block = shape.dim * (head + 3 * shape.hidden_dim)
    attention = (
        2 * args.seq_len * shape.n_heads * shape.head_dim
    )  # causal: half of Q K^T and of its product with V
    passes = 3 if args.method == "full" else 2  # a frozen weight has no gradient
    per_token = 2 * passes * (shape.n_layers * block + shape.dim * shape.vocab_size)
    per_token += 2 * recomputed * block + 3 * shape.n_layers * attention
    return args.rows * args.seq_len * per_token / _rate(args, shape)


def _rate(args: FinetuneArgs, shape: ModelArgs) -> float:
    """Measure the operations per second of a product of the model's size."""
    n = min(args.seq_len, 1024)
    x = torch.randn(n, shape.dim, dtype=getattr(torch, args.dtype), device=args.device)
    w = torch.randn(shape.hidden_dim, shape.dim, dtype=x.dtype, device=x.device)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        float(torch.nn.functional.linear(x, w)[0, 0])  # waits for a GPU
        best = min(best, time.perf_counter() - began)
    return 2 * n * w.numel() / best
