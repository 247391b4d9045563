"""Triton kernels for products with 8-bit and 4-bit weights, launched and documented by weight_only.py.

M rows · N outputs · K inputs · a weight is a small integer, or an e4m3 number, times scale[n]

Products are exact: bfloat16 and float16 represent 8-bit weights exactly, and sums are in float32. The order of a
row's sum depends on the shape of the weight only: block sizes and splits do not depend on M, tiles always have 16
rows, and splits are added in order (no atomics).
"""

# mypy: disable-error-code="no-untyped-def, import-not-found, import-untyped"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load8(pointers, mask, FP8: tl.constexpr):
    """Load 8-bit weights as float32: e4m3 values, or unsigned bytes minus 128."""
    if FP8:
        return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.load(pointers, mask=mask, other=128).to(tl.float32) - 128.0


@triton.jit
def _store(out, value, scale, x_scale, m, n, mask, M, N, SPLITS: tl.constexpr, SCALED: tl.constexpr):
    """Store at (m, n) the scaled result if there is one split, else the split's partial sum."""
    if SPLITS == 1:
        value *= tl.load(scale + (n + 0 * m), mask=mask, other=0.0)
        if SCALED:
            value *= tl.load(x_scale + (m + 0 * n), mask=mask, other=0.0)
        tl.store(out + m * N + n, value.to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(out + (tl.program_id(1) * M + m) * N + n, value, mask=mask)


@triton.jit
def combine(partials, scale, x_scale, out, M, N, SPLITS: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    """Add the partial sums (SPLITS, M, N) in order, and scale: out (M, N)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < M * N
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        total += tl.load(partials + split * M * N + i, mask=mask, other=0.0)
    _store(out, total, scale, x_scale, i // N, i % N, mask, M, N, 1, SCALED)


@triton.jit
def matvec8(
    x, w, scale, x_scale, out, N, K, span,
    FP8: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One row x (K,) times w (N, K): program (i, s) has BLOCK_N outputs and inputs s * span..(s + 1) * span."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = w + n.to(tl.int64)[:, None] * K
    begin = tl.program_id(1) * span
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, span, BLOCK_K):
        k = begin + start + tl.arange(0, BLOCK_K)
        inputs = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        acc += _load8(row + k[None, :], (n < N)[:, None] & (k < K)[None, :], FP8) * inputs[None, :]
    _store(out, tl.sum(acc, 1), scale, x_scale, 0 * n, n, n < N, 1, N, SPLITS, FP8)


@triton.jit
def matvec4(
    x, packed, m, z, scale, out, N, K, G, pitch, span, magic,
    GROUP: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """One row x (K,) times int4 weights, BLOCK_G groups per step, read as words of 8 (`pitch` words per row).

    The kernel is bound by instructions, 3 per weight, not by memory. Integer conversions run at a quarter of the
    rate, so a nibble is ORed into the mantissa of 2^23 at its own bit position (`magic` is an argument, so that it
    is in a register and one instruction masks and ORs). The resulting factor 16^j is divided out of x, and zero
    points are subtracted from the sums.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = packed + n.to(tl.int64)[:, None] * pitch
    begin = tl.program_id(1) * span
    acc = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
    for start in range(0, span, BLOCK_G * GROUP):
        word = (begin + start) // 8 + tl.arange(0, BLOCK_G * GROUP // 8)
        words = tl.load(row + word[None, :], mask=(n < N)[:, None] & (word < pitch)[None, :], other=0)
        total = tl.zeros((BLOCK_N, BLOCK_G * GROUP // 8), tl.float32)
        x_sums = tl.zeros((BLOCK_G * GROUP // 8,), tl.float32)
        for j in tl.static_range(8):
            size = 16 ** (j % 4)
            inputs = tl.load(x + 8 * word + j, mask=8 * word + j < K, other=0.0).to(tl.float32)
            x_sums += inputs
            half = words if j < 4 else words >> 16
            value = ((half & (15 * size)) | magic).to(tl.float32, bitcast=True) - 8388608.0
            total += value * (inputs * (1.0 / size))[None, :]
        g = (begin + start) // GROUP + tl.arange(0, BLOCK_G)
        valid = (n < N)[:, None] & (g < G)[None, :]
        multiplier = tl.load(m + n[:, None] * G + g[None, :], mask=valid, other=0).to(tl.float32)
        zero = tl.load(z + n[:, None] * G + g[None, :], mask=valid, other=0).to(tl.float32)
        sums = tl.sum(x_sums.reshape(BLOCK_G, GROUP // 8), 1)
        acc += multiplier * (tl.sum(total.reshape(BLOCK_N, BLOCK_G, GROUP // 8), 2) - zero * sums[None, :])
    _store(out, tl.sum(acc, 1), scale, scale, 0 * n, n, n < N, 1, N, SPLITS, False)


@triton.jit
def tile8(
    x, w, scale, x_scale, out, M, N, K, span,
    FP8: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows x (M, K) times w (N, K), 16 rows per program; if w is e4m3, so is x, with x_scale (M,).

    Row tiles are the fastest grid dimension, so that they share a weight while it is in the cache.
    """
    kind: tl.constexpr = tl.bfloat16 if FP8 else x.dtype.element_ty  # bfloat16 represents e4m3 exactly
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = w + n.to(tl.int64)[None, :] * K
    begin = tl.program_id(1) * span
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, span, BLOCK_K):
        k = begin + start + tl.arange(0, BLOCK_K)
        inputs = tl.load(x + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        weights = _load8(column + k[:, None], (k < K)[:, None] & (n < N)[None, :], FP8).to(kind)
        acc = tl.dot(inputs.to(kind), weights, acc, input_precision="ieee")
    mask = (m < M)[:, None] & (n < N)[None, :]
    _store(out, acc, scale, x_scale, m[:, None], n[None, :], mask, M, N, SPLITS, FP8)


@triton.jit
def tile4(
    x, packed, m, z, scale, out, M, N, K, G, pitch, span,
    GROUP: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows x (M, K) times int4 (N, K/2), one group per step; low nibbles are even inputs, high nibbles odd."""
    kind: tl.constexpr = x.dtype.element_ty
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = packed + n.to(tl.int64)[None, :] * pitch
    begin = tl.program_id(1) * span
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, span, GROUP):
        g = (begin + start) // GROUP
        valid = (n < N) & (g < G)
        multiplier = tl.load(m + n * G + g, mask=valid, other=0).to(tl.float32)
        shift = multiplier * tl.load(z + n * G + g, mask=valid, other=0).to(tl.float32)
        half = g * (GROUP // 2) + tl.arange(0, GROUP // 2)
        k = 2 * half
        line = x + rows[:, None] * K + k[None, :]
        even = tl.load(line, mask=(rows < M)[:, None] & (k < K)[None, :], other=0.0)
        odd = tl.load(line + 1, mask=(rows < M)[:, None] & (k + 1 < K)[None, :], other=0.0)
        bytes_ = tl.load(column + half[:, None], mask=(half < pitch)[:, None] & (n < N)[None, :], other=0)
        low = (bytes_ & 15).to(tl.float32) * multiplier[None, :] - shift[None, :]
        high = (bytes_ >> 4).to(tl.float32) * multiplier[None, :] - shift[None, :]
        acc = tl.dot(even, low.to(kind), acc, input_precision="ieee")
        acc = tl.dot(odd, high.to(kind), acc, input_precision="ieee")
    mask = (rows < M)[:, None] & (n < N)[None, :]
    _store(out, acc, scale, scale, rows[:, None], n[None, :], mask, M, N, SPLITS, False)


@triton.jit
def dequantize8(w, scale, out, N, K, FP8: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """out (N, K) = scale[n] * w, rounded once."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (n < N)[:, None] & (k < K)[None, :]
    at = n.to(tl.int64)[:, None] * K + k[None, :]
    value = _load8(w + at, mask, FP8) * tl.load(scale + n, mask=n < N, other=0.0)[:, None]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def dequantize4(packed, m, z, scale, out, N, K, G, pitch, GROUP: tl.constexpr, BLOCK_N: tl.constexpr):
    """out (N, K) = scale[n] * m * (q - z), rounded once; one group of columns per program."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    g = tl.program_id(1)
    multiplier = tl.load(m + n * G + g, mask=n < N, other=0).to(tl.float32)
    shift = multiplier * tl.load(z + n * G + g, mask=n < N, other=0).to(tl.float32)
    half = g * (GROUP // 2) + tl.arange(0, GROUP // 2)
    valid = (n < N)[:, None] & (half < pitch)[None, :]
    row = n.to(tl.int64)[:, None]
    bytes_ = tl.load(packed + row * pitch + half[None, :], mask=valid, other=0)
    low = (bytes_ & 15).to(tl.float32) * multiplier[:, None] - shift[:, None]
    high = (bytes_ >> 4).to(tl.float32) * multiplier[:, None] - shift[:, None]
    k = g * GROUP + tl.arange(0, GROUP)
    value = tl.interleave(low, high) * tl.load(scale + n, mask=n < N, other=0.0)[:, None]
    tl.store(out + row * K + k[None, :], value.to(out.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


@triton.jit
def quantize_fp8(x, q, scale, K, BLOCK: tl.constexpr):
    """Quantize a row of x (M, K) per program to e4m3, its largest magnitude to 448, with IEEE division."""
    at = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64) * K
    x32 = tl.load(x + row + at, mask=at < K, other=0.0).to(tl.float32)
    row_scale = tl.maximum(tl.div_rn(tl.max(tl.abs(x32), 0), 448.0), 1e-12)
    value = tl.minimum(tl.maximum(tl.div_rn(x32, tl.zeros_like(x32) + row_scale), -448.0), 448.0)
    tl.store(q + row + at, value.to(q.dtype.element_ty), mask=at < K)
    tl.store(scale + tl.program_id(0), row_scale)
