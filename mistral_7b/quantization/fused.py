"""A model's blocks computed with the fused kernels, in fewer passes over memory.

`fuse` replaces the modules of model.py. The new ones have the same parameters and names, and another `forward`.
Quantized models use them: with fast products, the unfused operations between them would be half of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..cache import Cache, KernelCache, Memory
from ..kernels.backend import BLOCK, LAYERS, Backend, uses
from ..kernels.cpu import calls
from ..kernels.cpu.arguments import Block
from ..kernels.elementwise import rms_norm, rotate, silu_mul
from ..model import Attention, FeedForward, Layers, Mistral7B, RMSNorm, Rope, TransformerBlock
from .linear import Compressed


class FusedRMSNorm(RMSNorm):
    """RMSNorm in one pass."""

    def __init__(self, norm: RMSNorm) -> None:
        nn.Module.__init__(self)
        self.eps, self.weight = norm.eps, norm.weight

    def forward(self, x: Tensor) -> Tensor:  # (..., D)
        return rms_norm(x, self.weight, self.eps)


class FusedAttention(Attention):
    """Attention with the rotary embedding in one pass."""

    def __init__(self, attention: Attention) -> None:
        nn.Module.__init__(self)
        self.head_dim = attention.head_dim
        self.wq, self.wk, self.wv, self.wo = attention.wq, attention.wk, attention.wv, attention.wo

    def forward(self, x: Tensor, rope: Rope, memory: Memory) -> Tensor:  # x: (..., D)
        q, k, v = self.wq(x), self.wk(x), self.wv(x)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        out = memory.attend(rotate(q, *rope), rotate(k, *rope), v)  # (..., H, K)
        return self.wo(out.flatten(-2))  # (..., D)


class FusedFeedForward(FeedForward):
    """SwiGLU with the gate in one pass."""

    def __init__(self, feed_forward: FeedForward) -> None:
        nn.Module.__init__(self)
        self.w1, self.w2, self.w3 = feed_forward.w1, feed_forward.w2, feed_forward.w3

    def forward(self, x: Tensor) -> Tensor:  # (..., D)
        return self.w2(silu_mul(self.w1(x), self.w3(x)))


class FusedBlock(TransformerBlock):
    """A block in three calls: before attention, attention, after attention.

    If one of its Linears is not quantized for the kernels, the block is computed module by module.
    """

    _description: tuple[list[Tensor], Block] | None = None

    def __init__(self, block: TransformerBlock) -> None:
        nn.Module.__init__(self)
        self.attention_norm, self.attention = fused(block.attention_norm), fused(block.attention)
        self.ffn_norm, self.feed_forward = fused(block.ffn_norm), fused(block.feed_forward)

    def forward(self, x: Tensor, rope: Rope, memory: Memory) -> Tensor:  # (..., D)
        cos, sin = rope
        # The kernel repeats the angles over leading dimensions: (T,) positions for tokens (B, T).
        repeatable = cos.shape[:-2] == x.shape[x.dim() + 1 - cos.dim() : -1]
        block = self.described(x.dtype) if repeatable and uses(Backend.CPU, BLOCK, x) else None
        if block is None or x.shape[-1] != block.dim:
            return super().forward(x, rope, memory)
        q, k, v = calls.project(block, x, cos, sin)
        return calls.finish_block(block, x, memory.attend(q, k, v))

    def described(self, dtype: torch.dtype) -> Block | None:
        """The kernels' descriptor of the block's weights, rebuilt when a tensor has been replaced.

        None if one of the Linears is not quantized for the kernels, or if a norm's type is not `dtype`,
        that of the block's input.
        """
        a, f = self.attention, self.feed_forward
        linears: tuple[Any, ...] = (a.wq, a.wk, a.wv, a.wo, f.w1, f.w2, f.w3)
        norms = [self.attention_norm.weight, self.ffn_norm.weight]
        if any(t.dtype != dtype for t in norms) or not all(isinstance(m, Compressed) for m in linears):
            return None
        tensors = norms + [t for m in linears for t in m.described_by()]
        if self._description is None or any(
            x is not y for x, y in zip(tensors, self._description[0], strict=False)
        ):
            names = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
            block = Block(
                **{name: m.described() for name, m in zip(names, linears, strict=True)},
                attention_norm=norms[0].data_ptr(), ffn_norm=norms[1].data_ptr(), dim=a.wq.in_features,
                head_dim=a.head_dim, eps=self.ffn_norm.eps,
            )  # fmt: skip
            self._description = (tensors, block)
        return self._description[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_description": None}  # pointers are not valid in a copy

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `.to()` and the like replace the data of a parameter, which stays the same object.
        self._description = None
        return super()._apply(fn, recurse)


class FusedLayers(Layers):
    """All blocks in one call, with a cache in a ring or pages."""

    def forward(self, x: Tensor, rope: Rope, cache: Cache) -> Tensor:  # (..., D)
        if not isinstance(cache, KernelCache) or (blocks := self.described(x, cache)) is None:
            return super().forward(x, rope, cache)
        entries = [memory.entries for memory in cache.layers[: len(blocks)]]
        return calls.layers(blocks, x, *rope, entries, cache.place, cache.window)

    def described(self, x: Tensor, cache: KernelCache) -> list[Block] | None:
        """The kernels' descriptors of all blocks; None if they do not support x, the cache or a block."""
        if not uses(Backend.CPU, LAYERS, x):
            return None
        blocks: list[Block] = []
        for layer in self:
            if not isinstance(layer, FusedBlock) or (block := layer.described(x.dtype)) is None:
                return None
            blocks.append(block)
        k_cache, first = cache.layers[0].k, blocks[0]
        heads = (first.wk.N // first.head_dim, first.head_dim)
        # With another type or shape, the cache itself raises the error.
        return (
            blocks
            if cache.dtype == x.dtype and k_cache.device == x.device and k_cache.shape[-2:] == heads
            else None
        )


FUSED: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    RMSNorm: FusedRMSNorm,
    Attention: FusedAttention,
    FeedForward: FusedFeedForward,
    TransformerBlock: FusedBlock,
    Layers: lambda layers: FusedLayers(map(fused, layers)),
}


def fuse(model: Mistral7B) -> None:
    """Replace a model's blocks and final norm by fused ones, and freeze them.

    Where a gradient is required, they compute module by module, with operators that have a backward pass.
    """
    model.layers, model.norm = fused(model.layers), fused(model.norm)
    model.requires_grad_(False)


def fused(module: nn.Module) -> Any:
    """The fused equivalent of a module, with the same parameters; the module itself if there is none."""
    return FUSED[type(module)](module) if type(module) in FUSED else module
