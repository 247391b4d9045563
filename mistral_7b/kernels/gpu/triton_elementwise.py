"""Triton kernels for RMSNorm, SwiGLU's gate and rotary embedding, launched by elementwise.py.

Each makes one pass over memory where PyTorch makes three to eight. Sums are in float32, in an order that depends
on the row's length only, so results are batch-invariant.
"""

# mypy: disable-error-code="no-untyped-def, import-not-found, import-untyped"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm(x, weight, out, D, eps, BLOCK: tl.constexpr):
    """One row of D elements per program: normalized in float32, rounded, times the weight."""
    at = tl.arange(0, BLOCK)
    mask = at < D
    row = tl.program_id(0).to(tl.int64) * D
    x32 = tl.load(x + row + at, mask=mask, other=0.0).to(tl.float32)
    normed = x32 * tl.rsqrt(tl.sum(x32 * x32, 0) / D + eps)
    kind: tl.constexpr = out.dtype.element_ty
    value = normed.to(kind).to(tl.float32) * tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row + at, value.to(kind), mask=mask)


@triton.jit
def silu_mul(gate, up, out, count, BLOCK: tl.constexpr):
    """silu(gate) * up; silu(gate) is rounded to the output type first, as two operations do."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    g = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    kind: tl.constexpr = out.dtype.element_ty
    silu = (g / (1.0 + tl.exp(-g))).to(kind).to(tl.float32)
    tl.store(out + at, (silu * tl.load(up + at, mask=mask, other=0.0).to(tl.float32)).to(kind), mask=mask)


@triton.jit
def rotate(x, cos, sin, out, HEADS, HALF, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr):
    """Rotate adjacent pairs of one token's heads (HEADS, 2 * HALF) by its angles (HALF,)."""
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    pair = tl.arange(0, BLOCK_P)
    mask = (h < HEADS)[:, None] & (pair < HALF)[None, :]
    c = tl.load(cos + token * HALF + pair, mask=pair < HALF, other=0.0)[None, :]
    s = tl.load(sin + token * HALF + pair, mask=pair < HALF, other=0.0)[None, :]
    at = (token * HEADS + h[:, None]) * (2 * HALF) + 2 * pair[None, :]
    even = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    odd = tl.load(x + at + 1, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, (even * c - odd * s).to(out.dtype.element_ty), mask=mask)
    tl.store(out + at + 1, (even * s + odd * c).to(out.dtype.element_ty), mask=mask)
