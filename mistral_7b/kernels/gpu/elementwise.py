"""What lies between the matrix products on a GPU: elementwise.py's operators there, and attention of one token.

Written for Triton and compared with the twins in its interpreter; where Triton cannot run, without it, for
float64 or for a gradient, the twin does the work.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..elementwise import rms_norm_twin, rotate_twin, silu_mul_twin
from ..linear import OPS

KINDS = (torch.bfloat16, torch.float16, torch.float32)  # what the kernels take
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it once as well
SPLIT = 256  # keys that one program attends to, whatever the batch: so no row's sums depend on others
BLOCK_S = 64  # of which at once


@functools.cache
def triton_module(name: str) -> ModuleType | None:
    """A module of kernels of this package, or None where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(f"{__package__}.{name}")


def runs_kernels(x: Tensor) -> bool:
    """Whether Triton can work on x: on a CUDA device, or anywhere in Triton's interpreter, but for no gradient.

    Not under torch.compile, which has kernels of its own for what the twins do.
    """
    if not (x.is_cuda or INTERPRETED) or x.dtype not in KINDS or torch.compiler.is_compiling():
        return False
    return not (x.requires_grad and torch.is_grad_enabled()) and triton_module("triton_elementwise") is not None


def launch(module: str, kernel: str, grid: tuple[int, ...], first: Tensor, *arguments: Any, **how: Any) -> None:
    """Run a kernel on the device of its first tensor, which need not be the current one."""
    with torch.cuda.device_of(first):
        getattr(triton_module(module), kernel)[grid](first, *arguments, **how)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension of x (..., D), as the model's RMSNorm."""
    if not runs_kernels(x) or x.dtype != weight.dtype or not x.numel():
        return rms_norm_twin(x, weight, eps)
    x = x.contiguous()
    out = torch.empty_like(x)
    D = x.shape[-1]
    _launch("rms_norm", (x.numel() // D,), x, weight, out, D, eps, BLOCK=_power(D))
    return out


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape and type."""
    if not runs_kernels(gate) or not gate.numel():
        return silu_mul_twin(gate, up)
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _launch("silu_mul", (-(-gate.numel() // 1024),), gate, up, out, gate.numel(), BLOCK=1024)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of x (..., heads, K) by angles whose cos and sin are (..., 1, K/2), float32.

    The angles have x's leading dimensions, or fewer and then serve for all: (T, 1, K/2) for (B, T, heads, K).
    """
    if not runs_kernels(x) or cos.dtype != torch.float32 or not x.numel():
        return rotate_twin(x, cos, sin)
    x = x.contiguous()
    heads, half = x.shape[-2], x.shape[-1] // 2
    cos, sin = (t.expand(*x.shape[:-2], 1, half).contiguous() for t in (cos, sin))
    out = torch.empty_like(x)
    block_h = min(8, _power(heads))
    grid = (x.numel() // (2 * half * heads), -(-heads // block_h))
    _launch("rotate", grid, x, cos, sin, out, heads, half, BLOCK_H=block_h, BLOCK_P=_power(half))
    return out


def decode_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """Attention of one token a row: q (B, 1, H, K) over k, v (B, S, G, K), as they lie in a ring: (B, 1, H, K).

    `seen` (B, 1, S) bool says which keys are visible (attention.visible, by position); None: all. What lies
    in the others, NaN too, is never read. Split over the keys in runs of SPLIT, the H/G query heads of a key
    head together; splits are merged in their order, and a row depends on nothing but itself.
    """
    B, _, H, K = q.shape
    S, G = k.shape[1], k.shape[2]
    if not runs_kernels(q) or not q.numel():
        return decode_attention_twin(q, k, v, seen)
    q = q.contiguous()
    k, v = (t if t.stride(3) == 1 and t.stride(2) == K else t.contiguous() for t in (k, v))
    R, splits, block_k = H // G, -(-S // SPLIT), max(16, _power(K))
    tops, totals = (torch.empty(B * H, splits, dtype=torch.float32, device=q.device) for _ in "mt")
    sums = torch.empty(B * H, splits, K, dtype=torch.float32, device=q.device)
    visible = q if seen is None else seen.contiguous().view(torch.uint8)
    row = 0 if seen is None else S
    strides = (k.stride(0), k.stride(1), v.stride(0), v.stride(1), row)
    how = {"MASKED": seen is not None, "SPLIT": SPLIT, "BLOCK_S": BLOCK_S, "BLOCK_R": max(16, _power(R))}
    parts = (tops, totals, sums)
    sizes = (1 / math.sqrt(K), G, R, K)
    _launch("attend_split", (B * G, splits), q, k, v, visible, *parts, S, *strides, *sizes, BLOCK_K=block_k, **how)
    out = torch.empty_like(q)
    _launch("attend_merge", (B * H,), *parts, out, splits, K, BLOCK_SPLITS=_power(splits), BLOCK_K=block_k)
    return out


def decode_attention_twin(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """`decode_attention` in plain PyTorch, in float32 at least."""
    B, _, H, K = q.shape
    G = k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    query = q.to(wide).view(B, G, H // G, K)
    if seen is not None:  # what is not seen may be anything, and 0 * NaN is NaN
        k, v = (torch.where(seen[:, 0, :, None, None], t, 0) for t in (k, v))
    scores = torch.einsum("bgrk,bsgk->bgrs", query, k.to(wide)) / math.sqrt(K)
    if seen is not None:
        scores = scores.masked_fill(~seen[:, 0, None, None, :], -math.inf)
    out = torch.einsum("bgrs,bsgk->bgrk", scores.softmax(-1), v.to(wide))
    return out.reshape(B, 1, H, K).to(q.dtype)


_launch = functools.partial(launch, "triton_elementwise")


def _power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


for name, kernel in (("rms_norm", rms_norm), ("silu_mul", silu_mul), ("rotate", rotate)):
    OPS.impl(name, kernel, "CUDA")
