"""The other parts of a block through the kernels: the model's own modules, computed in fewer passes over memory.

Each takes the place of a module of model.py and keeps its parameters and children, by the same names; only
`forward` is another. Quantised models use them: once its products are fast, this would be half of a step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..cache import Cache, KernelCache, Memory, layers_of
from ..kernels.cpu.block import Block, finish, project, run_layers, usable
from ..kernels.elementwise import rms_norm, rotate, silu_mul
from ..model import Attention, FeedForward, Mistral7B, RMSNorm, Rope, TransformerBlock, rope_phases
from .linear import Compressed


class FusedRMSNorm(RMSNorm):
    """RMSNorm in one pass."""

    def forward(self, x: Tensor) -> Tensor:  # (..., D)
        return rms_norm(x, self.weight, self.eps)


class FusedAttention(Attention):
    """Attention whose queries and keys are rotated in one pass."""

    def forward(self, x: Tensor, rope: Rope, memory: Memory) -> Tensor:  # x: (..., D)
        q, k, v = self.wq(x), self.wk(x), self.wv(x)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        out = memory.attend(rotate(q, *rope), rotate(k, *rope), v)  # (..., H, K)
        return self.wo(out.flatten(-2))  # (..., D)


class FusedFeedForward(FeedForward):
    """SwiGLU whose gate is applied in one pass."""

    def forward(self, x: Tensor) -> Tensor:  # (..., D)
        return self.w2(silu_mul(self.w1(x), self.w3(x)))


class FusedBlock(TransformerBlock):
    """A block in three calls: what comes before attention, attention, and what comes after.

    Where a part of it is another than a quantised Linear, it is computed part by part.
    """

    _block: tuple[list[Tensor], Block] | None = None

    def forward(self, x: Tensor, rope: Rope, memory: Memory) -> Tensor:  # (..., D)
        cos, sin = rope
        # A table of angles serves rows that come round again: (T,) positions for tokens (B, T).
        regular = cos.dtype == torch.float32 and cos.shape[:-2] == x.shape[x.dim() + 1 - cos.dim() : -1]
        block = self._described() if regular and usable(x) and x.dtype == self.ffn_norm.weight.dtype else None
        if block is None or x.shape[-1] != block.dim:
            return super().forward(x, rope, memory)
        q, k, v = project(block, x, cos.contiguous(), sin.contiguous())
        return finish(block, x, memory.attend(q, k, v))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_block": None}  # addresses are of no use to a copy

    def _described(self) -> Block | None:
        """The block's weights for the kernels, described anew when one of them is another tensor."""
        a, f = self.attention, self.feed_forward
        linears: tuple[Any, ...] = (a.wq, a.wk, a.wv, a.wo, f.w1, f.w2, f.w3)
        if not all(isinstance(m, Compressed) for m in linears):
            return None
        norms = [self.attention_norm.weight, self.ffn_norm.weight]
        tensors = norms + [t for m in linears for t in m.described_by()]
        if self._block is None or any(x is not y for x, y in zip(tensors, self._block[0], strict=False)):
            of = Block(
                *(m.described() for m in linears), norms[0].data_ptr(), norms[1].data_ptr(),
                a.wq.in_features, a.head_dim, self.ffn_norm.eps,
            )  # fmt: skip
            self._block = (tensors, of)
        return self._block[1]


class FusedMistral7B(Mistral7B):
    """A model whose blocks run in one call over a ring or pages: no Python between them."""

    def hidden(self, tokens: Tensor, cache: Cache, sequence_ids: Tensor | None = None) -> Tensor:
        """Final normalised states of tokens (...): (..., D). Writes into `cache`."""
        if not isinstance(cache, KernelCache) or not cache.is_fast() or (blocks := self._described()) is None:
            return super().hidden(tokens, cache, sequence_ids)
        layers_of(cache, len(self.layers), tokens, sequence_ids)
        if cache.layers[0].k.shape[-2:] != (self.args.n_kv_heads, self.args.head_dim):
            return super().hidden(tokens, cache, sequence_ids)  # where the cache refuses
        positions = cache.extend(tokens, sequence_ids)
        x = self.tok_embeddings(tokens)  # (..., D)
        cos, sin = rope_phases(positions, self.args.head_dim, self.args.rope_theta, x.dtype)
        entries = [memory.entries for memory in cache.layers[: len(blocks)]]
        x = run_layers(blocks, x, cos, sin, entries, cache.place, cache.window)
        return self.norm(x)

    def _described(self) -> list[Block] | None:
        """All blocks' weights for the kernels, if these can have them."""
        weight = self.norm.weight
        if weight.dtype != torch.bfloat16 or not usable(weight):
            return None
        blocks = [layer._described() if isinstance(layer, FusedBlock) else None for layer in self.layers]
        return None if None in blocks else blocks  # type: ignore[return-value]


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    RMSNorm: FusedRMSNorm,
    Attention: FusedAttention,
    FeedForward: FusedFeedForward,
    TransformerBlock: FusedBlock,
    Mistral7B: FusedMistral7B,
}


def fuse(model: nn.Module) -> None:
    """Let every norm, attention and feed-forward of a model or block run through the kernels, in place.

    The kernels know no gradients: for inference alone.
    """
    for module in model.modules():
        if type(module) in FUSED:
            module.__class__ = FUSED[type(module)]
    model.requires_grad_(False)
