"""Blocks whose activations are computed again in the backward pass, to save memory.

kept          a block's input, and everything its backward pass reads
recomputed    a block's input; the block runs once more in the backward pass, with the same bits
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..cache import Cache
from ..model import Layers, Mistral7B, Rope


class RecomputingLayers(Layers):
    """Blocks of which the first `count` keep only their inputs for the backward pass."""

    def __init__(self, layers: Layers, count: int) -> None:
        super().__init__(layers)
        self.count = count

    def forward(self, x: Tensor, rope: Rope, cache: Cache) -> Tensor:  # (..., D)
        for i, (layer, memory) in enumerate(zip(self, cache.layers, strict=False)):
            again = i < self.count and torch.is_grad_enabled()
            x = checkpoint(layer, x, rope, memory, use_reentrant=False) if again else layer(x, rope, memory)
        return x


def recompute(model: Mistral7B, count: int) -> None:
    """Recompute the first `count` blocks of a model in its backward pass."""
    model.layers = RecomputingLayers(model.layers, min(count, len(model.layers)))
