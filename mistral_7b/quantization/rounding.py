"""Weights to integers, rounded to nearest.

N outputs · K inputs · g group · G = K / g groups

    int8    w[n, k] = scale[n] * (q[n, k] - 128)                   q 0..255 (1..255 are used)
    int4    w[n, k] = scale[n] * m[n, g] * (q[n, k] - z[n, g])     q 0..15, m 1..15, z 0..15

The two scales of int4 (Lin et al. 2024, "QServe", arXiv:2405.04532, section 4.1) are a float for a row and
a whole number for a group, bound by m * max(z, 15 - z) <= 127: so m (q - z) is an int8 weight, and all that is
true of int8 products is true of int4's. Symmetric means z = 8 throughout.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.layout import padded

CLIPS = (1.0, 0.94, 0.88, 0.82)  # of a group's range, tried for the least error
ROWS = 32  # rounded at once: what is worked on stays in the cache
TINY = 1e-30


class Int8Codes(NamedTuple):
    """q uint8 (N, K) and scale float32 (N,)."""

    q: Tensor
    scale: Tensor

    def integers(self) -> Tensor:
        """The int8 weights, (N, K)."""
        return (self.q.short() - 128).to(torch.int8)


class Int4Codes(NamedTuple):
    """q uint8 (N, K), m and z uint8 (N, G), scale float32 (N,); K is a multiple of the group here."""

    q: Tensor
    m: Tensor
    z: Tensor
    scale: Tensor

    def integers(self) -> Tensor:
        """The int8 weights that the codes stand for, (N, K)."""
        grouped = self.q.unflatten(1, (self.m.shape[1], -1)).short()
        return (self.m.short()[..., None] * (grouped - self.z.short()[..., None])).flatten(1).to(torch.int8)


def int8_scale(weight: Tensor) -> Tensor:
    """The scales of `round_int8`: (N,)."""
    return weight.abs().amax(1) / 127


def round_int8(weight: Tensor) -> Int8Codes:
    """A weight (N, K) of any float type, each row by its own scale, absmax / 127."""
    weight = weight.float()
    scale = int8_scale(weight)
    q = (weight / scale.clamp_min(TINY)[:, None]).round_()
    return Int8Codes((q + 128).to(torch.uint8), scale)


def round_int4(
    weight: Tensor, group_size: int = 128, symmetric: bool = False, importance: Tensor | None = None
) -> Int4Codes:
    """A weight (N, K) of any float type; K is padded with zeros to whole groups.

    Every group takes of several clippings the one with the least squared error, each input's weighed by
    `importance` (K,), such as the mean square of its activations; none: all alike.
    """
    parts = [_round_rows(rows.float(), group_size, symmetric, importance) for rows in weight.split(ROWS)]
    return Int4Codes(*(torch.cat(field) for field in zip(*parts, strict=True)))


def grid(weight: Tensor, group_size: int, symmetric: bool, importance: Tensor | None = None) -> tuple[Tensor, ...]:
    """The grid that `round_int4` rounds to, without rounding: m (N, G), z (N, G) and scale (N,), all float32."""
    K = weight.shape[1]
    w = torch.nn.functional.pad(weight, (0, padded(K, group_size) - K)).unflatten(1, (-1, group_size))  # (N, G, g)
    weighed = None
    if importance is not None:
        weighed = torch.nn.functional.pad(importance.float(), (0, padded(K, group_size) - K)).view(-1, group_size)
    low, high = w.amin(-1).clamp_max(0), w.amax(-1).clamp_min(0)
    if symmetric:
        step, z = torch.maximum(-low / 8, high / 7), torch.full_like(low, 8)
    else:
        step = (high - low) / 15
        z = (-low / step.clamp_min(TINY)).round_().clamp_(0, 15)
    most = torch.floor(127 / torch.maximum(z, 15 - z))  # the largest m that leaves int8
    scale = (step / most).amax(1).clamp_min(TINY)  # (N,)
    best, error = torch.ones_like(step), torch.full_like(step, torch.inf)
    for clip in CLIPS:
        m = (clip * step / scale[:, None]).round_().clamp_(min=1).minimum(most)
        off = (w - _nearest(w, m, z, scale)).square_()
        off = (off if weighed is None else off.mul_(weighed)).sum(-1)
        better = off < error
        best, error = torch.where(better, m, best), torch.where(better, off, error)
    # Given the integers, the scale that fits them best has a closed form.
    whole = _nearest(w, best, z, scale) / scale[:, None, None]
    top, bottom = w * whole, whole.square()
    if weighed is not None:
        top, bottom = top * weighed, bottom * weighed
    fitted = top.sum((1, 2)) / bottom.sum((1, 2)).clamp_min(TINY)
    return best, z, torch.where(fitted > 0, fitted, scale)


def _nearest(w: Tensor, m: Tensor, z: Tensor, scale: Tensor) -> Tensor:
    """The points of the grid that are nearest to w (N, G, g)."""
    step = (scale[:, None] * m)[..., None]
    z = z[..., None]
    return (w / step).add_(z).round_().clamp_(0, 15).sub_(z).mul_(step)


def _round_rows(weight: Tensor, group_size: int, symmetric: bool, importance: Tensor | None) -> Int4Codes:
    m, z, scale = grid(weight, group_size, symmetric, importance)
    w = torch.nn.functional.pad(weight, (0, m.shape[1] * group_size - weight.shape[1]))
    w = w.unflatten(1, (-1, group_size))
    q = (w / (scale[:, None] * m)[..., None] + z[..., None]).round_().clamp_(0, 15)
    return Int4Codes(q.flatten(1).to(torch.uint8), m.to(torch.uint8), z.to(torch.uint8), scale)
