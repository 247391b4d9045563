"""y = x w^T where w lies in memory as 8 or 4 bits: for a GPU, whose time at small batches goes into reading w.

M rows · N outputs · K inputs · G groups of `group` columns

    int8   w[n, k] = scale[n] * (q[n, k] - 128)                          q uint8 (N, K), scale float32 (N,)
    int4   w[n, k] = scale[n] * m[n, g] * (q[n, k] - z[n, g])            two q a byte along K, low nibble first
    fp8    w[n, k] = scale[n] * q[n, k], x likewise a row at a time      q float8_e4m3fn (N, K)

What runs, by the number of rows (one on the GPU):

    1              matvec: split along K where N alone would not fill the GPU
    2 to 64        tile: tensor cores, 16 rows at a time
    more           the weight expanded once to x's type, then cuBLAS; fp8: torch._scaled_mm

A row's result is bit-identical whatever other rows there are within 2 to 64, and for every number of rows,
one and a thousand too, with `invariant=True`, which always takes the tile kernel. It differs in rounding
between the three ways: sums run in another order, and the expanded weight is rounded to x's type, while
the other two multiply by the exact whole number and scale the sum.

The nibbles keep their canonical order. A pre-shuffle would save the tile kernel nothing: even inputs meet
low nibbles and odd inputs high ones, so that no lane has to exchange what it unpacked.

Each way has its twin in plain PyTorch, which also runs wherever Triton cannot: `int8_twin`, `int4_twin`,
`fp8_twin`, `expand_int8`, `expand_int4`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import FP8_LINEAR, ROUND_FP8, WEIGHT_ONLY, Backend, uses
from .launch import launch

TILE_ROWS = 64  # more rows than these: expanding the weight costs less than reading it once per 16 rows
PROGRAMS = 264  # programs that fill the GPU, two for each of an H200's 132 multiprocessors; a constant, so
# that sums have one order on every GPU
ALIGNMENT = 16  # bytes: what one thread loads at once
MATVEC = {"BLOCK_N": 8, "BLOCK_K": 1024}  # 8 rows of 16 bytes a thread in flight
MATVEC4 = {"BLOCK_N": 16, "BLOCK_K": 1024}  # more rows, so that x, to be unpacked for each word, serves more
MAGIC = 0x4B000000  # the bits of 2^23
TILE = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 128}
E4M3_MAX = 448.0


def pack_int4(q: Tensor) -> Tensor:
    """Pack q (N, K) of 0..15 two a byte, low nibble first, rows filled up to whole words: uint8 (N, >= K/2)."""
    q = F.pad(q.to(torch.uint8), (0, -q.shape[-1] % (2 * ALIGNMENT)))
    return q[:, 0::2] | (q[:, 1::2] << 4)


def unpack_int4(packed: Tensor, K: int) -> Tensor:
    """The reverse of `pack_int4`: uint8 (N, K) of 0..15."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[:, :K]


def whole_int4(packed: Tensor, m: Tensor, z: Tensor, group: int, K: int) -> Tensor:
    """The whole numbers m * (q - z) of an int4 weight, as float32 (N, K). They fit int8."""
    m, z = (t.repeat_interleave(group, -1)[:, :K].float() for t in (m, z))
    return m * (unpack_int4(packed, K).float() - z)


def expand_int8(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The int8 (or, with q of e4m3, fp8) weight itself (N, K), rounded once to `dtype`."""
    if not uses(Backend.TRITON, WEIGHT_ONLY, scale):
        return (_whole_int8(q) * scale[:, None]).to(dtype)
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    N, K = q.shape
    fp8 = q.dtype == torch.float8_e4m3fn
    _launch("expand8", (-(-N // 8), -(-K // 512)), q, scale, out, N, K, FP8=fp8, BLOCK_N=8, BLOCK_K=512)
    return out


def expand_int4(
    packed: Tensor, m: Tensor, z: Tensor, scale: Tensor, group: int, K: int, dtype: torch.dtype
) -> Tensor:
    """The int4 weight itself (N, K), rounded once to `dtype`."""
    if not uses(Backend.TRITON, WEIGHT_ONLY, scale):
        return (whole_int4(packed, m, z, group, K) * scale[:, None]).to(dtype)
    N, G = m.shape
    out = torch.empty(N, K, dtype=dtype, device=packed.device)
    block = {"GROUP": group, "BLOCK_N": 4096 // group}
    _launch("expand4", (-(-N // block["BLOCK_N"]), G), packed, m, z, scale, out, N, K, G, packed.shape[1], **block)
    return out


def int8_linear(x: Tensor, q: Tensor, scale: Tensor, *, invariant: bool = False) -> Tensor:
    """x (..., K) by the int8 weight q (N, K) uint8, scale (N,) float32: (..., N) in x's type."""
    rows = x.reshape(-1, x.shape[-1])
    if not x.numel() or not uses(Backend.TRITON, WEIGHT_ONLY, x):
        return int8_twin(x, q, scale)
    if len(rows) > TILE_ROWS and not invariant:
        return F.linear(x, expand_int8(q, scale, x.dtype))
    return _eight(rows, q, scale, scale, x.dtype, invariant).unflatten(0, x.shape[:-1])


def int4_linear(
    x: Tensor, packed: Tensor, m: Tensor, z: Tensor, scale: Tensor, group: int, *, invariant: bool = False
) -> Tensor:
    """x (..., K) by the int4 weight: packed as by `pack_int4`, m and z uint8 (N, G), scale float32 (N,).

    `group` is a power of two, 32 at least. Returns (..., N) in x's type.
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
        target, how = _shares(out, splits), {"GROUP": group, "SPLITS": splits, **blocks}
        weight = (packed.view(torch.int32), m, z, scale)
        grid: tuple[int, ...] = (-(-N // blocks["BLOCK_N"]), splits)
        _launch("matvec4", grid, rows, *weight, target, N, K, G, pitch // 4, span, MAGIC, **how)
    else:
        blocks = {"BLOCK_M": TILE["BLOCK_M"], "BLOCK_N": TILE["BLOCK_N"]}
        splits, span = _split(N, K, blocks["BLOCK_N"], group)
        target, how = _shares(out, splits), {"GROUP": group, "SPLITS": splits, **blocks}
        grid = (-(-M // blocks["BLOCK_M"]), splits, -(-N // blocks["BLOCK_N"]))
        _launch("tile4", grid, rows, packed, m, z, scale, target, M, N, K, G, pitch, span, **how)
    return _combined(target, scale, scale, out, scaled=False).unflatten(0, x.shape[:-1])


def fp8_linear(x: Tensor, q: Tensor, scale: Tensor, *, invariant: bool = False) -> Tensor:
    """x (..., K), rounded a row at a time to e4m3, by the fp8 weight q (N, K), scale (N,): (..., N) in x's type.

    The activations are rounded for every number of rows, so that prefill and decode mean the same.
    """
    if not x.numel() or not uses(Backend.TRITON, WEIGHT_ONLY, x):
        return fp8_twin(x, q, scale)
    rows, x_scale = to_fp8(x.reshape(-1, x.shape[-1]))
    N, K = q.shape
    if len(rows) <= TILE_ROWS or invariant:
        out = _eight(rows, q, scale, x_scale, x.dtype, invariant)
    elif N % 16 == 0 and K % 16 == 0 and uses(Backend.CUBLAS, FP8_LINEAR, x):
        # Fast accumulation would keep 14 bits of the sums.
        scales = {"scale_a": x_scale[:, None], "scale_b": scale[None, :]}
        out = torch._scaled_mm(rows, q.T, **scales, out_dtype=torch.bfloat16, use_fast_accum=False)
    else:
        unit = torch.ones_like(scale)
        product = F.linear(rows.float(), expand_int8(q, unit, torch.float32))
        out = (product * x_scale[:, None] * scale).to(x.dtype)
    return out.unflatten(0, x.shape[:-1])


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) as e4m3 (M, K) with a float32 scale for each row (M,), so that its largest value is 448."""
    if not x.numel() or not uses(Backend.TRITON, ROUND_FP8, x):
        return to_fp8_twin(x)
    x = x.contiguous()
    q, scale = torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty(len(x), dtype=torch.float32)
    K = x.shape[1]
    _launch("round_fp8", (len(x),), x, q, scale, K, BLOCK=1 << (K - 1).bit_length(), num_warps=8)
    return q, scale


def to_fp8_twin(x: Tensor) -> tuple[Tensor, Tensor]:
    """`to_fp8` in plain PyTorch."""
    wide = x.float()
    scale = (wide.abs().amax(-1) / E4M3_MAX).clamp(min=1e-12)
    return (wide / scale[:, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def int8_twin(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """`int8_linear` in plain PyTorch: exact whole numbers, a sum in float32 at least, scaled at the end."""
    return _sum(x, _whole_int8(q), scale)


def int4_twin(x: Tensor, packed: Tensor, m: Tensor, z: Tensor, scale: Tensor, group: int) -> Tensor:
    """`int4_linear` in plain PyTorch."""
    return _sum(x, whole_int4(packed, m, z, group, x.shape[-1]), scale)


def fp8_twin(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """`fp8_linear` in plain PyTorch."""
    rows, x_scale = to_fp8_twin(x.reshape(-1, x.shape[-1]))
    out = F.linear(rows.float(), q.float()) * scale * x_scale[:, None]
    return out.to(x.dtype).unflatten(0, x.shape[:-1])


def _sum(x: Tensor, whole: Tensor, scale: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return (F.linear(x.to(wide), whole.to(wide)) * scale.to(wide)).to(x.dtype)


def _whole_int8(q: Tensor) -> Tensor:
    return q.float() if q.dtype == torch.float8_e4m3fn else q.float() - 128


def _split(N: int, K: int, block_n: int, block_k: int) -> tuple[int, int]:
    """How often to cut K so that PROGRAMS programs run, and how far each reaches: of the weight's shape alone."""
    steps = -(-K // block_k)
    splits = max(1, min(steps, PROGRAMS // -(-N // block_n)))
    span = -(-steps // splits)
    return -(-steps // span), span * block_k


def _eight(x: Tensor, q: Tensor, scale: Tensor, x_scale: Tensor, dtype: torch.dtype, invariant: bool) -> Tensor:
    """Rows x (M, K) by a weight of 8 bits, by whole numbers or, with x and q of e4m3, fp8: (M, N)."""
    x = x.contiguous()
    M, (N, K) = len(x), q.shape
    out = torch.empty(M, N, dtype=dtype, device=x.device)
    fp8 = q.dtype == torch.float8_e4m3fn
    alone = M == 1 and not invariant
    blocks = MATVEC if alone else TILE
    splits, span = _split(N, K, blocks["BLOCK_N"], blocks["BLOCK_K"])
    target = _shares(out, splits)
    columns = -(-N // blocks["BLOCK_N"])
    how: dict[str, Any] = {"FP8": fp8, "SPLITS": splits, **blocks}
    if alone:
        _launch("matvec8", (columns, splits), x, q, scale, x_scale, target, N, K, span, **how)
    else:
        grid = (-(-M // blocks["BLOCK_M"]), splits, columns)
        _launch("tile8", grid, x, q, scale, x_scale, target, M, N, K, span, **how)
    return _combined(target, scale, x_scale, out, scaled=fp8)


def _shares(out: Tensor, splits: int) -> Tensor:
    """Where a kernel writes: the result itself, or shares of the sum (splits, M, N) to be combined."""
    return out if splits == 1 else out.new_empty(splits, *out.shape, dtype=torch.float32)


def _combined(target: Tensor, scale: Tensor, x_scale: Tensor, out: Tensor, *, scaled: bool) -> Tensor:
    if target is not out:
        M, N = out.shape
        how = {"SPLITS": len(target), "SCALED": scaled, "BLOCK": 256}
        _launch("combine", (-(-M * N // 256),), target, scale, x_scale, out, M, N, **how)
    return out


_launch = functools.partial(launch, "triton_linear")
