"""Triton kernels that multiply by weights of 8 and 4 bits. weight_only.py says what they compute, and when.

M rows · N outputs · K inputs · every weight is a small whole number, or an e4m3 one, times scale[n]

Two promises hold by construction. Products are exact: weights are at most 8 bits wide, which bfloat16 and
float16 hold without rounding, and sums run in float32. And the order of a row's sum is fixed by the shape
of the weight alone: block sizes and splits never depend on M, tiles are always 16 rows high, and splits
are added up in their order (no atomics).

Written for a GPU and run in Triton's interpreter; compiled for sm_80, sm_89 and sm_90; never yet timed.
"""

# mypy: disable-error-code="no-untyped-def, import-not-found, import-untyped"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load8(pointers, mask, FP8: tl.constexpr):
    """Weights of 8 bits as float32: e4m3 as they are, else unsigned bytes around 128."""
    if FP8:
        return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.load(pointers, mask=mask, other=128).to(tl.float32) - 128.0


@triton.jit
def _store(out, value, scale, x_scale, m, n, mask, M, N, SPLITS: tl.constexpr, SCALED: tl.constexpr):
    """A result at (m, n): scaled and final if there is one split, else a share of the sum."""
    if SPLITS == 1:
        value *= tl.load(scale + (n + 0 * m), mask=mask, other=0.0)
        if SCALED:
            value *= tl.load(x_scale + (m + 0 * n), mask=mask, other=0.0)
        tl.store(out + m * N + n, value.to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(out + (tl.program_id(1) * M + m) * N + n, value, mask=mask)


@triton.jit
def combine(parts, scale, x_scale, out, M, N, SPLITS: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    """Add up the shares (SPLITS, M, N) in order, and scale: out (M, N)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < M * N
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        total += tl.load(parts + split * M * N + i, mask=mask, other=0.0)
    _store(out, total, scale, x_scale, i // N, i % N, mask, M, N, 1, SCALED)


@triton.jit
def matvec8(
    x, w, scale, x_scale, out, N, K, span,
    FP8: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One row x (K,) by w (N, K): program (i, s) takes BLOCK_N outputs and inputs s * span to (s + 1) * span."""
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
    """One row x (K,) by nibbles, BLOCK_G groups a step, read as words of 8 (`pitch` words a row).

    What bounds this is not memory but instructions: 3 a weight here. Integers convert at a quarter of the
    rate, so a nibble is set into the mantissa of 2^23 (`magic`, an argument so that it lies in a register
    and one instruction masks and sets), where it happens to lie; the 16^j by which it is then too large is
    taken from x, and zero points from the sums.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = packed + n.to(tl.int64)[:, None] * pitch
    begin = tl.program_id(1) * span
    acc = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
    for start in range(0, span, BLOCK_G * GROUP):
        word = (begin + start) // 8 + tl.arange(0, BLOCK_G * GROUP // 8)
        words = tl.load(row + word[None, :], mask=(n < N)[:, None] & (word < pitch)[None, :], other=0)
        total = tl.zeros((BLOCK_N, BLOCK_G * GROUP // 8), tl.float32)
        plain = tl.zeros((BLOCK_G * GROUP // 8,), tl.float32)
        for j in tl.static_range(8):
            size = 16 ** (j % 4)
            inputs = tl.load(x + 8 * word + j, mask=8 * word + j < K, other=0.0).to(tl.float32)
            plain += inputs
            half = words if j < 4 else words >> 16
            value = ((half & (15 * size)) | magic).to(tl.float32, bitcast=True) - 8388608.0
            total += value * (inputs * (1.0 / size))[None, :]
        g = (begin + start) // GROUP + tl.arange(0, BLOCK_G)
        there = (n < N)[:, None] & (g < G)[None, :]
        times = tl.load(m + n[:, None] * G + g[None, :], mask=there, other=0).to(tl.float32)
        zero = tl.load(z + n[:, None] * G + g[None, :], mask=there, other=0).to(tl.float32)
        sums = tl.sum(plain.reshape(BLOCK_G, GROUP // 8), 1)
        acc += times * (tl.sum(total.reshape(BLOCK_N, BLOCK_G, GROUP // 8), 2) - zero * sums[None, :])
    _store(out, tl.sum(acc, 1), scale, scale, 0 * n, n, n < N, 1, N, SPLITS, False)


@triton.jit
def tile8(
    x, w, scale, x_scale, out, M, N, K, span,
    FP8: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows x (M, K) by w (N, K), 16 rows a program; x is e4m3 with x_scale (M,) where w is.

    Tiles of rows come first in the grid, so that they meet a weight while it is in the cache.
    """
    kind: tl.constexpr = tl.bfloat16 if FP8 else x.dtype.element_ty  # e4m3 fits bfloat16 exactly
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
    """Rows x (M, K) by nibbles (N, K/2), a group a step: even inputs meet low nibbles, odd ones high."""
    kind: tl.constexpr = x.dtype.element_ty
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = packed + n.to(tl.int64)[None, :] * pitch
    begin = tl.program_id(1) * span
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, span, GROUP):
        g = (begin + start) // GROUP
        there = (n < N) & (g < G)
        times = tl.load(m + n * G + g, mask=there, other=0).to(tl.float32)
        shift = times * tl.load(z + n * G + g, mask=there, other=0).to(tl.float32)
        half = g * (GROUP // 2) + tl.arange(0, GROUP // 2)
        k = 2 * half
        line = x + rows[:, None] * K + k[None, :]
        even = tl.load(line, mask=(rows < M)[:, None] & (k < K)[None, :], other=0.0)
        odd = tl.load(line + 1, mask=(rows < M)[:, None] & (k + 1 < K)[None, :], other=0.0)
        bytes_ = tl.load(column + half[:, None], mask=(half < pitch)[:, None] & (n < N)[None, :], other=0)
        low = (bytes_ & 15).to(tl.float32) * times[None, :] - shift[None, :]
        high = (bytes_ >> 4).to(tl.float32) * times[None, :] - shift[None, :]
        acc = tl.dot(even, low.to(kind), acc, input_precision="ieee")
        acc = tl.dot(odd, high.to(kind), acc, input_precision="ieee")
    mask = (rows < M)[:, None] & (n < N)[None, :]
    _store(out, acc, scale, scale, rows[:, None], n[None, :], mask, M, N, SPLITS, False)


@triton.jit
def expand8(w, scale, out, N, K, FP8: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """out (N, K) = scale[n] * w, rounded once."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (n < N)[:, None] & (k < K)[None, :]
    at = n.to(tl.int64)[:, None] * K + k[None, :]
    value = _load8(w + at, mask, FP8) * tl.load(scale + n, mask=n < N, other=0.0)[:, None]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def expand4(packed, m, z, scale, out, N, K, G, pitch, GROUP: tl.constexpr, BLOCK_N: tl.constexpr):
    """out (N, K) = scale[n] * m * (q - z), rounded once; a group of columns a program."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    g = tl.program_id(1)
    times = tl.load(m + n * G + g, mask=n < N, other=0).to(tl.float32)
    shift = times * tl.load(z + n * G + g, mask=n < N, other=0).to(tl.float32)
    half = g * (GROUP // 2) + tl.arange(0, GROUP // 2)
    there = (n < N)[:, None] & (half < pitch)[None, :]
    row = n.to(tl.int64)[:, None]
    bytes_ = tl.load(packed + row * pitch + half[None, :], mask=there, other=0)
    low = (bytes_ & 15).to(tl.float32) * times[:, None] - shift[:, None]
    high = (bytes_ >> 4).to(tl.float32) * times[:, None] - shift[:, None]
    k = g * GROUP + tl.arange(0, GROUP)
    value = tl.interleave(low, high) * tl.load(scale + n, mask=n < N, other=0.0)[:, None]
    tl.store(out + row * K + k[None, :], value.to(out.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


@triton.jit
def round_fp8(x, q, scale, K, BLOCK: tl.constexpr):
    """A row of x (M, K) a program, as e4m3 q with its scale: the largest becomes 448. Divisions are exact ones."""
    at = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64) * K
    wide = tl.load(x + row + at, mask=at < K, other=0.0).to(tl.float32)
    unit = tl.maximum(tl.div_rn(tl.max(tl.abs(wide), 0), 448.0), 1e-12)
    value = tl.minimum(tl.maximum(tl.div_rn(wide, tl.zeros_like(wide) + unit), -448.0), 448.0)
    tl.store(q + row + at, value.to(q.dtype.element_ty), mask=at < K)
    tl.store(scale + tl.program_id(0), unit)
