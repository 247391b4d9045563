"""y = x W^T with quantized W: the kernels of cpu/ as PyTorch operators, with twins in plain PyTorch.

    int8    w[n, k] = scale[n] * (q[n, k] - 128)
    int4    w[n, k] = scale[n] * m[n, g] * (q[n, k] - z[n, g])     a compressed int8 weight: |m (q - z)| <= 127

Activations are quantized to int8 per row, and the sum over k is an integer sum, which is exact in any order. So
the twin and all kernels are bit-identical, and the result of a row does not depend on the other rows.

GGUF's block formats are in block_linear.py.

... any leading dimensions · N outputs · K inputs · G groups
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import layout
from .backend import QUANTIZED_LINEAR, Backend, uses
from .cpu import calls, compiler
from .cpu.arguments import Weights

OPS = torch.library.Library("mistral_7b", "DEF")


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize rows (..., K) to integers -127..127, as float32, with scales (..., 1): x is about q * scale."""
    x = x.float()
    absmax = x.abs().amax(-1, keepdim=True)
    inverse = torch.where(absmax > 0, torch.full_like(absmax, 127.0) / absmax, 0.0)
    q = (x * inverse).round()
    return torch.where(inverse.isfinite() & absmax.isfinite(), q, 0.0), absmax / 127


def int_weight(codes: Tensor, groups: Tensor | None, group_size: int = 0) -> Tensor:
    """The int8 weights (N, K) of tiles of int8 or int4 codes, including padding."""
    if groups is None:
        return (layout.untile_int8(codes).short() - 128).to(torch.int8)
    q = layout.untile_int4(codes).unflatten(1, (-1, group_size)).short()  # (N, G, group)
    m, z = (t.short()[..., None] for t in layout.untile_groups(groups))
    return (m * (q - z)).flatten(1).to(torch.int8)


def linear_twin(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The product in plain PyTorch: x (..., K), weight int8 (N, K), scale (N,): (..., N) in x's type."""
    q, sx = quantize_rows(x)
    sums = (q.double() @ weight.double().T).float()  # exact: integers far below 2^53
    return (sums * sx * scale).to(x.dtype)


def uses_cpu_kernels(x: Tensor) -> bool:
    """Whether the CPU kernels compute this product. Warns once if they could not be compiled."""
    if uses(Backend.CPU, QUANTIZED_LINEAR, x):
        return True
    compiler.warn_if_missing()
    return False


def int8_weights(codes: Tensor, scale: Tensor, n: int) -> Weights:
    """The kernels' descriptor of an int8 weight; it holds pointers to the tensors."""
    columns = codes.shape[1] * 4
    return Weights(N=n, Kp=columns, group=columns, codes=codes.data_ptr(), scale=scale.data_ptr(), bits=8)


def int4_weights(codes: Tensor, groups: Tensor, scale: Tensor, n: int, group_size: int) -> Weights:
    """The kernels' descriptor of an int4 weight; it holds pointers to the tensors."""
    return Weights(
        N=n, Kp=codes.shape[1] * 8, group=group_size, codes=codes.data_ptr(), groups=groups.data_ptr(),
        scale=scale.data_ptr(), bits=4,
    )  # fmt: skip


def _int8(x: Tensor, codes: Tensor, scale: Tensor, n: int) -> Tensor:
    if uses_cpu_kernels(x):
        return calls.linear(int8_weights(codes, scale, n), x)
    return linear_twin(x, int_weight(codes, None)[:n, : x.shape[-1]], scale[:n])


def _int4(x: Tensor, codes: Tensor, groups: Tensor, scale: Tensor, n: int, group_size: int) -> Tensor:
    if uses_cpu_kernels(x):
        return calls.linear(int4_weights(codes, groups, scale, n, group_size), x)
    return linear_twin(x, int_weight(codes, groups, group_size)[:n, : x.shape[-1]], scale[:n])


OPS.define("int8_linear(Tensor x, Tensor codes, Tensor scale, int n) -> Tensor")
OPS.define("int4_linear(Tensor x, Tensor codes, Tensor groups, Tensor scale, int n, int group_size) -> Tensor")
OPS.impl("int8_linear", _int8, "CPU")
OPS.impl("int4_linear", _int4, "CPU")
torch.library.register_fake("mistral_7b::int8_linear", lambda x, codes, scale, n: x.new_empty((*x.shape[:-1], n)))
torch.library.register_fake(
    "mistral_7b::int4_linear", lambda x, codes, groups, scale, n, group_size: x.new_empty((*x.shape[:-1], n))
)


def int8_linear(x: Tensor, codes: Tensor, scale: Tensor, n: int) -> Tensor:
    """x (..., K) times int8 codes (N/16, K/4, 16, 4), scale (N,): the first n outputs (..., n), in x's type."""
    return torch.ops.mistral_7b.int8_linear(x, codes, scale, n)


def int4_linear(x: Tensor, codes: Tensor, groups: Tensor, scale: Tensor, n: int, group_size: int) -> Tensor:
    """x (..., K) times int4 codes (N/16, K/8, 16, 4), groups (N/16, G, 16), scale (N,): (..., n), in x's type."""
    return torch.ops.mistral_7b.int4_linear(x, codes, groups, scale, n, group_size)
