"""Round weights to GGUF's block formats: Q8_0, Q4_0 and Q5_0 as llama.cpp does, Q4_K and Q6_K by a search.

The search minimizes the squared error of a group of values: it tries several ranges of codes, and solves for
the best scale (and minimum) of each by least squares. The scales of a block's groups are then rounded to
integers, with the neighbours of each integer tried, and the codes are chosen again for the rounded scales.
`importance` weights the error of each input. The C++ in kernels/cpu/rounding.h makes this search 12 times as fast;
its results are bit-identical.

Values of a group lie along dimension 0, so that sums over a group are vector operations.

N outputs · K inputs · B blocks of K · n blocks in all · g groups in all · x values (values of a group, g) ·
w importance like x, or None · q codes · d, m float16 scale and minimum of a block · s, t integer scale and
minimum of a group
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import QuantizationError
from ..kernels.backend import ROUND, Backend, uses
from ..kernels.block_formats import FORMATS, group_bytes, group_scales, padded
from ..kernels.cpu import calls

RANGES_4, RANGES_6 = 13, 9  # ranges of codes tried: more reduce the error by less than a thousandth
VALUES_AT_ONCE = 1 << 20  # of the twin: float32 copies of a chunk (4 MB each) fit in the CPU's cache

Parts = tuple[Tensor, Tensor | None, Tensor]


class Blocks(NamedTuple):
    """A weight (N, K) in a block format, in the form that `block_formats.tile` takes. K is padded to 32."""

    q: Tensor  # uint8 (N, K)
    scales: Tensor | None  # bytes of the integer scales, uint8 (N, B, bytes)
    d: Tensor  # float16 scale (N, B, 1), with a minimum (N, B, 2)


def round_blocks(weight: Tensor, kind: str, importance: Tensor | None = None) -> Blocks:
    """Round a weight (N, K) of any float type to a block format. The last block of a row may be short.

    `importance` float32 (K,), positive, weights the squared error of each input in the search for scales of Q4_K
    and Q6_K. Raises QuantizationError for values that are not finite or exceed the range of float16 scales.
    """
    inputs, weight = weight.shape[1], weight.detach()
    if kind in ("Q4_K", "Q6_K") and uses(Backend.CPU, ROUND, weight):
        parts: Parts = calls.round_blocks(weight, kind == "Q6_K", importance)
    else:
        parts = round_blocks_twin(weight, kind, importance)
    q, scales, d = parts
    if not d.isfinite().all():
        raise QuantizationError(
            "values that are not finite, or larger than float16 scales can hold", field="weight"
        )
    return Blocks(q[:, : padded(inputs)].contiguous(), scales, d)


def round_blocks_twin(weight: Tensor, kind: str, importance: Tensor | None = None) -> Parts:
    """`round_blocks` in plain PyTorch, some rows at a time; d is not finite for blocks with values that are not.

    K is padded to whole blocks.
    """
    f, inputs = FORMATS[kind], weight.shape[1]
    blocks = f.blocks(inputs)
    pad = blocks * f.block - inputs
    chunks, found, w = weight.split(max(1, VALUES_AT_ONCE // (blocks * f.block))), [], None
    if importance is not None:
        w = _grouped(F.pad(importance, (0, pad)).expand(len(chunks[0]), -1), f.group)
    for rows in chunks:
        x = _grouped(F.pad(rows, (0, pad)) if pad else rows, f.group)
        q, scales, d = ROUNDED[kind](_Groups(x, None if w is None else w[:, : x.shape[1]]))
        n = (len(rows), blocks, -1)
        d = torch.where(x.isfinite().all(0).view(n).all(-1, keepdim=True), d.view(n), torch.nan)
        found.append((q.to(torch.uint8).T.reshape(len(rows), -1), None if scales is None else scales.view(n), d))
    q, d = torch.cat([part[0] for part in found]), torch.cat([part[2] for part in found])
    return q, None if found[0][1] is None else torch.cat([part[1] for part in found]), d  # type: ignore[misc]


def _grouped(rows: Tensor, size: int) -> Tensor:
    """Rows (N, K) as groups, float32 (size, N * K / size)."""
    groups = rows.reshape(-1, size).T
    return torch.empty_like(groups, dtype=torch.float32, memory_format=torch.contiguous_format).copy_(groups)


class _Groups:
    """Groups x (values of a group, g) with their importance w, and sums (g,) of values and codes q.

    Results share two buffers: allocating one would take longer than ten operations on it.
    """

    def __init__(self, x: Tensor, w: Tensor | None) -> None:
        self.x, self.w, self.wx = x, w, x if w is None else x * w
        self._codes, self._product = torch.empty_like(x), torch.empty_like(x)
        self.sum_w = torch.full_like(x[0], len(x)) if w is None else _sum(w)
        self.sum_x, self.sum_xx = _sum(self.wx), self._dot(self.wx, x)

    def codes(self, scale: Tensor, offset: Tensor | None, low: int, high: int) -> Tensor:
        """The codes nearest to (x + offset) / scale, within low..high, as float32; valid until the next call."""
        q = self._codes
        inverse = _inverse(scale)
        if offset is None:
            torch.mul(self.x, inverse, out=q)
        else:
            torch.add(self.x, offset, out=q).mul_(inverse)
        return q.round_().clamp_(low, high)

    def sums(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sums of wq, wq^2 and wxq."""
        sum_xq = self._dot(self.wx, q)
        if self.w is None:
            return _sum(q), self._dot(q, q), sum_xq
        wq = torch.mul(self.w, q, out=self._product)
        return _sum(wq), _sum(wq.mul_(q)), sum_xq

    def error(self, scale: Tensor, offset: Tensor, sum_q: Tensor, sum_qq: Tensor, sum_xq: Tensor) -> Tensor:
        """The sum of w (scale * q + offset - x)^2."""
        square = scale * (scale * sum_qq + 2 * (offset * sum_q - sum_xq))
        return square + offset * (self.sum_w * offset - 2 * self.sum_x) + self.sum_xx

    def _dot(self, a: Tensor, b: Tensor) -> Tensor:
        return _sum(torch.mul(a, b, out=self._product))


def _sum(x: Tensor) -> Tensor:
    """The sum over dimension 0, in the kernel's order: four sums of every fourth value, then of these."""
    parts = x[:4].clone()
    for i in range(4, len(x), 4):
        parts += x[i : i + 4]
    return (parts[0] + parts[2]) + (parts[1] + parts[3])


def _q8_0(groups: _Groups) -> Parts:
    """Round to nearest, ties away from zero."""
    size = groups.x.abs()
    d = size.amax(0) / 127
    size.mul_(_inverse(d))
    whole = size.floor()
    size.sub_(whole).mul_(2).floor_().add_(whole)
    return size.copysign_(groups.x).add_(128), None, d.half()


def _from_largest(groups: _Groups, zero: int) -> Parts:
    """Scale the value of largest magnitude to code 0, which stands for -zero."""
    d = groups.x.gather(0, groups.x.abs().argmax(0, keepdim=True)) / -zero
    return (groups.x * _inverse(d)).add_(zero + 0.5).trunc_().clamp_(0, 2 * zero - 1), None, d.half()


def _q4_k(groups: _Groups) -> Parts:
    scale, minimum = _search_range(groups, 15)
    halves = torch.stack([scale.view(-1, 8).amax(1), minimum.view(-1, 8).amax(1)], 1).div(63).half()
    d, m = (half.repeat_interleave(8) for half in halves.float().unbind(1))  # (g,)
    s = (scale * _inverse(d)).round().clamp(0, 63)
    t = (minimum * _inverse(m)).round().clamp(0, 63)
    best_s, best_t, best = s, t, torch.full_like(s, torch.inf)
    for near in (s, s - 1, s + 1):
        near = near.clamp(0, 63)
        sums = groups.sums(groups.codes(d * near, m * t, 0, 15))
        fitted = ((d * near * sums[0] - groups.sum_x) * _inverse(groups.sum_w * m)).round().clamp(0, 63)
        error = groups.error(d * near, -m * fitted, *sums)
        closer = error < best
        best_s, best_t, best = (
            torch.where(closer, new, old) for new, old in ((near, best_s), (fitted, best_t), (error, best))
        )
    q = groups.codes(d * best_s, m * best_t, 0, 15)
    s, t = (v.to(torch.uint8).view(-1, 8) for v in (best_s, best_t))
    return q, group_bytes(s, t), halves


def _q6_k(groups: _Groups) -> Parts:
    scale = _search_scale(groups).view(-1, 16)
    half = (scale.gather(1, scale.abs().argmax(1, keepdim=True)) / -128).half()
    d = half.float()
    s = (scale * _inverse(d)).round().clamp(-128, 127)
    best_s, best = s, torch.full_like(s, torch.inf)
    for near in (s, s - 1, s + 1):
        near = near.clamp(-128, 127)
        step = (d * near).flatten()
        sums = groups.sums(groups.codes(step, None, -32, 31))
        error = groups.error(step, torch.zeros_like(step), *sums).view_as(s)
        closer = error < best
        best_s, best = torch.where(closer, near, best_s), torch.where(closer, error, best)
    q = groups.codes((d * best_s).flatten(), None, -32, 31).add_(32)
    return q, best_s.to(torch.int8).view(torch.uint8), half


def _search_range(groups: _Groups, largest: int) -> tuple[Tensor, Tensor]:
    """Scale and minimum >= 0 of each group, of least squared error: x is about scale * q - minimum."""
    low, high = groups.x.amin(0).clamp(max=0), groups.x.amax(0)
    best_scale, best_minimum = (high - low) / largest, -low
    best = torch.full_like(low, torch.inf)
    for i in range(RANGES_4):
        q = groups.codes((high - low) / (largest - 1 + 2.4 * i / (RANGES_4 - 1)), -low, 0, largest)
        sum_q, sum_qq, sum_xq = groups.sums(q)
        inverse = _inverse(groups.sum_w * sum_qq - sum_q * sum_q)
        scale = (groups.sum_w * sum_xq - groups.sum_x * sum_q) * inverse
        offset = (sum_qq * groups.sum_x - sum_q * sum_xq) * inverse
        scale = torch.where(offset > 0, sum_xq * _inverse(sum_qq), scale)
        offset = offset.clamp(max=0)
        error = groups.error(scale, offset, sum_q, sum_qq, sum_xq)
        closer = (error < best) & (inverse > 0) & (scale > 0)
        best_scale, best_minimum, best = (
            torch.where(closer, new, old)
            for new, old in ((scale, best_scale), (-offset, best_minimum), (error, best))
        )
    return best_scale, best_minimum


def _search_scale(groups: _Groups) -> Tensor:
    """The scale of each group, of either sign, of least squared error: x is about scale * q, q -32..31."""
    largest = _largest(groups.x)
    best_scale, best = largest / -32, torch.full_like(largest, -1)
    for i in range(RANGES_6):
        _, sum_qq, sum_xq = groups.sums(groups.codes(largest / -(31 + 2.0 * i / (RANGES_6 - 1)), None, -32, 31))
        scale = sum_xq * _inverse(sum_qq)
        gain = scale * sum_xq  # what the squared error is less than the sum of squares
        closer = gain > best
        best_scale, best = torch.where(closer, scale, best_scale), torch.where(closer, gain, best)
    return best_scale


def _largest(x: Tensor) -> Tensor:
    """The value of largest magnitude of each group."""
    low, high = x.amin(0), x.amax(0)
    return torch.where(high < -low, low, high)


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


# Each rounds groups to codes float32 like x, bytes of the integer scales (n, bytes) or
# None, and float16 scales of n values, with a minimum (n, 2).
ROUNDED: dict[str, Callable[[_Groups], Parts]] = {
    "Q8_0": _q8_0, "Q4_0": lambda groups: _from_largest(groups, 8),
    "Q5_0": lambda groups: _from_largest(groups, 16), "Q4_K": _q4_k, "Q6_K": _q6_k,
}  # fmt: skip
