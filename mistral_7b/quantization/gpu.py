"""Quantized Linears for a GPU: int8, int4 or e4m3 weights; activations are not quantized, except for fp8.

The tiles of quantized files (kernels/layout.py) are for CPUs. `to_gpu` repacks the codes row-major, one module at
a time; the dequantized weights are bit-identical. Logits differ from those on the CPU, where activations are int8.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels import layout
from ..kernels.gpu.weight_only import (
    expand_int4,
    expand_int8,
    fp8_linear,
    int4_linear,
    int8_linear,
    pack_int4,
    to_fp8,
)  # fmt: skip
from ..surgery import replace_linears
from .linear import Int4Linear, Int8Linear


class GpuInt8Linear(nn.Module):
    """y = x W^T, w = scale[n] * (q - 128), for x of any floating type."""

    def __init__(self, q: Tensor, scale: Tensor) -> None:
        """q uint8 (N, K), scale float32 (N,)."""
        super().__init__()
        self.out_features, self.in_features = q.shape
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)

    q: Tensor
    scale: Tensor

    @classmethod
    def of(cls, linear: Int8Linear) -> GpuInt8Linear:
        """The same weight, row-major."""
        q = layout.untile_int8(linear.codes)[: linear.out_features, : linear.in_features]
        return cls(q.contiguous(), linear.scale[: linear.out_features].clone())

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        return int8_linear(x, self.q, self.scale)

    def dequantized(self) -> Tensor:
        """The dequantized weight, float32 (N, K)."""
        return expand_int8(self.q, self.scale, torch.float32)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, int8"


class GpuInt4Linear(nn.Module):
    """y = x W^T, w = scale[n] * m * (q - z) in groups, for x of any floating type."""

    def __init__(
        self, packed: Tensor, m: Tensor, z: Tensor, scale: Tensor, group_size: int, in_features: int
    ) -> None:
        """packed as by pack_int4, m and z uint8 (N, G), scale float32 (N,)."""
        super().__init__()
        self.out_features, self.in_features, self.group_size = m.shape[0], in_features, group_size
        for name, t in (("packed", packed), ("m", m), ("z", z), ("scale", scale)):
            self.register_buffer(name, t)

    packed: Tensor
    m: Tensor
    z: Tensor
    scale: Tensor

    @classmethod
    def of(cls, linear: Int4Linear) -> GpuInt4Linear:
        """The same weight, row-major."""
        N, K = linear.out_features, linear.in_features
        q = layout.untile_int4(linear.codes)[:N, :K]
        m, z = (t[:N, : -(-K // linear.group_size)].contiguous() for t in layout.untile_groups(linear.groups))
        return cls(pack_int4(q), m, z, linear.scale[:N].clone(), linear.group_size, K)

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        return int4_linear(x, self.packed, self.m, self.z, self.scale, self.group_size)

    def dequantized(self) -> Tensor:
        """The dequantized weight, float32 (N, K)."""
        return expand_int4(
            self.packed, self.m, self.z, self.scale, self.group_size, self.in_features, torch.float32
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, int4 in groups of {self.group_size}"


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


def row_by_row(linear: Int8Linear | Int4Linear, device: torch.device | str) -> GpuInt8Linear | GpuInt4Linear:
    """The same weight, repacked row-major on `device`."""
    out = GpuInt8Linear.of(linear) if isinstance(linear, Int8Linear) else GpuInt4Linear.of(linear)
    return out.to(device)


def to_gpu(model: nn.Module, device: torch.device | str) -> list[str]:
    """Move a model to a GPU, repacking int8 and int4 Linears one at a time; returns the names of these."""

    def build(linear: nn.Module, name: str) -> nn.Module:
        assert isinstance(linear, (Int8Linear, Int4Linear))
        return row_by_row(linear, device)

    names = replace_linears(model, build, lambda name, module: isinstance(module, (Int8Linear, Int4Linear)))
    model.to(device)
    return names
