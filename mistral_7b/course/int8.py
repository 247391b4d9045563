"""A Linear with int8 weights, in plain PyTorch: exercise 12. The package's own is quantization/linear.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.linear import quantize_rows
from ..surgery import replace_linears

BLOCK = 32  # inputs that share a scale


class Int8Linear(nn.Module):
    """y = x W^T with int8 weights and activations, and a scale for each block of 32 inputs of each row.

    codes (N, B, 32) are the integers of the weight, scale (N, B) its scales: w is about codes * scale.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        q, scale = quantize_rows(linear.weight.detach().unflatten(-1, (-1, BLOCK)))
        self.register_buffer("codes", q.to(torch.int8))
        self.register_buffer("scale", scale[..., 0])

    codes: Tensor
    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        """Round x to int8 in blocks, sum each block's products as integers, then add the blocks, scaled.

        Integers are summed exactly in any order, so a row's result does not depend on the other rows. float64
        holds these sums exactly.
        """
        q, sx = quantize_rows(x.unflatten(-1, (-1, BLOCK)))  # (..., B, 32), (..., B, 1)
        out = x.new_zeros(*x.shape[:-1], self.out_features, dtype=torch.float32)
        for b in range(self.codes.shape[1]):
            sums = q[..., b, :].double() @ self.codes[:, b].double().T  # (..., N): whole numbers
            out = out + sums.float() * (self.scale[:, b] * sx[..., b, :])
        return out.to(x.dtype)


def quantize_linears(model: nn.Module) -> nn.Module:
    """Replace every Linear of a model, in place."""
    replace_linears(model, lambda linear, name: Int8Linear(linear))  # type: ignore[arg-type]
    return model
