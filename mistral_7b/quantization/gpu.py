"""Quantized Linears for a GPU: int8, int4 or e4m3 weights; activations are not quantized, except for fp8.

The tiles of quantized files (kernels/block_formats.py) are for CPUs. `to_gpu` repacks them, one module at
a time; the dequantized weights are bit-identical. Logits differ from those on the CPU, where activations are int8.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.gpu.weight_only import expand_int8, fp8_linear, to_fp8
from ..surgery import replace_linears
from .linear import BlockLinear


class Fp8Linear(nn.Module):
    """y = x W^T with both quantized to e4m3: w with a scale per output, x with a scale per row."""

    def __init__(self, q: Tensor, scale: Tensor) -> None:
        """q float8_e4m3fn (N, K), scale float32 (N,)."""
        super().__init__()
        self.out_features, self.in_features = q.shape
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)

    q: Tensor
    scale: Tensor

    @classmethod
    def from_weight(cls, weight: Tensor) -> Fp8Linear:
        """Quantize a weight (N, K), with scales that map each output's absmax to the largest e4m3 number."""
        return cls(*to_fp8(weight.detach()))

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        return fp8_linear(x, self.q, self.scale)

    def dequantized(self) -> Tensor:
        """The dequantized weight, float32 (N, K)."""
        return expand_int8(self.q, self.scale, torch.float32)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, fp8"


def row_by_row(linear: BlockLinear, device: torch.device | str) -> nn.Module:
    """The same weight, repacked row-major on `device`."""
    out = nn.Linear(linear.in_features, linear.out_features, bias=False, dtype=torch.bfloat16, device="meta")
    out.load_state_dict({"weight": linear.dequantized().to(device, torch.bfloat16)}, assign=True)
    return out.requires_grad_(False)


def to_gpu(model: nn.Module, device: torch.device | str) -> list[str]:
    """Move a model to a GPU, repacking quantized Linears one at a time; returns the names of these."""

    def build(linear: nn.Module, name: str) -> nn.Module:
        assert isinstance(linear, BlockLinear)
        return row_by_row(linear, device)

    names = replace_linears(model, build, lambda name, module: isinstance(module, BlockLinear))
    model.to(device)
    return names
