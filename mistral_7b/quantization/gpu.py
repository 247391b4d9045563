"""Quantized Linears for a GPU: weights in block formats or e4m3; activations are not quantized, except for fp8.

The tiles of quantized files (kernels/block_formats.py) are for CPUs. `to_gpu` repacks the codes row-major, one
module at a time; the dequantized weights are bit-identical. Logits differ from those on the CPU, where activations
are int8.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.frozen import frozen_product
from ..kernels.gpu import weight_only
from ..kernels.gpu.weight_only import RowMajor
from ..surgery import replace_linears
from .linear import BlockLinear, Stored


class GpuBlockLinear(Stored):
    """y = x W^T with W in a block format, row-major, for x of any floating type."""

    def __init__(self, weight: RowMajor) -> None:
        super().__init__()
        self.kind = weight.kind
        self.out_features, self.in_features = weight.shape
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("d", weight.d)

    codes: Tensor
    scales: Tensor | None
    d: Tensor

    @classmethod
    def of(cls, linear: BlockLinear) -> GpuBlockLinear:
        """The same weight, row-major."""
        tiles = (linear.kind, linear.codes, linear.d)
        return cls(weight_only.from_tiles(*tiles, linear.in_features, linear.out_features))

    @property
    def weight(self) -> RowMajor:
        """The weight as the kernels take it."""
        return RowMajor(self.kind, self.in_features, self.codes, self.scales, self.d)

    def tiled(self) -> BlockLinear:
        """The same weight in tiles, on the CPU, for formats of quantization schemes."""
        held = (None if t is None else t.cpu() for t in (self.codes, self.scales, self.d))
        codes, d = weight_only.to_tiles(RowMajor(self.kind, self.in_features, *held))  # type: ignore[arg-type]
        return BlockLinear.of_tiles(self.kind, codes, d, self.in_features, self.out_features)

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        weight = self.weight
        return frozen_product(
            x,
            lambda x: weight_only.blocks_linear(x, weight),
            lambda grad: grad @ weight_only.expand(weight, grad.dtype),
        )

    def dequantized(self) -> Tensor:
        """The dequantized weight, float32 (N, K)."""
        return weight_only.expand(self.weight, torch.float32)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind}"


class Fp8Linear(Stored):
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
        return cls(*weight_only.to_fp8(weight.detach()))

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        q, scale = self.q, self.scale
        return frozen_product(
            x,
            lambda x: weight_only.fp8_linear(x, q, scale),
            lambda grad: grad @ weight_only.expand_fp8(q, scale, grad.dtype),
        )

    def dequantized(self) -> Tensor:
        """The dequantized weight, float32 (N, K)."""
        return weight_only.expand_fp8(self.q, self.scale, torch.float32)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, fp8"


def row_by_row(linear: BlockLinear, device: torch.device | str) -> GpuBlockLinear:
    """The same weight, repacked row-major on `device`."""
    return GpuBlockLinear.of(linear).to(device)


def to_gpu(model: nn.Module, device: torch.device | str) -> list[str]:
    """Move a model to a GPU, repacking quantized Linears one at a time; returns the names of these."""

    def build(linear: nn.Module, name: str) -> nn.Module:
        assert isinstance(linear, BlockLinear)
        return row_by_row(linear, device)

    names = replace_linears(model, build, lambda name, module: isinstance(module, BlockLinear))
    model.to(device)
    return names
