"""The tiled layout of quantized weights, the same on disk and in memory.

N outputs · K inputs · G groups of inputs. cpu/weights.h explains the tile of 16 outputs by 4 inputs. Row-major
codes (N, K) and tiles hold the same values. The layout does not depend on the CPU, so files are portable.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 16  # outputs
WIDE = 64  # inputs of an AMX tile


def padded(n: int, multiple: int) -> int:
    """n rounded up to a multiple."""
    return -(-n // multiple) * multiple


def pad(t: Tensor, rows: int, columns: int, value: int) -> Tensor:
    """A matrix padded to (rows, columns) with `value`, at the end of each dimension."""
    return F.pad(t, (0, columns - t.shape[1], 0, rows - t.shape[0]), value=value)


def tile_int8(q: Tensor) -> Tensor:
    """Codes 0..255, uint8 (N, K), N a multiple of 16 and K of 64: (N/16, K/4, 16, 4)."""
    return q.unflatten(0, (-1, TILE)).unflatten(2, (-1, 4)).transpose(1, 2).contiguous()


def untile_int8(codes: Tensor) -> Tensor:
    """The inverse of tile_int8."""
    return codes.transpose(1, 2).flatten(2).flatten(0, 1)


def tile_int4(q: Tensor) -> Tensor:
    """Codes 0..15, uint8 (N, K): (N/16, K/8, 16, 4), column 8i + j in the low nibble, 8i + 4 + j in the high."""
    low, high = q.unflatten(1, (-1, 2, 4)).unbind(2)  # (N, K/8, 4)
    return (low | high << 4).unflatten(0, (-1, TILE)).transpose(1, 2).contiguous()


def untile_int4(codes: Tensor) -> Tensor:
    """The inverse of tile_int4."""
    both = torch.stack([codes & 15, codes >> 4], dim=-2)  # (N/16, K/8, 16, 2, 4)
    return both.transpose(1, 2).flatten(2).flatten(0, 1)


def tile_groups(m: Tensor, z: Tensor) -> Tensor:
    """Multipliers and zero points 0..15, uint8 (N, G): (N/16, G, 16), m in the low nibble, z in the high."""
    return (m | z << 4).unflatten(0, (-1, TILE)).transpose(1, 2).contiguous()


def untile_groups(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of tile_groups: m and z."""
    both = groups.transpose(1, 2).flatten(0, 1)
    return both & 15, both >> 4
