"""GGUF's block formats as the kernels use them: codes, integer scales and float16 scales, in tiles of 16 outputs.

cpu/formats.h explains the formats, and the record of a tile and a block. The layout only moves bits: a weight
takes as many in the tiles as in the file. It does not depend on the CPU, so files with tiles are portable.

N outputs · K inputs, a multiple of 32 · B blocks of K, of which the last may be short · G groups of a block ·
T tiles of N · L lines of all blocks
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 16  # outputs
UNIT = 32  # inputs: K is padded to a multiple of it
SIX_BITS = 3  # lines of 6-bit scales s and t
TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # values of IQ4_NL and IQ4_XS


@dataclasses.dataclass(frozen=True)
class Format:
    """A block format, as in formats.h."""

    code: int  # GGUF's number
    block: int = 32  # inputs with one float16 scale
    group: int = 32  # inputs with one integer scale, if `scales`
    low: int = 4  # bits of a code in the low lines
    high: int = 0  # further bits, in the high lines
    scales: int = 0  # lines of integer scales: SIX_BITS, else int8
    zero: int = 0  # subtracted from the codes
    minimum: bool = False
    table: bool = False  # codes are indices of TABLE

    def blocks(self, inputs: int) -> int:
        """The number of blocks of a row."""
        return -(-inputs // self.block)

    def lines(self, inputs: int) -> int:
        """The lines of all blocks of a tile, 64 bytes each. K is padded."""
        whole, rest = divmod(padded(inputs), self.block)
        return whole * self._record(self.block) + (self._record(rest) if rest else 0)

    def scale_lines(self, inputs: int) -> int:
        """The lines of integer scales of a block with this number of inputs."""
        groups = inputs // self.group
        if self.scales == SIX_BITS:
            return 3 if groups > 4 else 2
        return -(-groups // 4) if self.scales else 0

    def _record(self, inputs: int) -> int:
        return inputs * (self.low + self.high) // 32 + self.scale_lines(inputs)


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


def group_bytes(s: Tensor, t: Tensor | None) -> Tensor:
    """The inverse of `group_scales`: bytes (..., 4 * lines) uint8 of s (..., G), int8 or uint8, and t or None."""
    if t is None:
        return s.contiguous().view(torch.uint8)
    s, t = s.to(torch.uint8), t.to(torch.uint8)
    first, second = (v[..., :4] | (v[..., 4:] >> 4 << 6) for v in (s, t))
    return torch.cat([first, second, (s[..., 4:] & 15) | (t[..., 4:] << 4)], -1)


def padded(inputs: int) -> int:
    """The number of inputs, padded to whole units."""
    return -(-inputs // UNIT) * UNIT


def tile(kind: str, q: Tensor, scales: Tensor | None, d: Tensor) -> tuple[Tensor, Tensor]:
    """Tile a weight: codes (T, L, 64) uint8 and d (T, B, 1 or 2, 16) float16; N is padded with zeros.

    q uint8 (N, K) · scales uint8 (N, B, 4 * lines) or None · d float16 (N, B, 1), with a minimum (N, B, 2).
    """
    f, pad = FORMATS[kind], -len(q) % TILE
    q, d = F.pad(q, (0, 0, 0, pad)), F.pad(d, (0, 0, 0, 0, 0, pad))
    scales = None if scales is None else F.pad(scales, (0, 0, 0, 0, 0, pad))
    whole = q.shape[1] // f.block
    parts = q.split([whole * f.block, q.shape[1] - whole * f.block], 1)
    records = []
    for part, begin, end in ((parts[0], 0, whole), (parts[1], whole, d.shape[1])):
        if part.shape[1]:
            record = _tile_blocks(
                f, part.unflatten(1, (end - begin, -1)), None if scales is None else scales[:, begin:end]
            )
            records.append(record.flatten(1, 2))
    return torch.cat(records, 1).view(torch.uint8), _tiles(d)


def _tile_blocks(f: Format, q: Tensor, scales: Tensor | None) -> Tensor:
    """The records (T, B, lines, 16) int32 of blocks of equal length, q (N, B, k)."""
    quads = _tiles(q.contiguous().view(torch.int32))  # 4 inputs each
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
        lines.append(_tiles(scales.contiguous().view(torch.int32))[:, :, : f.scale_lines(q.shape[2])])
    return torch.cat(lines, 2)


def _tiles(t: Tensor) -> Tensor:
    """(N, B, n) as (T, B, n, 16)."""
    return t.unflatten(0, (-1, TILE)).permute(0, 2, 3, 1).contiguous()


def untile(kind: str, codes: Tensor, inputs: int) -> tuple[Tensor, Tensor | None]:
    """The codes (N, B, block) uint8 and the bytes of the integer scales (N, B, 4 * lines) of tiles.

    N and the last block with padding, of zeros.
    """
    f = FORMATS[kind]
    whole, rest = divmod(padded(inputs), f.block)
    lines = codes.view(torch.int32)
    parts = lines.split([whole * f._record(f.block), lines.shape[1] - whole * f._record(f.block)], 1)
    found = [
        _untile_blocks(f, part.unflatten(1, (n, -1)), k)
        for part, n, k in ((parts[0], whole, f.block), (parts[1], 1, rest))
        if part.shape[1]
    ]
    q = torch.cat([F.pad(q, (0, f.block - q.shape[2])) for q, _ in found], 1)
    return q, torch.cat([scales for _, scales in found], 1) if f.scales else None


def _untile_blocks(f: Format, records: Tensor, inputs: int) -> tuple[Tensor, Tensor]:
    """The codes (N, B, k) and scales (N, B, 4 * all lines of a whole block) of records of k inputs each."""
    count = f.scale_lines(inputs)
    low, high, scales = records.split([inputs * f.low // 32, inputs * f.high // 32, count], 2)
    quads = low
    if f.low == 4:
        quads = torch.stack([low & 0x0F0F0F0F, (low >> 4) & 0x0F0F0F0F], 3).flatten(2, 3)
    if f.high:
        mask = 0x01010101 * ((1 << f.high) - 1)
        bits = torch.stack([(high >> (f.high * i)) & mask for i in range(8 // f.high)], 3).flatten(2, 3)
        quads = quads | (bits << 4)
    scales = F.pad(scales, (0, 0, 0, f.scales - count))
    return _untiled(quads).view(torch.uint8), _untiled(scales).view(torch.uint8)


def _untiled(t: Tensor) -> Tensor:
    """The inverse of `_tiles`."""
    return t.permute(0, 3, 1, 2).flatten(0, 1).contiguous()


def integer_weight(kind: str, codes: Tensor, inputs: int) -> tuple[Tensor, Tensor | None]:
    """The weight without its float scales: s (q - zero) int16 (N, B, block), and t int16 (N, B, G) or None.

    The padding of the last block is zero.
    """
    f = FORMATS[kind]
    q, scales = untile(kind, codes, inputs)
    w = integers(f, q)
    w.flatten(1)[:, padded(inputs) :] = 0
    if scales is None:
        return w, None
    s, t = group_scales(scales)
    return (w.unflatten(2, (-1, f.group)) * s[..., None]).flatten(2), t


def float_scales(d: Tensor) -> tuple[Tensor, Tensor | None]:
    """The scales d and minima m of tiles, float32 (N, B); m None if there is none."""
    scales = _untiled(d).float()
    return scales[..., 0], scales[..., 1] if scales.shape[-1] == 2 else None


def dequantize(kind: str, codes: Tensor, d: Tensor, inputs: int) -> Tensor:
    """The weight (N, K) float32 of tiles. One rounding per value, that of a minimum: its products are exact."""
    w, t = integer_weight(kind, codes, inputs)
    scale, minimum = float_scales(d)
    out = w * scale[..., None]
    if minimum is not None and t is None:
        out = out + minimum[..., None]
    elif minimum is not None and t is not None:
        out = (out.unflatten(2, (t.shape[-1], -1)) - (minimum[..., None] * t)[..., None]).flatten(2)
    return out.flatten(1)[:, :inputs]
