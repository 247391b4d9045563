"""Quantize values to the bytes of GGUF's blocks: rounding.py rounds, and this packs the codes as in the file."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import QuantizationError
from ...quantization.rounding import round_blocks
from .file import Kind


def quantize(kind: Kind, values: Tensor) -> Tensor:
    """Quantize values (N, K) to blocks (N, K / block * size) uint8 of a type in WRITTEN.

    Raises ValueError for values that are not finite or exceed the range of float16 scales.
    """
    try:
        q, scales, d = round_blocks(values, kind.name)
    except QuantizationError as e:
        raise ValueError(str(e)) from e
    q, d = q.reshape(-1, kind.block), d.flatten(0, 1)
    parts = WRITTEN[kind.name](q, d if scales is None else scales.flatten(0, 1), d)
    return torch.cat([p.view(torch.uint8) for p in parts], -1).view(values.shape[0], -1)


def _pack(q: Tensor, width: int, run: int) -> Tensor:
    """Pack codes (n, r * run * 8 / width) of `width` bits to bytes (n, r * run): lowest bits of each run first."""
    runs = q.unflatten(1, (-1, 8 // width, run))
    out = runs[:, :, 0].clone()
    for i in range(1, 8 // width):
        out |= runs[:, :, i] << (width * i)
    return out.flatten(1)


# The parts of the blocks (n, ...) in the file's order, of codes, bytes of the integer scales and float16 scales.
WRITTEN: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]] = {
    "Q8_0": lambda q, _, d: (d, q ^ 128),
    "Q4_0": lambda q, _, d: (d, _pack(q, 4, 16)),
    "Q5_0": lambda q, _, d: (d, _pack(q >> 4, 1, 1), _pack(q & 15, 4, 16)),
    "Q4_K": lambda q, scales, d: (d, scales, _pack(q, 4, 32)),
    "Q6_K": lambda q, scales, d: (_pack(q & 15, 4, 64), _pack(q >> 4, 2, 32), scales, d),
}
