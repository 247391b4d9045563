"""What lies between the products of a block: RMSNorm, rotation, SwiGLU's gate, each in one pass over memory.

The twins are model.py's own lines. Rounding happens where it does there, so that float32 and bfloat16 results are
the twins' but for the order of one sum (RMSNorm) and the last bit of one exponential (SiLU).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import compiler
from .linear import FLOATS, OPS


def rms_norm_twin(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) in float32, cast, times the weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def silu_mul_twin(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


def rotate_twin(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring pairs of x (..., heads, K) turned by angles (..., 1, K/2)."""
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    lib = compiler.library()
    if lib is None or x.dtype not in FLOATS or weight.dtype != x.dtype:
        return rms_norm_twin(x, weight, eps)
    x, D = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    lib.m7b_rms_norm(
        x.dtype == torch.bfloat16, x.data_ptr(), weight.data_ptr(), x.numel() // D, D, eps,
        torch.get_num_threads(), out.data_ptr(),
    )  # fmt: skip
    return out


def _silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    lib = compiler.library()
    if lib is None or gate.dtype not in FLOATS:
        return silu_mul_twin(gate, up)
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    lib.m7b_silu_mul(
        gate.dtype == torch.bfloat16, gate.data_ptr(), up.data_ptr(), gate.numel(),
        torch.get_num_threads(), out.data_ptr(),
    )  # fmt: skip
    return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    lib = compiler.library()
    heads, K = x.shape[-2:]
    M, angles = x.numel() // max(1, heads * K), cos.numel() // max(1, K // 2)
    # A table of angles serves rows that come round again: (T,) positions for tokens (B, T).
    regular = cos.dtype == torch.float32 and angles and cos.shape[:-2] == x.shape[x.dim() - cos.dim() : -2]
    if lib is None or x.dtype not in FLOATS or not regular or not M:
        return rotate_twin(x, cos, sin)
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    out = torch.empty_like(x)
    lib.m7b_rotate(
        x.dtype == torch.bfloat16, x.data_ptr(), cos.data_ptr(), sin.data_ptr(), M, angles, heads, K,
        torch.get_num_threads(), out.data_ptr(),
    )  # fmt: skip
    return out


OPS.define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
OPS.define("silu_mul(Tensor gate, Tensor up) -> Tensor")
OPS.define("rotate(Tensor x, Tensor cos, Tensor sin) -> Tensor")
for name, kernel in (("rms_norm", _rms_norm), ("silu_mul", _silu_mul), ("rotate", _rotate)):
    OPS.impl(name, kernel, "CPU")
    torch.library.register_fake(f"mistral_7b::{name}", lambda x, *rest: torch.empty_like(x))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x (..., D) by weight (D,)."""
    return torch.ops.mistral_7b.rms_norm(x, weight, eps)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both of one shape."""
    return torch.ops.mistral_7b.silu_mul(gate, up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (..., heads, K), interleaved, by float32 cos and sin (..., 1, K/2)."""
    return torch.ops.mistral_7b.rotate(x, cos, sin)
