"""The gradient of a product with a weight that is not trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Map, back: Map) -> Tensor:
        ctx.back = back
        out = product(x)
        return torch.ops.aten._unsafe_view(out, out.shape)  # no view to autograd: an update may be added in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grad), None, None


def frozen_product(x: Tensor, product: Map, back: Map) -> Tensor:
    """Return product(x) for x (..., K), whose gradient is back(that of the result).

    Nothing of the product is kept for the backward pass, neither x nor a dequantized weight: `back` is grad @ W,
    computed when it is needed. If the product rounds x first, that counts as the identity (straight-through).
    """
    if not (x.requires_grad and torch.is_grad_enabled()):
        return product(x)
    return _Frozen.apply(x, product, back)
