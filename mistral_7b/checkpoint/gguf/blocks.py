"""Dequantize and quantize GGUF's blocks, vectorized and bit-identical to the gguf package.

A row of K values is divided into blocks, each with its own float16 scales. n blocks · d, m scale and minimum
of a block · q integer code of a value. The arithmetic is float32, rounded after every operation.

    Q8_0   d q                 q -127..127      Q4_K  Q5_K   256 values in 8 groups, each with a 6-bit scale
    Q4_0   d (q - 8)           q 0..15                       and minimum of its own: (d s) q - (m t)
    Q5_0   d (q - 16)          q 0..31          Q6_K         256 values in 16 groups, each with an 8-bit
    Q4_1  Q5_1   d q + m                                     scale: (d s) (q - 32)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .file import KINDS, Kind

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ZERO_POINTS = {"Q8_0": 128, "Q4_0": 8}  # zero points of the types used without repacking
VALUES_AT_ONCE = 1 << 18  # float32 copies of a chunk (1 MB each) fit in a core's cache: 3 times as fast


def dequantize(kind: Kind, raw: Tensor) -> Tensor:
    """Dequantize rows of blocks (N, K / block * size) uint8 to values (N, K) float32."""
    blocks = raw.reshape(-1, kind.size)
    return _VALUES[kind.name](blocks).view(raw.shape[0], -1)


def dequantize_to(kind: Kind, raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantize to `dtype`, one chunk of rows at a time to bound the memory of float32 copies."""
    rows, width = raw.shape[0], raw.shape[1] // kind.size * kind.block
    out = torch.empty(rows, width, dtype=dtype)
    step = max(1, VALUES_AT_ONCE // max(1, width))
    for begin in range(0, rows, step):
        out[begin : begin + step] = dequantize(kind, raw[begin : begin + step])
    return out


def codes(kind: Kind, raw: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales d (N, K/32) float16 and codes q (N, K) uint8 of Q8_0 or Q4_0.

    A value is d (q - zero point).
    """
    blocks = raw.reshape(-1, kind.size)
    q = blocks[:, 2:] ^ 128 if kind.name == "Q8_0" else _nibbles(blocks[:, 2:], 16).flatten(1)
    return _halves(blocks[:, :2]).view(raw.shape[0], -1), q.reshape(raw.shape[0], -1)


def quantize(kind: Kind, values: Tensor) -> Tensor:
    """Quantize values (N, K) to Q8_0 or Q4_0 blocks (N, K / 32 * size) uint8.

    Q8_0 rounds to nearest, ties away from zero. Q4_0 scales the value of largest magnitude to -8. Raises
    ValueError for values that are not finite or exceed the range of float16 scales.
    """
    blocks = values.to(torch.float32).reshape(-1, kind.block)
    if kind.name == "Q8_0":
        d = blocks.abs().amax(-1, keepdim=True) / 127
        scaled = blocks * _inverse(d)
        whole = scaled.abs().floor()
        q = scaled.sign() * (whole + (2 * (scaled.abs() - whole)).floor())
        packed = q.to(torch.int8).view(torch.uint8)
    else:
        d = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8
        q = (blocks * _inverse(d) + 8.5).trunc().to(torch.uint8).clamp(0, 15)
        packed = q[:, :16] | (q[:, 16:] << 4)
    half = d.to(torch.float16)
    if not half.isfinite().all():
        raise ValueError("values that are not finite, or larger than float16 scales can hold")
    return torch.cat([half.view(torch.uint8), packed], -1).view(values.shape[0], -1)


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, 0, 1 / d)


def _halves(raw: Tensor) -> Tensor:
    """Reinterpret two bytes (n, 2) as float16 (n, 1)."""
    return raw.contiguous().view(torch.float16)


def _nibbles(raw: Tensor, run: int) -> Tensor:
    """Unpack bytes (n, r * run) to (n, 2r, run): low nibbles of each run, then high nibbles."""
    runs = raw.reshape(len(raw), -1, 1, run)
    return torch.cat([runs & 15, runs >> 4], 2).flatten(1, 2)


def _bits(raw: Tensor, width: int, run: int) -> Tensor:
    """Unpack bytes (n, r * run) to (n, r * 8/width, run): lowest bits of each run first."""
    runs = raw.reshape(len(raw), -1, 1, run)
    shifts = range(0, 8, width)
    return torch.cat([(runs >> s) & ((1 << width) - 1) for s in shifts], 2).flatten(1, 2)


def _fifth_bits(raw: Tensor) -> Tensor:
    """Unpack 4 bytes (n, 4) to one bit for each of 32 values (n, 32), least significant first."""
    return _bits(raw, 1, 1).flatten(1)


def _q8_0(b: Tensor) -> Tensor:
    return b[:, 2:].view(torch.int8).float() * _halves(b[:, :2]).float()


def _q4_0(b: Tensor) -> Tensor:
    return _halves(b[:, :2]).float() * (_nibbles(b[:, 2:], 16).flatten(1).float() - 8)


def _q4_1(b: Tensor) -> Tensor:
    d, m = _halves(b[:, :2]).float(), _halves(b[:, 2:4]).float()
    return d * _nibbles(b[:, 4:], 16).flatten(1).float() + m


def _q5_0(b: Tensor) -> Tensor:
    q = _nibbles(b[:, 6:], 16).flatten(1) | (_fifth_bits(b[:, 2:6]) << 4)
    return _halves(b[:, :2]).float() * (q.float() - 16)


def _q5_1(b: Tensor) -> Tensor:
    d, m = _halves(b[:, :2]).float(), _halves(b[:, 2:4]).float()
    q = _nibbles(b[:, 8:], 16).flatten(1) | (_fifth_bits(b[:, 4:8]) << 4)
    return d * q.float() + m


def _group_scales(b: Tensor) -> tuple[Tensor, Tensor]:
    """Return d s and m t of the 8 groups of a K block, (n, 8, 1) each.

    s and t have 6 bits and are packed in 12 bytes after d and m. Groups 0..3: s in the low 6 bits of bytes 0..3,
    t in those of bytes 4..7. Groups 4..7: low nibbles of s and t in bytes 8..11, and their two high bits in the
    high two bits of bytes 0..7.
    """
    d, m, low = _halves(b[:, :2]).float(), _halves(b[:, 2:4]).float(), b[:, 4:16]
    first, second, rest = low[:, :4], low[:, 4:8], low[:, 8:]
    s = torch.cat([first & 63, (rest & 15) | ((first >> 2) & 48)], 1)
    t = torch.cat([second & 63, (rest >> 4) | ((second >> 2) & 48)], 1)
    return (d * s.float())[..., None], (m * t.float())[..., None]


def _q4_k(b: Tensor) -> Tensor:
    scale, minimum = _group_scales(b)
    return (scale * _nibbles(b[:, 16:], 32).float() - minimum).flatten(1)


def _q5_k(b: Tensor) -> Tensor:
    scale, minimum = _group_scales(b)
    q = _nibbles(b[:, 48:], 32) | (_bits(b[:, 16:48], 1, 32) << 4)
    return (scale * q.float() - minimum).flatten(1)


def _q6_k(b: Tensor) -> Tensor:
    q = _nibbles(b[:, :128], 64).reshape(-1, 8, 32) | (_bits(b[:, 128:192], 2, 32) << 4)
    scale = _halves(b[:, 208:]).float() * b[:, 192:208].view(torch.int8).float()  # (n, 16)
    return (scale[..., None] * (q.reshape(-1, 16, 16).float() - 32)).flatten(1)


_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
assert _VALUES.keys() | FLOATS.keys() == KINDS.keys()
