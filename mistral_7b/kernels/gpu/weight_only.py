"""Weight-only quantized products on a GPU: y = x w^T with w stored in 8 or 4 bits.

At small batch sizes the time is that of reading w. M rows · N outputs · K inputs · G groups of `group` columns

    int8   w[n, k] = scale[n] * (q[n, k] - 128)                          q uint8 (N, K), scale float32 (N,)
    int4   w[n, k] = scale[n] * m[n, g] * (q[n, k] - z[n, g])            two q per byte along K, low nibble first
    fp8    w[n, k] = scale[n] * q[n, k], x likewise per row              q float8_e4m3fn (N, K)

The kernel depends on the number of rows:

    1              matvec: split along K if N alone does not fill the GPU
    2 to 64        tile: tensor cores, 16 rows per tile
    more           the weight is dequantized to x's type, then cuBLAS; fp8: torch._scaled_mm

Within 2 to 64 rows, a row is bit-identical in any batch; with `invariant=True`, which always uses the tile kernel,
for any number of rows. The three kernels differ in rounding: they sum in a different order, and the dequantized
weight is rounded to x's type, while the other two multiply by the exact integer and scale the sum.

Nibbles are in canonical order. Shuffling them in advance would not help the tile kernel: low nibbles
belong to even inputs and high nibbles to odd ones, so lanes exchange no data after unpacking.

The twins in plain PyTorch also run where Triton does not: `int8_twin`, `int4_twin`, `fp8_twin`, `expand_int8`,
`expand_int4`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import FP8_LINEAR, ROUND_FP8, WEIGHT_ONLY, Backend, uses
from .launch import launch

TILE_ROWS = 64  # above, dequantizing the weight costs less than reading it once per 16 rows
# Programs that fill the GPU: two per multiprocessor of an H200 (132). Constant, so that sums have the same order
# on every GPU.
PROGRAMS = 264
ALIGNMENT = 16  # bytes per load of a thread
MATVEC = {"BLOCK_N": 8, "BLOCK_K": 1024}  # each thread has 8 loads of 16 bytes in flight
MATVEC4 = {"BLOCK_N": 16, "BLOCK_K": 1024}  # more rows, to reuse x
MAGIC = 0x4B000000  # the bits of 2^23
TILE = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 128}
E4M3_MAX = 448.0


def pack_int4(q: Tensor) -> Tensor:
    """Pack q (N, K) of 0..15 two per byte, low nibble first, rows padded to whole words: uint8 (N, >= K/2)."""
    q = F.pad(q.to(torch.uint8), (0, -q.shape[-1] % (2 * ALIGNMENT)))
    return q[:, 0::2] | (q[:, 1::2] << 4)


def unpack_int4(packed: Tensor, K: int) -> Tensor:
    """The inverse of `pack_int4`: uint8 (N, K) of 0..15."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[:, :K]


def int4_integers(packed: Tensor, m: Tensor, z: Tensor, group: int, K: int) -> Tensor:
    """The integers m * (q - z) of an int4 weight, within int8, as float32 (N, K)."""
    m, z = (t.repeat_interleave(group, -1)[:, :K].float() for t in (m, z))
    return m * (unpack_int4(packed, K).float() - z)


def expand_int8(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The dequantized int8 (or, if q is e4m3, fp8) weight (N, K), rounded once to `dtype`."""
    if not uses(Backend.TRITON, WEIGHT_ONLY, scale):
        return (_int8_integers(q) * scale[:, None]).to(dtype)
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    N, K = q.shape
    fp8 = q.dtype == torch.float8_e4m3fn
    _launch("dequantize8", (-(-N // 8), -(-K // 512)), q, scale, out, N, K, FP8=fp8, BLOCK_N=8, BLOCK_K=512)
    return out


def expand_int4(
    packed: Tensor, m: Tensor, z: Tensor, scale: Tensor, group: int, K: int, dtype: torch.dtype
) -> Tensor:
    """The dequantized int4 weight (N, K), rounded once to `dtype`."""
    if not uses(Backend.TRITON, WEIGHT_ONLY, scale):
        return (int4_integers(packed, m, z, group, K) * scale[:, None]).to(dtype)
    N, G = m.shape
    out = torch.empty(N, K, dtype=dtype, device=packed.device)
    block = {"GROUP": group, "BLOCK_N": 4096 // group}
    _launch(
        "dequantize4", (-(-N // block["BLOCK_N"]), G), packed, m, z, scale, out, N, K, G, packed.shape[1], **block
    )
    return out


def int8_linear(x: Tensor, q: Tensor, scale: Tensor, *, invariant: bool = False) -> Tensor:
    """x (..., K) times the int8 weight q (N, K) uint8, scale (N,) float32: (..., N) in x's type."""
    rows = x.reshape(-1, x.shape[-1])
    if not x.numel() or not uses(Backend.TRITON, WEIGHT_ONLY, x):
        return int8_twin(x, q, scale)
    if len(rows) > TILE_ROWS and not invariant:
        return F.linear(x, expand_int8(q, scale, x.dtype))
    return _linear8(rows, q, scale, scale, x.dtype, invariant).unflatten(0, x.shape[:-1])


def int4_linear(
    x: Tensor, packed: Tensor, m: Tensor, z: Tensor, scale: Tensor, group: int, *, invariant: bool = False
) -> Tensor:
    """x (..., K) times the int4 weight: packed by `pack_int4`, m and z uint8 (N, G), scale float32 (N,).

    `group` is a power of two >= 32. Returns (..., N) in x's type.
    """
    K, (N, G) = x.shape[-1], m.shape
    rows = x.reshape(-1, K).contiguous()
    M = len(rows)
    if not x.numel() or not uses(Backend.TRITON, WEIGHT_ONLY, x):
        return int4_twin(x, packed, m, z, scale, group)
    if M > TILE_ROWS and not invariant:
        return F.linear(x, expand_int4(packed, m, z, scale, group, K, x.dtype))
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    pitch = packed.shape[1]
    if M == 1 and not invariant:
        blocks = {"BLOCK_N": MATVEC4["BLOCK_N"], "BLOCK_G": max(1, MATVEC4["BLOCK_K"] // group)}
        splits, span = _split(N, K, blocks["BLOCK_N"], blocks["BLOCK_G"] * group)
        target, constants = _output_buffer(out, splits), {"GROUP": group, "SPLITS": splits, **blocks}
        weight = (packed.view(torch.int32), m, z, scale)
        grid: tuple[int, ...] = (-(-N // blocks["BLOCK_N"]), splits)
        _launch("matvec4", grid, rows, *weight, target, N, K, G, pitch // 4, span, MAGIC, **constants)
    else:
        blocks = {"BLOCK_M": TILE["BLOCK_M"], "BLOCK_N": TILE["BLOCK_N"]}
        splits, span = _split(N, K, blocks["BLOCK_N"], group)
        target, constants = _output_buffer(out, splits), {"GROUP": group, "SPLITS": splits, **blocks}
        grid = (-(-M // blocks["BLOCK_M"]), splits, -(-N // blocks["BLOCK_N"]))
        _launch("tile4", grid, rows, packed, m, z, scale, target, M, N, K, G, pitch, span, **constants)
    return _combine_splits(target, scale, scale, out, scaled=False).unflatten(0, x.shape[:-1])


def fp8_linear(x: Tensor, q: Tensor, scale: Tensor, *, invariant: bool = False) -> Tensor:
    """x (..., K), quantized to e4m3 per row, times the fp8 weight q (N, K), scale (N,): (..., N) in x's type.

    Activations are quantized for any number of rows, so that prefill and decode compute the same function.
    """
    if not x.numel() or not uses(Backend.TRITON, WEIGHT_ONLY, x):
        return fp8_twin(x, q, scale)
    rows, x_scale = to_fp8(x.reshape(-1, x.shape[-1]))
    N, K = q.shape
    if len(rows) <= TILE_ROWS or invariant:
        out = _linear8(rows, q, scale, x_scale, x.dtype, invariant)
    elif N % 16 == 0 and K % 16 == 0 and uses(Backend.CUBLAS, FP8_LINEAR, x):
        # Fast accumulation would keep only 14 bits of the sums.
        scales = {"scale_a": x_scale[:, None], "scale_b": scale[None, :]}
        out = torch._scaled_mm(rows, q.T, **scales, out_dtype=torch.bfloat16, use_fast_accum=False)
    else:
        unit = torch.ones_like(scale)
        product = F.linear(rows.float(), expand_int8(q, unit, torch.float32))
        out = (product * x_scale[:, None] * scale).to(x.dtype)
    return out.unflatten(0, x.shape[:-1])


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize x (M, K) to e4m3 (M, K), with float32 scales (M,) that map each row's absmax to 448."""
    if not x.numel() or not uses(Backend.TRITON, ROUND_FP8, x):
        return to_fp8_twin(x)
    x = x.contiguous()
    q, scale = torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty(len(x), dtype=torch.float32)
    K = x.shape[1]
    _launch("quantize_fp8", (len(x),), x, q, scale, K, BLOCK=1 << (K - 1).bit_length(), num_warps=8)
    return q, scale


def to_fp8_twin(x: Tensor) -> tuple[Tensor, Tensor]:
    """`to_fp8` in plain PyTorch."""
    x32 = x.float()
    scale = (x32.abs().amax(-1) / E4M3_MAX).clamp(min=1e-12)
    return (x32 / scale[:, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def int8_twin(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """`int8_linear` in plain PyTorch: exact integers, summed in float32 or wider, scaled at the end."""
    return _sum(x, _int8_integers(q), scale)


def int4_twin(x: Tensor, packed: Tensor, m: Tensor, z: Tensor, scale: Tensor, group: int) -> Tensor:
    """`int4_linear` in plain PyTorch."""
    return _sum(x, int4_integers(packed, m, z, group, x.shape[-1]), scale)


def fp8_twin(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """`fp8_linear` in plain PyTorch."""
    rows, x_scale = to_fp8_twin(x.reshape(-1, x.shape[-1]))
    out = F.linear(rows.float(), q.float()) * scale * x_scale[:, None]
    return out.to(x.dtype).unflatten(0, x.shape[:-1])


def _sum(x: Tensor, integers: Tensor, scale: Tensor) -> Tensor:
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    return (F.linear(x.to(compute_dtype), integers.to(compute_dtype)) * scale.to(compute_dtype)).to(x.dtype)


def _int8_integers(q: Tensor) -> Tensor:
    return q.float() if q.dtype == torch.float8_e4m3fn else q.float() - 128


def _split(N: int, K: int, block_n: int, block_k: int) -> tuple[int, int]:
    """The number of splits of K for PROGRAMS programs, and the inputs per split; from the weight's shape only."""
    steps = -(-K // block_k)
    splits = max(1, min(steps, PROGRAMS // -(-N // block_n)))
    span = -(-steps // splits)
    return -(-steps // span), span * block_k


def _linear8(x: Tensor, q: Tensor, scale: Tensor, x_scale: Tensor, dtype: torch.dtype, invariant: bool) -> Tensor:
    """Rows x (M, K) times an 8-bit weight, int8 or, with x and q of e4m3, fp8: (M, N)."""
    x = x.contiguous()
    M, (N, K) = len(x), q.shape
    out = torch.empty(M, N, dtype=dtype, device=x.device)
    fp8 = q.dtype == torch.float8_e4m3fn
    single_row = M == 1 and not invariant
    blocks = MATVEC if single_row else TILE
    splits, span = _split(N, K, blocks["BLOCK_N"], blocks["BLOCK_K"])
    target = _output_buffer(out, splits)
    columns = -(-N // blocks["BLOCK_N"])
    constants: dict[str, Any] = {"FP8": fp8, "SPLITS": splits, **blocks}
    if single_row:
        _launch("matvec8", (columns, splits), x, q, scale, x_scale, target, N, K, span, **constants)
    else:
        grid = (-(-M // blocks["BLOCK_M"]), splits, columns)
        _launch("tile8", grid, x, q, scale, x_scale, target, M, N, K, span, **constants)
    return _combine_splits(target, scale, x_scale, out, scaled=fp8)


def _output_buffer(out: Tensor, splits: int) -> Tensor:
    """The kernel's output buffer: the result, or partial sums (splits, M, N)."""
    return out if splits == 1 else out.new_empty(splits, *out.shape, dtype=torch.float32)


def _combine_splits(target: Tensor, scale: Tensor, x_scale: Tensor, out: Tensor, *, scaled: bool) -> Tensor:
    if target is not out:
        M, N = out.shape
        constants = {"SPLITS": len(target), "SCALED": scaled, "BLOCK": 256}
        _launch("combine", (-(-M * N // 256),), target, scale, x_scale, out, M, N, **constants)
    return out


_launch = functools.partial(launch, "triton_linear")
