"""Triton kernels for products with weights in block formats and in fp8, launched and documented by weight_only.py.

M rows · N outputs · K inputs, in the weight padded to G groups · B blocks of a row · k0 first input of a step

    BITS    of a stored code: 8, or 4 with two in a byte, the even input in the low nibble
    GROUP   inputs with one step and offset, BLOCK inputs with one d (and m)
    ZERO    subtracted from the codes · MINIMUM: weights have an offset

The order of a row's sum depends on the shape of the weight only: block sizes and splits do not depend on M, tiles
always have 16 rows, and splits are added in order (no atomics).
"""

# mypy: disable-error-code="no-untyped-def, import-not-found, import-untyped"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _store(out, value, scale, x_scale, m, n, mask, M, N, SPLITS: tl.constexpr):
    """Store at (m, n) the result, scaled if there are scales, if there is one split; else the partial sum."""
    if SPLITS == 1:
        if scale is not None:
            value *= tl.load(scale + (n + 0 * m), mask=mask, other=0.0)
            value *= tl.load(x_scale + (m + 0 * n), mask=mask, other=0.0)
        tl.store(out + m * N + n, value.to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(out + (tl.program_id(1) * M + m) * N + n, value, mask=mask)


@triton.jit
def combine(partials, scale, x_scale, out, M, N, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Add the partial sums (SPLITS, M, N) in order, and scale: out (M, N)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < M * N
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        total += tl.load(partials + split * M * N + i, mask=mask, other=0.0)
    _store(out, total, scale, x_scale, i // N, i % N, mask, M, N, 1)


@triton.jit
def _grid(
    scales, d, n, k0, N, G, B,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, MINIMUM: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Step d s and offset m t, exact in float32 (n, GROUPS), of the groups from input k0 on."""
    g = k0 // GROUP + tl.arange(0, GROUPS)
    valid = (n < N)[:, None] & (g < G)[None, :]
    group = n[:, None] * G + g[None, :]
    block = n[:, None] * B + (g * GROUP // BLOCK)[None, :]
    step = tl.load(d + block, mask=valid, other=0.0).to(tl.float32)
    if scales is not None:
        step *= tl.load(scales + group, mask=valid, other=0).to(tl.float32)
    offset = tl.zeros_like(step)
    if MINIMUM:
        offset = tl.load(d + N * B + block, mask=valid, other=0.0).to(tl.float32)
        if scales is not None:
            offset *= tl.load(scales + N * G + group, mask=valid, other=0).to(tl.float32)
    return step, offset


@triton.jit
def _weights(
    packed, step, offset, part: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, MINIMUM: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The weights, float32, of code `part` of each byte packed (n, bytes of GROUPS)."""
    q = packed if BITS == 8 else (packed >> (4 * part)) & 15
    value = q.to(tl.float32).reshape(packed.shape[0], GROUPS, GROUP * BITS // 8) - ZERO
    value *= step[:, :, None]
    if MINIMUM:
        value -= offset[:, :, None]
    return value.reshape(packed.shape[0], packed.shape[1])


@triton.jit
def matvec(
    x, words, scales, d, out, N, K, G, B, steps, magic,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, ZERO: tl.constexpr, MINIMUM: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One row x (K,) times codes in int32 words: program (i, s) has BLOCK_N outputs and `steps` blocks of K.

    The kernel is bound by instructions, 3 per weight, not by memory. Integer conversions run at a quarter of the
    rate, so a code is ORed into the mantissa of 2^23 at its own bit position in the half word (`magic` is an
    argument, so that it is in a register and one instruction masks and ORs). The resulting factor is divided out
    of x, and a group's sum is multiplied by its step; offsets are subtracted from the sums.
    """
    COUNT: tl.constexpr = 32 // BITS  # codes in a word
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    pitch = G * (GROUP // COUNT)
    row = words + n.to(tl.int64)[:, None] * pitch
    acc = tl.zeros((BLOCK_N, GROUPS), tl.float32)
    for i in range(steps):
        k0 = (tl.program_id(1) * steps + i) * BLOCK_K
        at = k0 // COUNT + tl.arange(0, BLOCK_K // COUNT)
        held = tl.load(row + at[None, :], mask=(n < N)[:, None] & (at < pitch)[None, :], other=0)
        total = tl.zeros((BLOCK_N, BLOCK_K // COUNT), tl.float32)
        x_sums = tl.zeros((BLOCK_K // COUNT,), tl.float32)
        for j in tl.static_range(COUNT):
            size = 2 ** (BITS * (j % (COUNT // 2)))
            k = COUNT * at + j
            inputs = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
            x_sums += inputs
            half = held if j < COUNT // 2 else held >> 16
            value = ((half & ((2**BITS - 1) * size)) | magic).to(tl.float32, bitcast=True)
            total += (value - (8388608.0 + ZERO * size)) * (inputs * (1.0 / size))[None, :]
        step, offset = _grid(scales, d, n, k0, N, G, B, GROUP, BLOCK, MINIMUM, GROUPS)
        acc += step * tl.sum(total.reshape(BLOCK_N, GROUPS, GROUP // COUNT), 2)
        if MINIMUM:
            acc -= offset * tl.sum(x_sums.reshape(GROUPS, GROUP // COUNT), 1)[None, :]
    _store(out, tl.sum(acc, 1), None, None, 0 * n, n, n < N, 1, N, SPLITS)


@triton.jit
def tile(
    x, codes, scales, d, out, M, N, K, G, B, steps,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, ZERO: tl.constexpr, MINIMUM: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows x (M, K) times weights rounded to x's type, 16 rows per program.

    Row tiles are the fastest grid dimension, so that they share a weight while it is in the cache.
    """
    kind: tl.constexpr = x.dtype.element_ty
    COUNT: tl.constexpr = 8 // BITS  # codes in a byte
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    pitch = G * (GROUP // COUNT)
    row = codes + n.to(tl.int64)[:, None] * pitch
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(steps):
        k0 = (tl.program_id(1) * steps + i) * BLOCK_K
        at = k0 // COUNT + tl.arange(0, BLOCK_K // COUNT)
        packed = tl.load(row + at[None, :], mask=(n < N)[:, None] & (at < pitch)[None, :], other=0)
        step, offset = _grid(scales, d, n, k0, N, G, B, GROUP, BLOCK, MINIMUM, GROUPS)
        for part in tl.static_range(COUNT):
            k = COUNT * at + part
            inputs = tl.load(x + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
            weights = _weights(packed, step, offset, part, BITS, GROUP, ZERO, MINIMUM, GROUPS).to(kind)
            acc = tl.dot(inputs, tl.trans(weights), acc, input_precision="ieee")
    mask = (m < M)[:, None] & (n < N)[None, :]
    _store(out, acc, None, None, m[:, None], n[None, :], mask, M, N, SPLITS)


@triton.jit
def dequantize(
    codes, scales, d, out, N, K, G, B,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, ZERO: tl.constexpr, MINIMUM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (N, K): the weights, rounded to its type."""
    COUNT: tl.constexpr = 8 // BITS  # codes in a byte
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k0 = tl.program_id(1) * BLOCK_K
    pitch = G * (GROUP // COUNT)
    at = k0 // COUNT + tl.arange(0, BLOCK_K // COUNT)
    row = n.to(tl.int64)[:, None]
    packed = tl.load(codes + row * pitch + at[None, :], mask=(n < N)[:, None] & (at < pitch)[None, :], other=0)
    step, offset = _grid(scales, d, n, k0, N, G, B, GROUP, BLOCK, MINIMUM, GROUPS)
    value = _weights(packed, step, offset, 0, BITS, GROUP, ZERO, MINIMUM, GROUPS)
    if BITS == 4:
        value = tl.interleave(value, _weights(packed, step, offset, 1, BITS, GROUP, ZERO, MINIMUM, GROUPS))
    k = k0 + tl.arange(0, BLOCK_K)
    tl.store(out + row * K + k[None, :], value.to(out.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


@triton.jit
def matvec_fp8(
    x, w, scale, x_scale, out, N, K, steps,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One row x (K,) of e4m3 times w (N, K) of e4m3, with programs as in `matvec`."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = w + n.to(tl.int64)[:, None] * K
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for i in range(steps):
        k0 = (tl.program_id(1) * steps + i) * BLOCK_K
        k = k0 + tl.arange(0, BLOCK_K)
        inputs = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        weights = tl.load(row + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
        acc += weights.to(tl.float32) * inputs[None, :]
    _store(out, tl.sum(acc, 1), scale, x_scale, 0 * n, n, n < N, 1, N, SPLITS)


@triton.jit
def tile_fp8(
    x, w, scale, x_scale, out, M, N, K, steps,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows x (M, K) of e4m3 times w (N, K) of e4m3, with programs as in `tile`."""
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = w + n.to(tl.int64)[None, :] * K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(steps):
        k0 = (tl.program_id(1) * steps + i) * BLOCK_K
        k = k0 + tl.arange(0, BLOCK_K)
        inputs = tl.load(x + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        weights = tl.load(column + k[:, None], mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        # bfloat16 represents e4m3 exactly.
        acc = tl.dot(inputs.to(tl.bfloat16), weights.to(tl.float32).to(tl.bfloat16), acc, input_precision="ieee")
    mask = (m < M)[:, None] & (n < N)[None, :]
    _store(out, acc, scale, x_scale, m[:, None], n[None, :], mask, M, N, SPLITS)


@triton.jit
def dequantize_fp8(w, scale, out, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """out (N, K) = scale[n] * w, rounded once."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (n < N)[:, None] & (k < K)[None, :]
    at = n.to(tl.int64)[:, None] * K + k[None, :]
    value = tl.load(w + at, mask=mask, other=0.0).to(tl.float32)
    value *= tl.load(scale + n, mask=n < N, other=0.0)[:, None]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


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
