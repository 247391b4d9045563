"""Quantize values to GGUF's blocks: Q8_0, Q4_0 and Q5_0 as the gguf package does, Q4_K and Q6_K by a search.

The search minimizes the squared error of a group of values: it tries several ranges of codes, and solves for
the best scale (and minimum) of each by least squares. The scales of a block's groups are then rounded to
integers, with the neighbours of each integer tried, and the codes are chosen again for the rounded scales.

n blocks · x values (n, groups, values of a group) · q codes · d, m float16 scale and minimum of a block ·
s, t integer scale and minimum of a group
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .file import Kind

RANGES_4, RANGES_6 = 13, 9  # ranges of codes tried: more reduce the error by less than a thousandth


def quantize(kind: Kind, values: Tensor) -> Tensor:
    """Quantize values (N, K) to blocks (N, K / block * size) uint8 of a type in WRITTEN.

    Raises ValueError for values that are not finite or exceed the range of float16 scales.
    """
    blocks = values.to(torch.float32).reshape(-1, kind.block)
    parts = WRITTEN[kind.name](blocks)
    if not all(part.isfinite().all() for part in (blocks, *parts)):
        raise ValueError("values that are not finite, or larger than float16 scales can hold")
    return torch.cat([p.view(torch.uint8) for p in parts], -1).view(values.shape[0], -1)


def _q8_0(x: Tensor) -> tuple[Tensor, ...]:
    """Round to nearest, ties away from zero."""
    d = x.abs().amax(-1, keepdim=True) / 127
    scaled = x * _inverse(d)
    whole = scaled.abs().floor()
    q = scaled.sign() * (whole + (2 * (scaled.abs() - whole)).floor())
    return d.half(), q.to(torch.int8)


def _q4_0(x: Tensor) -> tuple[Tensor, ...]:
    d, q = _from_largest(x, 8)
    return d, _pack(q, 4, 16)


def _q5_0(x: Tensor) -> tuple[Tensor, ...]:
    d, q = _from_largest(x, 16)
    return d, _pack(q >> 4, 1, 1), _pack(q & 15, 4, 16)


def _from_largest(x: Tensor, zero: int) -> tuple[Tensor, Tensor]:
    """Scale the value of largest magnitude to code 0, which stands for -zero."""
    d = x.gather(-1, x.abs().argmax(-1, keepdim=True)) / -zero
    q = (x * _inverse(d) + (zero + 0.5)).trunc().to(torch.uint8).clamp(0, 2 * zero - 1)
    return d.half(), q


def _q4_k(x: Tensor) -> tuple[Tensor, ...]:
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
    return halves, _pack_six_bits(best_s.to(torch.uint8), best_t.to(torch.uint8)), _pack(q, 4, 32)


def _q6_k(x: Tensor) -> tuple[Tensor, ...]:
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
    return _pack(q & 15, 4, 64), _pack(q >> 4, 2, 32), best_s.to(torch.int8), half


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


def _pack(q: Tensor, width: int, run: int) -> Tensor:
    """Pack codes (n, r * run * 8 / width) of `width` bits to bytes (n, r * run): lowest bits of each run first."""
    runs = q.unflatten(1, (-1, 8 // width, run))
    out = runs[:, :, 0].clone()
    for i in range(1, 8 // width):
        out |= runs[:, :, i] << (width * i)
    return out.flatten(1)


def _pack_six_bits(s: Tensor, t: Tensor) -> Tensor:
    """The 12 bytes of s and t (n, 8), see `block_formats.group_scales`."""
    first, second = (v[:, :4] | (v[:, 4:] >> 4 << 6) for v in (s, t))
    return torch.cat([first, second, (s[:, 4:] & 15) | (t[:, 4:] << 4)], 1)


# Each returns the parts of the blocks (n, ...) in the file's order, the scales in float16.
WRITTEN: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "Q8_0": _q8_0, "Q4_0": _q4_0, "Q5_0": _q5_0, "Q4_K": _q4_k, "Q6_K": _q6_k,
}  # fmt: skip
