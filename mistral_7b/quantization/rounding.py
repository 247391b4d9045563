"""Round weights to GGUF's block formats: Q8_0, Q4_0 and Q5_0 as llama.cpp does, Q4_K and Q6_K by a search.

The search minimizes the squared error of a group of values: it tries several ranges of codes, and solves for
the best scale (and minimum) of each by least squares. The scales of a block's groups are then rounded to
integers, with the neighbours of each integer tried, and the codes are chosen again for the rounded scales.

N outputs · K inputs · B blocks of K · n blocks in all · x values (n, groups, values of a group) · q codes ·
d, m float16 scale and minimum of a block · s, t integer scale and minimum of a group
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import QuantizationError
from ..kernels.block_formats import FORMATS, group_bytes, group_scales, padded

RANGES_4, RANGES_6 = 13, 9  # ranges of codes tried: more reduce the error by less than a thousandth
VALUES_AT_ONCE = 1 << 18  # float32 copies of a chunk (1 MB each) fit in a core's cache

Parts = tuple[Tensor, Tensor | None, Tensor]


class Blocks(NamedTuple):
    """A weight (N, K) in a block format, in the form that `block_formats.tile` takes. K is padded to 32."""

    q: Tensor  # uint8 (N, K)
    scales: Tensor | None  # bytes of the integer scales, uint8 (N, B, bytes)
    d: Tensor  # float16 scale (N, B, 1), with a minimum (N, B, 2)


def round_blocks(weight: Tensor, kind: str) -> Blocks:
    """Round a weight (N, K) of any float type to a block format. The last block of a row may be short.

    Raises QuantizationError for values that are not finite or exceed the range of float16 scales.
    """
    f, inputs = FORMATS[kind], weight.shape[1]
    blocks = f.blocks(inputs)
    step = max(1, VALUES_AT_ONCE // (blocks * f.block))
    found = []
    for rows in weight.detach().split(step):
        x = F.pad(rows.float(), (0, blocks * f.block - inputs)).view(-1, f.block)
        q, scales, d = ROUNDED[kind](x)
        n = (len(rows), blocks, -1)
        found.append((q.view(len(rows), -1), None if scales is None else scales.view(n), d.view(n), x))
    if not all(part.isfinite().all() for row in found for part in row[2:]):
        raise QuantizationError(
            "values that are not finite, or larger than float16 scales can hold", field="weight"
        )
    q, d = torch.cat([row[0] for row in found]), torch.cat([row[2] for row in found])
    scales = None if found[0][1] is None else torch.cat([row[1] for row in found])  # type: ignore[misc]
    return Blocks(q[:, : padded(inputs)].contiguous(), scales, d)


def _q8_0(x: Tensor) -> Parts:
    """Round to nearest, ties away from zero."""
    d = x.abs().amax(-1, keepdim=True) / 127
    scaled = x * _inverse(d)
    whole = scaled.abs().floor()
    q = scaled.sign() * (whole + (2 * (scaled.abs() - whole)).floor())
    return (q + 128).to(torch.uint8), None, d.half()


def _from_largest(x: Tensor, zero: int) -> Parts:
    """Scale the value of largest magnitude to code 0, which stands for -zero."""
    d = x.gather(-1, x.abs().argmax(-1, keepdim=True)) / -zero
    q = (x * _inverse(d) + (zero + 0.5)).trunc().to(torch.uint8).clamp(0, 2 * zero - 1)
    return q, None, d.half()


def _q4_k(x: Tensor) -> Parts:
    x = x.unflatten(1, (8, 32))
    scale, minimum = _search_range(x, 15)
    halves = torch.stack([scale.amax(1), minimum.amax(1)], 1).div(63).half()
    d, m = halves.float().split(1, 1)  # (n, 1)
    s = (scale * _inverse(d)).round().clamp(0, 63)
    t = (minimum * _inverse(m)).round().clamp(0, 63)
    sum_x, sum_xx = x.sum(-1), (x * x).sum(-1)
    best_s, best_t, best = s, t, torch.full_like(s, torch.inf)
    for near in (s, s - 1, s + 1):
        near = near.clamp(0, 63)
        q = _codes(x, d * near, m * t, 15)
        sum_q, sum_qq, sum_xq = q.sum(-1), (q * q).sum(-1), (x * q).sum(-1)
        fitted = ((d * near * sum_q - sum_x) * _inverse(32 * m)).round().clamp(0, 63)
        error = _error(d * near, -m * fitted, sum_q, sum_qq, sum_xq, sum_x, sum_xx, 32)
        closer = error < best
        best_s, best_t, best = (
            torch.where(closer, new, old) for new, old in ((near, best_s), (fitted, best_t), (error, best))
        )
    q = _codes(x, d * best_s, m * best_t, 15).to(torch.uint8).flatten(1)
    return q, group_bytes(best_s.to(torch.uint8), best_t.to(torch.uint8)), halves


def _q6_k(x: Tensor) -> Parts:
    x = x.unflatten(1, (16, 16))
    scale = _search_scale(x)
    half = (scale.gather(1, scale.abs().argmax(1, keepdim=True)) / -128).half()
    d = half.float()
    s = (scale * _inverse(d)).round().clamp(-128, 127)
    best_s, best = s, torch.full_like(s, torch.inf)
    for near in (s, s - 1, s + 1):
        near = near.clamp(-128, 127)
        q = _signed_codes(x, _inverse(d * near))
        error = (x - q * (d * near)[..., None]).square().sum(-1)
        closer = error < best
        best_s, best = torch.where(closer, near, best_s), torch.where(closer, error, best)
    q = (_signed_codes(x, _inverse(d * best_s)) + 32).to(torch.uint8).flatten(1)
    return q, best_s.to(torch.int8).view(torch.uint8), half


def _search_range(x: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Scale and minimum >= 0 of each group, of least squared error: x is about scale * q - minimum."""
    size = x.shape[-1]
    low, high = x.amin(-1).clamp(max=0), x.amax(-1)
    sum_x, sum_xx = x.sum(-1), (x * x).sum(-1)
    best_scale, best_minimum = (high - low) / largest, -low
    best = torch.full_like(low, torch.inf)
    for i in range(RANGES_4):
        q = _codes(x, (high - low) / (largest - 1 + 2.4 * i / (RANGES_4 - 1)), -low, largest)
        sum_q, sum_qq, sum_xq = q.sum(-1), (q * q).sum(-1), (x * q).sum(-1)
        determinant = size * sum_qq - sum_q * sum_q
        scale = (size * sum_xq - sum_x * sum_q) * _inverse(determinant)
        offset = (sum_qq * sum_x - sum_q * sum_xq) * _inverse(determinant)
        scale = torch.where(offset > 0, sum_xq * _inverse(sum_qq), scale)
        offset = offset.clamp(max=0)
        error = _error(scale, offset, sum_q, sum_qq, sum_xq, sum_x, sum_xx, size)
        closer = (error < best) & (determinant > 0) & (scale > 0)
        best_scale, best_minimum, best = (
            torch.where(closer, new, old)
            for new, old in ((scale, best_scale), (-offset, best_minimum), (error, best))
        )
    return best_scale, best_minimum


def _search_scale(x: Tensor) -> Tensor:
    """The scale of each group, of either sign, of least squared error: x is about scale * q, q -32..31."""
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))[..., 0]
    best_scale, best = largest / -32, torch.full_like(largest, -1)
    for i in range(RANGES_6):
        q = _signed_codes(x, -(31 + 2.0 * i / (RANGES_6 - 1)) * _inverse(largest))
        sum_xq, sum_qq = (x * q).sum(-1), (q * q).sum(-1)
        scale = sum_xq * _inverse(sum_qq)
        gain = scale * sum_xq  # what the squared error is less than the sum of squares
        closer = gain > best
        best_scale, best = torch.where(closer, scale, best_scale), torch.where(closer, gain, best)
    return best_scale


def _codes(x: Tensor, scale: Tensor, minimum: Tensor, largest: int) -> Tensor:
    """The nearest codes 0..largest, as float32."""
    return ((x + minimum[..., None]) * _inverse(scale)[..., None]).round_().clamp_(0, largest)


def _signed_codes(x: Tensor, inverse: Tensor) -> Tensor:
    """The nearest codes -32..31, as float32, for the inverse of the scale."""
    return (x * inverse[..., None]).round_().clamp_(-32, 31)


def _error(
    scale: Tensor, offset: Tensor, sum_q: Tensor, sum_qq: Tensor, sum_xq: Tensor, sum_x: Tensor, sum_xx: Tensor,
    size: int,
) -> Tensor:  # fmt: skip
    """The sum of (scale * q + offset - x)^2 over `size` values."""
    square = scale * (scale * sum_qq + 2 * (offset * sum_q - sum_xq))
    return square + offset * (size * offset - 2 * sum_x) + sum_xx


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, 0, 1 / d)


def grid(kind: str, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """The grid of rounded blocks: step and offset, float32 (N, K), of weights step * (q - zero) + offset."""
    f, (rows, inputs) = FORMATS[kind], blocks.q.shape
    step = blocks.d[..., :1].float()  # (N, B, 1)
    offset = blocks.d[..., 1:].float() if f.minimum else torch.zeros_like(step)
    if blocks.scales is not None:
        s, t = group_scales(blocks.scales)
        step, offset = step * s, torch.zeros_like(step) if t is None else -(offset * t)

    def spread(values: Tensor) -> Tensor:
        return values.repeat_interleave(f.block // values.shape[-1], -1).view(rows, -1)[:, :inputs]

    return spread(step), spread(offset)


# Each rounds blocks (n, block) to codes uint8 (n, block), bytes of the integer scales (n, bytes) or None, and
# float16 scales (n, 1), with a minimum (n, 2).
ROUNDED: dict[str, Callable[[Tensor], Parts]] = {
    "Q8_0": _q8_0, "Q4_0": lambda x: _from_largest(x, 8), "Q5_0": lambda x: _from_largest(x, 16), "Q4_K": _q4_k,
    "Q6_K": _q6_k,
}  # fmt: skip
