"""Weight-only quantized products on a GPU: y = x w^T with w in a block format, row-major, or in fp8.

At small batch sizes the time is that of reading w. M rows · N outputs · K inputs, in w padded to G groups of 16 or
32 · B blocks of 32 or 256 · T, L tiles and lines of kernels/block_formats.py

    blocks   w[n, k] = (d s) (q - zero) - (m t)     q in 4 or 8 bits, s and t int8 (N, G), d and m float16 (N, B)
    fp8      w[n, k] = scale[n] * q[n, k], x likewise per row                              q float8_e4m3fn (N, K)

All block formats are stored without loss; a format without s or t has 1 there, and m is negative in Q4_1 and Q5_1.
Q4_0, Q4_1 and Q4_K take two codes per byte along K, low nibble first; the others take a byte, which for IQ4_NL and
IQ4_XS is the value of the table plus 128. Bits per weight at K = 4096:

    Q4_0 4.5     Q4_K 4.625    Q5_0 8.5     Q5_K 8.625    IQ4_NL 8.5
    Q4_1 5       Q8_0 8.5      Q5_1 9       Q6_K 8.5625   IQ4_XS 8.3125

The kernel depends on the number of rows:

    1              matvec: split along K if N alone does not fill the GPU
    2 to 64        tile: tensor cores, 16 rows per tile
    more           the weight is dequantized to x's type, then cuBLAS; fp8: torch._scaled_mm

Within 2 to 64 rows, a row is bit-identical in any batch; with `invariant=True`, which always uses the tile kernel,
for any number of rows. The three kernels differ in rounding: they sum in a different order, and of a block format
the last two round the weight to x's type, while the first multiplies by the codes and scales the sum of a group.

Nibbles are in canonical order. Shuffling them in advance would not help the tile kernel: low nibbles
belong to even inputs and high nibbles to odd ones, so lanes exchange no data after unpacking.

The twins in plain PyTorch also run where Triton does not: `blocks_twin`, `fp8_twin`, `expand`, `expand_fp8`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import block_formats
from ..backend import FP8_LINEAR, ROUND_FP8, WEIGHT_ONLY, Backend, uses
from ..block_formats import FORMATS, Format
from .launch import launch

TILE_ROWS = 64  # above, dequantizing the weight costs less than reading it once per 16 rows
# Programs that fill the GPU: two per multiprocessor of an H200 (132). Constant, so that sums have the same order
# on every GPU.
PROGRAMS = 264
MATVEC = {"BLOCK_N": 16, "BLOCK_K": 1024}  # more rows than of fp8, to reuse x
MATVEC_FP8 = {"BLOCK_N": 8, "BLOCK_K": 1024}  # each thread has 8 loads of 16 bytes in flight
MAGIC = 0x4B000000  # the bits of 2^23
TILE = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 128}
DEQUANTIZE = {"BLOCK_N": 8, "BLOCK_K": 512}
E4M3_MAX = 448.0


class RowMajor(NamedTuple):
    """A weight (N, K) in a block format, row-major. K is padded to a multiple of 32."""

    kind: str
    inputs: int
    codes: Tensor  # uint8 (N, bytes of a row)
    scales: Tensor | None  # int8 (1, N, G): s; or (2, N, G): s and t
    d: Tensor  # float16 (1, N, B): d; or (2, N, B): d and m

    @property
    def shape(self) -> tuple[int, int]:
        """N, K."""
        return len(self.codes), self.inputs


def stored_bits(f: Format) -> int:
    """The bits of a stored code, 4 or 8."""
    return 4 if f.low + f.high == 4 and not f.table else 8


def format_of(kind: str) -> dict[str, int]:
    """The kernels' description of a format."""
    f = FORMATS[kind]
    return {"BITS": stored_bits(f), "GROUP": f.group, "BLOCK": f.block, "ZERO": _zero(f), "MINIMUM": f.minimum}


def _zero(f: Format) -> int:
    return 128 if f.table else f.zero  # the values of the table, plus 128, are the codes


def from_tiles(kind: str, codes: Tensor, d: Tensor, inputs: int, outputs: int) -> RowMajor:
    """The weight of tiles, codes (T, L, 64) and d (T, B, 1 or 2, 16)."""
    f, width = FORMATS[kind], block_formats.padded(inputs)
    q, packed = block_formats.untile(kind, codes, inputs)
    q = q.flatten(1)[:outputs, :width]
    q = (block_formats.integers(f, q) + 128).to(torch.uint8) if f.table else q
    scales = None
    if packed is not None:
        parts = [part for part in block_formats.group_scales(packed) if part is not None]
        scales = torch.stack(parts).to(torch.int8).flatten(2)[:, :outputs, : width // f.group].contiguous()
    halves = d.permute(2, 0, 3, 1).flatten(1, 2)[:, :outputs].contiguous()
    if f.minimum and scales is None:
        halves[1].neg_()  # d q + m
    stored = q[:, 0::2] | (q[:, 1::2] << 4) if stored_bits(f) == 4 else q.contiguous()
    return RowMajor(kind, inputs, stored, scales, halves)


def to_tiles(w: RowMajor) -> tuple[Tensor, Tensor]:
    """The inverse of `from_tiles`, for formats of quantization schemes: Q8_0, Q4_K, Q6_K."""
    f, (_, N, B) = FORMATS[w.kind], w.d.shape
    scales = None
    if w.scales is not None:
        parts = F.pad(w.scales, (0, B * f.block // f.group - w.scales.shape[2])).view(len(w.scales), N, B, -1)
        scales = block_formats.group_bytes(parts[0], parts[1] if f.minimum else None)
    return block_formats.tile(w.kind, unpack(w).contiguous(), scales, w.d.permute(1, 2, 0).contiguous())


def unpack(w: RowMajor) -> Tensor:
    """The codes, uint8 (N, K padded)."""
    if stored_bits(FORMATS[w.kind]) == 8:
        return w.codes
    return torch.stack((w.codes & 15, w.codes >> 4), -1).flatten(-2)


def dequantized(w: RowMajor) -> Tensor:
    """The dequantized weight, float32 (N, K), in plain PyTorch: only the subtraction of an offset rounds."""
    f, q = FORMATS[w.kind], unpack(w)
    grid = w.d.float().repeat_interleave(f.block // f.group, -1)[..., : q.shape[1] // f.group]
    if w.scales is not None:
        grid = grid * w.scales  # exact
    grid = grid.repeat_interleave(f.group, -1)  # (1 or 2, N, K padded): steps, offsets
    value = (q.float() - _zero(f)) * grid[0]
    return (value - grid[1] if f.minimum else value)[:, : w.inputs]


def expand(w: RowMajor, dtype: torch.dtype) -> Tensor:
    """The dequantized weight (N, K), rounded to `dtype`."""
    if not uses(Backend.TRITON, WEIGHT_ONLY, torch.empty(0, dtype=dtype, device=w.d.device)):
        return dequantized(w).to(dtype)
    N, K = w.shape
    out = torch.empty(N, K, dtype=dtype, device=w.codes.device)
    grid = (-(-N // DEQUANTIZE["BLOCK_N"]), -(-K // DEQUANTIZE["BLOCK_K"]))
    _launch("dequantize", grid, w.codes, w.scales, w.d, out, N, K, *_sizes(w), **format_of(w.kind), **DEQUANTIZE)
    return out


def expand_fp8(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The dequantized fp8 weight (N, K), rounded once to `dtype`."""
    if not uses(Backend.TRITON, WEIGHT_ONLY, scale):
        return (q.float() * scale[:, None]).to(dtype)
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    N, K = q.shape
    grid = (-(-N // DEQUANTIZE["BLOCK_N"]), -(-K // DEQUANTIZE["BLOCK_K"]))
    _launch("dequantize_fp8", grid, q, scale, out, N, K, **DEQUANTIZE)
    return out


def blocks_linear(x: Tensor, w: RowMajor, *, invariant: bool = False) -> Tensor:
    """x (..., K) times a weight in a block format: (..., N) in x's type."""
    (N, K), rows = w.shape, x.reshape(-1, x.shape[-1]).contiguous()
    M = len(rows)
    if not x.numel() or not uses(Backend.TRITON, WEIGHT_ONLY, x):
        return blocks_twin(x, w)
    if M > TILE_ROWS and not invariant:
        return F.linear(x, expand(w, x.dtype))
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    single_row = M == 1 and not invariant
    blocks = MATVEC if single_row else TILE
    splits, steps = _split(N, K, blocks["BLOCK_N"], blocks["BLOCK_K"])
    target, columns = _output_buffer(out, splits), -(-N // blocks["BLOCK_N"])
    constants = {**format_of(w.kind), "SPLITS": splits, **blocks}
    if single_row:
        weight = (w.codes.view(torch.int32), w.scales, w.d)
        _launch("matvec", (columns, splits), rows, *weight, target, N, K, *_sizes(w), steps, MAGIC, **constants)
    else:
        grid, weight = (-(-M // blocks["BLOCK_M"]), splits, columns), (w.codes, w.scales, w.d)
        _launch("tile", grid, rows, *weight, target, M, N, K, *_sizes(w), steps, **constants)
    return _combine_splits(target, None, None, out).unflatten(0, x.shape[:-1])


def fp8_linear(x: Tensor, q: Tensor, scale: Tensor, *, invariant: bool = False) -> Tensor:
    """x (..., K), quantized to e4m3 per row, times the fp8 weight q (N, K), scale (N,): (..., N) in x's type.

    Activations are quantized for any number of rows, so that prefill and decode compute the same function.
    """
    if not x.numel() or not uses(Backend.TRITON, WEIGHT_ONLY, x):
        return fp8_twin(x, q, scale)
    rows, x_scale = to_fp8(x.reshape(-1, x.shape[-1]))
    N, K = q.shape
    if len(rows) <= TILE_ROWS or invariant:
        out = _few_rows_fp8(rows, q, scale, x_scale, x.dtype, invariant)
    elif N % 16 == 0 and K % 16 == 0 and uses(Backend.CUBLAS, FP8_LINEAR, x):
        # Fast accumulation would keep only 14 bits of the sums.
        scales = {"scale_a": x_scale[:, None], "scale_b": scale[None, :]}
        out = torch._scaled_mm(rows, q.T, **scales, out_dtype=torch.bfloat16, use_fast_accum=False)
    else:
        unit = torch.ones_like(scale)
        product = F.linear(rows.float(), expand_fp8(q, unit, torch.float32))
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


def blocks_twin(x: Tensor, w: RowMajor) -> Tensor:
    """`blocks_linear` in plain PyTorch: the dequantized weight is not rounded, sums are in float32 or wider."""
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(compute_dtype), dequantized(w).to(compute_dtype)).to(x.dtype)


def fp8_twin(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """`fp8_linear` in plain PyTorch."""
    rows, x_scale = to_fp8_twin(x.reshape(-1, x.shape[-1]))
    out = F.linear(rows.float(), q.float()) * scale * x_scale[:, None]
    return out.to(x.dtype).unflatten(0, x.shape[:-1])


def _sizes(w: RowMajor) -> tuple[int, int]:
    """G, B."""
    return block_formats.padded(w.inputs) // FORMATS[w.kind].group, w.d.shape[2]


def _split(N: int, K: int, block_n: int, block_k: int) -> tuple[int, int]:
    """The number of splits of K for PROGRAMS programs, and the steps of block_k inputs of each.

    It depends on the shape of the weight only.
    """
    steps = -(-K // block_k)
    splits = max(1, min(steps, PROGRAMS // -(-N // block_n)))
    each = -(-steps // splits)
    return -(-steps // each), each


def _few_rows_fp8(
    x: Tensor, q: Tensor, scale: Tensor, x_scale: Tensor, dtype: torch.dtype, invariant: bool
) -> Tensor:
    """Rows x (M, K) of e4m3 times an fp8 weight: (M, N)."""
    M, (N, K) = len(x), q.shape
    out = torch.empty(M, N, dtype=dtype, device=x.device)
    single_row = M == 1 and not invariant
    blocks = MATVEC_FP8 if single_row else TILE
    splits, steps = _split(N, K, blocks["BLOCK_N"], blocks["BLOCK_K"])
    target, columns = _output_buffer(out, splits), -(-N // blocks["BLOCK_N"])
    if single_row:
        grid: tuple[int, ...] = (columns, splits)
        _launch("matvec_fp8", grid, x, q, scale, x_scale, target, N, K, steps, SPLITS=splits, **blocks)
    else:
        grid = (-(-M // blocks["BLOCK_M"]), splits, columns)
        _launch("tile_fp8", grid, x, q, scale, x_scale, target, M, N, K, steps, SPLITS=splits, **blocks)
    return _combine_splits(target, scale, x_scale, out)


def _output_buffer(out: Tensor, splits: int) -> Tensor:
    """The kernel's output buffer: the result, or partial sums (splits, M, N)."""
    return out if splits == 1 else out.new_empty(splits, *out.shape, dtype=torch.float32)


def _combine_splits(target: Tensor, scale: Tensor | None, x_scale: Tensor | None, out: Tensor) -> Tensor:
    if target is not out:
        M, N = out.shape
        constants = {"SPLITS": len(target), "BLOCK": 256}
        _launch("combine", (-(-M * N // 256),), target, scale, x_scale, out, M, N, **constants)
    return out


_launch = functools.partial(launch, "triton_linear")
