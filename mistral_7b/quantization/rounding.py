"""Round-to-nearest quantization of weights.

N outputs · K inputs · g group · G = K / g groups

    int8    w[n, k] = scale[n] * (q[n, k] - 128)                   q 0..255 (1..255 are used)
    int4    w[n, k] = scale[n] * m[n, g] * (q[n, k] - z[n, g])     q 0..15, m 1..15, z 0..15

int4 has two levels of scales (Lin et al. 2024, "QServe", arXiv:2405.04532, section 4.1): a float per row and an
integer per group, with m * max(z, 15 - z) <= 127. So m (q - z) is an int8 weight, and int4 products are int8
products. Symmetric means z = 8 for all groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.layout import padded

CLIPS = (1.0, 0.94, 0.88, 0.82)  # fractions of a group's range; the one with the least error is used
ROWS = 32  # rounded at a time, to fit the CPU cache
TINY = 1e-30


class Int8Codes(NamedTuple):
    """q uint8 (N, K) and scale float32 (N,)."""

    q: Tensor
    scale: Tensor

    def integers(self) -> Tensor:
        """The int8 weights, (N, K)."""
        return (self.q.short() - 128).to(torch.int8)


class Int4Codes(NamedTuple):
    """q uint8 (N, K), m and z uint8 (N, G), scale float32 (N,); K is padded to a multiple of the group size."""

    q: Tensor
    m: Tensor
    z: Tensor
    scale: Tensor

    def integers(self) -> Tensor:
        """The decompressed int8 weights, (N, K)."""
        grouped = self.q.unflatten(1, (self.m.shape[1], -1)).short()
        return (self.m.short()[..., None] * (grouped - self.z.short()[..., None])).flatten(1).to(torch.int8)


def int8_scale(weight: Tensor) -> Tensor:
    """The scales of `round_int8`: (N,)."""
    return weight.abs().amax(1) / 127


def round_int8(weight: Tensor) -> Int8Codes:
    """Round a weight (N, K) of any float type, with a scale per row, absmax / 127."""
    weight = weight.float()
    scale = int8_scale(weight)
    q = (weight / scale.clamp_min(TINY)[:, None]).round_()
    return Int8Codes((q + 128).to(torch.uint8), scale)


def round_int4(
    weight: Tensor, group_size: int = 128, symmetric: bool = False, importance: Tensor | None = None
) -> Int4Codes:
    """Round a weight (N, K) of any float type; K is padded with zeros to whole groups.

    Each group uses the clipping range with the least squared error, weighted per input by `importance` (K,), such
    as the mean square of its activations; None: all inputs have equal weight.
    """
    parts = [_round_rows(rows.float(), group_size, symmetric, importance) for rows in weight.split(ROWS)]
    return Int4Codes(*(torch.cat(field) for field in zip(*parts, strict=True)))


def grid(weight: Tensor, group_size: int, symmetric: bool, importance: Tensor | None = None) -> tuple[Tensor, ...]:
    """The grid that `round_int4` rounds to, without rounding: m (N, G), z (N, G) and scale (N,), all float32."""
    K = weight.shape[1]
    w = torch.nn.functional.pad(weight, (0, padded(K, group_size) - K)).unflatten(1, (-1, group_size))  # (N, G, g)
    input_weights = None
    if importance is not None:
        input_weights = torch.nn.functional.pad(importance.float(), (0, padded(K, group_size) - K)).view(
            -1, group_size
        )
    low, high = w.amin(-1).clamp_max(0), w.amax(-1).clamp_min(0)
    if symmetric:
        step, z = torch.maximum(-low / 8, high / 7), torch.full_like(low, 8)
    else:
        step = (high - low) / 15
        z = (-low / step.clamp_min(TINY)).round_().clamp_(0, 15)
    max_m = torch.floor(127 / torch.maximum(z, 15 - z))  # the largest m within int8
    scale = (step / max_m).amax(1).clamp_min(TINY)  # (N,)
    best, error = torch.ones_like(step), torch.full_like(step, torch.inf)
    for clip in CLIPS:
        m = (clip * step / scale[:, None]).round_().clamp_(min=1).minimum(max_m)
        squared_error = (w - _nearest(w, m, z, scale)).square_()
        squared_error = (squared_error if input_weights is None else squared_error.mul_(input_weights)).sum(-1)
        improved = squared_error < error
        best, error = torch.where(improved, m, best), torch.where(improved, squared_error, error)
    # For given integers, the least-squares scale has a closed form.
    integers = _nearest(w, best, z, scale) / scale[:, None, None]
    top, bottom = w * integers, integers.square()
    if input_weights is not None:
        top, bottom = top * input_weights, bottom * input_weights
    fitted_scale = top.sum((1, 2)) / bottom.sum((1, 2)).clamp_min(TINY)
    return best, z, torch.where(fitted_scale > 0, fitted_scale, scale)


def _nearest(w: Tensor, m: Tensor, z: Tensor, scale: Tensor) -> Tensor:
    """The grid points nearest to w (N, G, g)."""
    step = (scale[:, None] * m)[..., None]
    z = z[..., None]
    return (w / step).add_(z).round_().clamp_(0, 15).sub_(z).mul_(step)


def _round_rows(weight: Tensor, group_size: int, symmetric: bool, importance: Tensor | None) -> Int4Codes:
    m, z, scale = grid(weight, group_size, symmetric, importance)
    w = torch.nn.functional.pad(weight, (0, m.shape[1] * group_size - weight.shape[1]))
    w = w.unflatten(1, (-1, group_size))
    q = (w / (scale[:, None] * m)[..., None] + z[..., None]).round_().clamp_(0, 15)
    return Int4Codes(q.flatten(1).to(torch.uint8), m.to(torch.uint8), z.to(torch.uint8), scale)
