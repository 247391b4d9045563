"""GGUF's block formats as the kernels use them: codes, integer scales and float16 scales, in tiles of 16 outputs.

cpu/gguf_blocks.h explains the formats, and the record of a tile and a block. The layout only moves bits: a weight
takes as many in the tiles as in the file.

N outputs · K inputs · B blocks of K · G groups of a block · T tiles of N
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import TILE

SIX_BITS = 3  # lines of 6-bit scales s and t
TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # values of IQ4_NL and IQ4_XS


@dataclasses.dataclass(frozen=True)
class Format:
    """A block format, as in gguf_blocks.h."""

    code: int  # GGUF's number
    block: int = 32  # inputs with one float16 scale
    group: int = 32  # inputs with one integer scale, if `scales`
    low: int = 4  # bits of a code in the low lines
    high: int = 0  # further bits, in the high lines
    scales: int = 0  # lines of integer scales: SIX_BITS, else int8
    zero: int = 0  # subtracted from the codes
    minimum: bool = False
    table: bool = False  # codes are indices of TABLE

    @property
    def lines(self) -> int:
        """The number of lines of a record, 64 bytes each."""
        return self.block * (self.low + self.high) // 32 + self.scales


FORMATS = {
    "Q4_0": Format(2, zero=8),
    "Q4_1": Format(3, minimum=True),
    "Q5_0": Format(6, high=1, zero=16),
    "Q5_1": Format(7, high=1, minimum=True),
    "Q8_0": Format(8, low=8, zero=128),
    "Q4_K": Format(12, block=256, scales=SIX_BITS, minimum=True),
    "Q5_K": Format(13, block=256, high=1, scales=SIX_BITS, minimum=True),
    "Q6_K": Format(14, block=256, group=16, high=2, scales=4, zero=32),
    "IQ4_NL": Format(20, table=True),
    "IQ4_XS": Format(23, block=256, scales=2, table=True),
}


def integers(f: Format, q: Tensor) -> Tensor:
    """The integers int16 that codes uint8 stand for."""
    return torch.tensor(TABLE, dtype=torch.int16)[q.int()] if f.table else q.short() - f.zero


def group_scales(scales: Tensor) -> tuple[Tensor, Tensor | None]:
    """Integer scales s (..., G) and, for SIX_BITS, t (..., G), int16, of their bytes (..., 4 * lines) uint8.

    SIX_BITS: 12 bytes have s and t of 8 groups. Groups 0..3: s in the low 6 bits of bytes 0..3, t in those of
    bytes 4..7. Groups 4..7: low nibbles of s and t in bytes 8..11, and their two high bits in the high two bits
    of bytes 0..7. Otherwise the bytes are s, int8.
    """
    if scales.shape[-1] != 4 * SIX_BITS:
        return scales.view(torch.int8).short(), None
    first, second, rest = scales.split(4, -1)
    s = torch.cat([first & 63, (rest & 15) | ((first >> 2) & 48)], -1)
    t = torch.cat([second & 63, (rest >> 4) | ((second >> 2) & 48)], -1)
    return s.short(), t.short()


def tile(kind: str, q: Tensor, scales: Tensor | None, d: Tensor) -> tuple[Tensor, Tensor]:
    """Tile a weight: codes (T, B, lines, 64) uint8 and d (T, B, 1 or 2, 16) float16; N is padded with zeros.

    q uint8 (N, K) · scales uint8 (N, B, 4 * lines) or None · d float16 (N, B, 1), with a minimum (N, B, 2).
    """
    f, pad = FORMATS[kind], -len(q) % TILE
    quads = _tiles(F.pad(q.unflatten(1, (-1, f.block)), (0, 0, 0, 0, 0, pad)).view(torch.int32))  # 4 inputs each
    if f.low == 8:
        lines = [quads]
    else:
        even, odd = quads.unflatten(2, (-1, 2)).unbind(3)
        lines = [(even & 0x0F0F0F0F) | ((odd & 0x0F0F0F0F) << 4)]
    if f.high:
        bits = (quads >> 4) & (0x01010101 * ((1 << f.high) - 1))
        parts = bits.unflatten(2, (-1, 8 // f.high)).unbind(3)
        high = parts[0]
        for i, part in enumerate(parts[1:], start=1):
            high = high | (part << (f.high * i))
        lines.append(high)
    if scales is not None:
        lines.append(_tiles(F.pad(scales, (0, 0, 0, 0, 0, pad)).view(torch.int32)))
    return torch.cat(lines, 2).view(torch.uint8), _tiles(F.pad(d, (0, 0, 0, 0, 0, pad)))


def _tiles(t: Tensor) -> Tensor:
    """(N, B, n) as (T, B, n, 16)."""
    return t.unflatten(0, (-1, TILE)).permute(0, 2, 3, 1).contiguous()


def untile(kind: str, codes: Tensor) -> tuple[Tensor, Tensor | None]:
    """The codes (N, K) uint8 and the bytes of the integer scales (N, B, 4 * lines) of tiles; N with padding."""
    f = FORMATS[kind]
    low, high, scales = codes.view(torch.int32).split([f.block * f.low // 32, f.block * f.high // 32, f.scales], 2)
    quads = low
    if f.low == 4:
        quads = torch.stack([low & 0x0F0F0F0F, (low >> 4) & 0x0F0F0F0F], 3).flatten(2, 3)
    if f.high:
        mask = 0x01010101 * ((1 << f.high) - 1)
        bits = torch.stack([(high >> (f.high * i)) & mask for i in range(8 // f.high)], 3).flatten(2, 3)
        quads = quads | (bits << 4)
    q = _untiled(quads).view(torch.uint8).flatten(1)
    return q, _untiled(scales).view(torch.uint8) if f.scales else None


def _untiled(t: Tensor) -> Tensor:
    """The inverse of `_tiles`."""
    return t.permute(0, 3, 1, 2).flatten(0, 1).contiguous()


def integer_weight(kind: str, codes: Tensor) -> tuple[Tensor, Tensor | None]:
    """The weight without its float scales: s (q - zero) int16 (N, B, K / B), and t int16 (N, B, G) or None."""
    f = FORMATS[kind]
    q, scales = untile(kind, codes)
    w = integers(f, q).unflatten(1, (-1, f.block // f.group, f.group))  # (N, B, G, group)
    if scales is None:
        return w.flatten(2), None
    s, t = group_scales(scales)
    return (w * s[..., None]).flatten(2), t


def float_scales(d: Tensor) -> tuple[Tensor, Tensor | None]:
    """The scales d and minima m of tiles, float32 (N, B); m None if there is none."""
    scales = _untiled(d).float()
    return scales[..., 0], scales[..., 1] if scales.shape[-1] == 2 else None


def dequantize(kind: str, codes: Tensor, d: Tensor) -> Tensor:
    """The weight (N, K) float32 of tiles. One rounding per value, that of a minimum: its products are exact."""
    w, t = integer_weight(kind, codes)
    scale, minimum = float_scales(d)
    out = w * scale[..., None]
    if minimum is not None and t is None:
        out = out + minimum[..., None]
    elif minimum is not None and t is not None:
        out = (out.unflatten(2, (t.shape[-1], -1)) - (minimum[..., None] * t)[..., None]).flatten(2)
    return out.flatten(1)
