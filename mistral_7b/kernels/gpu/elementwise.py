"""RMSNorm, SwiGLU's gate and rotary embedding in Triton: the GPU implementations of ../elementwise.py.

Call them only if backend.py selects Triton, with non-empty tensors.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .launch import launch, power


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension of x (..., D), as the model's RMSNorm."""
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    D = x.shape[-1]
    _launch("rms_norm", (x.numel() // D,), x, weight, out, D, eps, BLOCK=power(D))
    return out


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of the same shape and type."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _launch("silu_mul", (-(-gate.numel() // 1024),), gate, up, out, gate.numel(), BLOCK=1024)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent pairs of x (..., heads, K) by angles with float32 cos and sin (..., 1, K/2).

    The angles broadcast over leading dimensions that they lack: (T, 1, K/2) for (B, T, heads, K).
    """
    x = x.contiguous()
    heads, half = x.shape[-2], x.shape[-1] // 2
    cos, sin = (t.expand(*x.shape[:-2], 1, half).contiguous() for t in (cos, sin))
    out = torch.empty_like(x)
    block_h = min(8, power(heads))
    grid = (x.numel() // (2 * half * heads), -(-heads // block_h))
    _launch("rotate", grid, x, cos, sin, out, heads, half, BLOCK_H=block_h, BLOCK_P=power(half))
    return out


_launch = functools.partial(launch, "triton_elementwise")
