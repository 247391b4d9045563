"""Dequantize GGUF's blocks, vectorized and bit-identical to the gguf package, and split them for the kernels.

A row of K values is divided into blocks, each with its own float16 scales. n blocks · d, m scale and minimum
of a block · q integer code of a value. The arithmetic is float32, rounded after every operation.

    Q8_0          d q                q -127..127    Q2_K          256 values in 16 groups, each with a 4-bit
    Q4_0          d (q - 8)          q 0..15                      scale and minimum: (d s) q - (m t)
    Q5_0          d (q - 16)         q 0..31        Q3_K  Q6_K    256 values in 16 groups, each with a 6- or
    Q4_1  Q5_1    d q + m                                         8-bit scale: (d s) (q - 4), (d s) (q - 32)
    IQ4_NL        d TABLE[q]                        Q4_K  Q5_K    256 values in 8 groups, each with a 6-bit
    IQ4_XS        (d s) TABLE[q], 256 values                      scale and minimum: (d s) q - (m t)
                  in 8 groups, s 6 bits
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels import block_formats
from ...kernels.block_formats import FORMATS, TILE
from ...kernels.cpu import huge_pages
from .file import KINDS, Kind

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
VALUES_AT_ONCE = 1 << 18  # float32 copies of a chunk (1 MB each) fit in a core's cache: 3 times as fast


def dequantize(kind: Kind, raw: Tensor) -> Tensor:
    """Dequantize rows of blocks (N, K / block * size) uint8 to values (N, K) float32."""
    blocks = raw.reshape(-1, kind.size)
    values = _OTHERS[kind.name](blocks) if kind.name in _OTHERS else _values(kind.name, blocks)
    return values.view(raw.shape[0], -1)


def dequantize_to(kind: Kind, raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantize to `dtype`, one chunk of rows at a time to bound the memory of float32 copies."""
    rows, width = raw.shape[0], raw.shape[1] // kind.size * kind.block
    out = torch.empty(rows, width, dtype=dtype)
    step = max(1, VALUES_AT_ONCE // max(1, width))
    for begin in range(0, rows, step):
        out[begin : begin + step] = dequantize(kind, raw[begin : begin + step])
    return out


def tiles(kind: Kind, raw: Tensor) -> tuple[Tensor, Tensor]:
    """Rearrange rows of blocks to the kernels' tiles: codes and d of `block_formats.tile`, in huge pages."""
    f, (rows, width) = FORMATS[kind.name], raw.shape
    blocks, count = width // kind.size, -(-rows // TILE)
    codes = huge_pages.empty((count, f.lines(blocks * kind.block), 64), torch.uint8)
    d = torch.empty(count, blocks, 1 + f.minimum, TILE, dtype=torch.float16)
    step = max(1, VALUES_AT_ONCE // (TILE * blocks * kind.block))  # tiles
    for begin in range(0, count, step):
        part = raw[begin * TILE : (begin + step) * TILE]
        q, scales, halves = split(kind.name, part.reshape(-1, kind.size))
        n = (len(part), blocks, -1)
        tiled = block_formats.tile(
            kind.name, q.reshape(len(part), -1), None if scales is None else scales.reshape(n), halves.view(n)
        )
        codes[begin : begin + step], d[begin : begin + step] = tiled
    return codes, d


def split(kind: str, b: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Codes (n, block) uint8, bytes of integer scales (n, ...) or None, and d or d and m (n, 1 or 2) float16."""
    codes, scales, halves = _PARTS[kind]
    return codes(b), None if scales is None else scales(b), _halves(b[:, halves])


def _values(kind: str, b: Tensor) -> Tensor:
    """The values (n, block) of a kernel format, in the order of operations of the gguf package."""
    f = FORMATS[kind]
    q, scales, halves = split(kind, b)
    values = block_formats.integers(f, q).float()
    d, m = halves[:, :1].float(), halves[:, 1:].float()
    if scales is None:
        return d * values + m if f.minimum else d * values
    s, t = block_formats.group_scales(scales.contiguous())
    values = (d * s.float())[..., None] * values.unflatten(1, (-1, f.group))
    return (values if t is None else values - (m * t.float())[..., None]).flatten(1)


def _halves(raw: Tensor) -> Tensor:
    """Reinterpret pairs of bytes (n, 2 r) as float16 (n, r)."""
    return raw.contiguous().view(torch.float16)


def _nibbles(raw: Tensor, run: int) -> Tensor:
    """Unpack bytes (n, r * run) to (n, 2 * r * run): low nibbles of each run, then high nibbles."""
    runs = raw.reshape(len(raw), -1, 1, run)
    return torch.cat([runs & 15, runs >> 4], 2).flatten(1)


def _bits(raw: Tensor, width: int, run: int) -> Tensor:
    """Unpack bytes (n, r * run) to (n, r * run * 8 / width): lowest bits of each run first."""
    runs = raw.reshape(len(raw), -1, 1, run)
    shifts = range(0, 8, width)
    return torch.cat([(runs >> s) & ((1 << width) - 1) for s in shifts], 2).flatten(1)


def _q6_k(b: Tensor) -> Tensor:
    return _nibbles(b[:, :128], 64) | (_bits(b[:, 128:192], 2, 32) << 4)


def _iq4_xs_scales(b: Tensor) -> Tensor:
    """8 scales as int8 bytes: low nibbles in 4 bytes, high bits in 2 bytes, minus 32."""
    return (_nibbles(b[:, 4:8], 1) | (_bits(b[:, 2:4], 2, 1) << 4)) - 32


def _q2_k(b: Tensor) -> Tensor:
    d, m = _halves(b[:, 80:82]).float(), _halves(b[:, 82:]).float()
    scale, minimum = d * (b[:, :16] & 15).float(), m * (b[:, :16] >> 4).float()
    q = _bits(b[:, 16:80], 2, 32).unflatten(1, (16, 16)).float()
    return (scale[..., None] * q - minimum[..., None]).flatten(1)


def _q3_k(b: Tensor) -> Tensor:
    """A clear bit in the first 32 bytes stands for -4."""
    low = torch.cat([b[:, 96:104] & 15, b[:, 96:104] >> 4], 1)
    s = (low | (_bits(b[:, 104:108], 2, 4) << 4)).float() - 32
    q = (_bits(b[:, 32:96], 2, 32) | (_bits(b[:, :32], 1, 32) << 2)).float() - 4
    scale = _halves(b[:, 108:]).float() * s
    return (scale[..., None] * q.unflatten(1, (16, 16))).flatten(1)


Part = Callable[[Tensor], Tensor]
# For each format of the kernels: codes, bytes of the integer scales, and the bytes of d (and m).
_PARTS: dict[str, tuple[Part, Part | None, slice]] = {
    "Q8_0": (lambda b: b[:, 2:] ^ 128, None, slice(0, 2)),
    "Q4_0": (lambda b: _nibbles(b[:, 2:], 16), None, slice(0, 2)),
    "Q4_1": (lambda b: _nibbles(b[:, 4:], 16), None, slice(0, 4)),
    "Q5_0": (lambda b: _nibbles(b[:, 6:], 16) | (_bits(b[:, 2:6], 1, 1) << 4), None, slice(0, 2)),
    "Q5_1": (lambda b: _nibbles(b[:, 8:], 16) | (_bits(b[:, 4:8], 1, 1) << 4), None, slice(0, 4)),
    "IQ4_NL": (lambda b: _nibbles(b[:, 2:], 16), None, slice(0, 2)),
    "Q4_K": (lambda b: _nibbles(b[:, 16:], 32), lambda b: b[:, 4:16], slice(0, 4)),
    "Q5_K": (
        lambda b: _nibbles(b[:, 48:], 32) | (_bits(b[:, 16:48], 1, 32) << 4), lambda b: b[:, 4:16], slice(0, 4),
    ),
    "Q6_K": (_q6_k, lambda b: b[:, 192:208], slice(208, 210)),
    "IQ4_XS": (lambda b: _nibbles(b[:, 8:], 16), _iq4_xs_scales, slice(0, 2)),
}  # fmt: skip
_OTHERS: dict[str, Part] = {"Q2_K": _q2_k, "Q3_K": _q3_k}
assert _PARTS.keys() == FORMATS.keys()
assert _PARTS.keys() | _OTHERS.keys() | FLOATS.keys() == KINDS.keys()
