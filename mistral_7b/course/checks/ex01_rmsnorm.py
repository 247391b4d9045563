"""RMSNorm: float32 values, then the order of rounding in bfloat16."""

from __future__ import annotations

from typing import Any

import torch

from mistral_7b.course.compare import Guesses, same
from mistral_7b.course.setting import numbers


def check(ex: Any) -> None:
    eps, x, weight = 0.05, 0.3 * numbers(3, 8) + 0.1, 1 + 0.5 * numbers(8, seed=1)
    norm = ex.RMSNorm(8, eps)
    norm.weight.data = weight
    square = x.square().mean(-1, keepdim=True)
    right = x / (square + eps).sqrt()
    guesses = {
        "eps belongs under the root: 1 / sqrt(mean(x^2) + eps), not 1 / (sqrt(mean(x^2)) + eps)": (
            x / (square.sqrt() + eps) * weight
        ),
        "eps is not added": x / square.sqrt() * weight,
        "the mean is subtracted: that is LayerNorm": (
            (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt() * weight
        ),
        "the squares are summed, not averaged": x / (x.square().sum(-1, keepdim=True) + eps).sqrt() * weight,
        "the mean runs over the whole tensor; each token is normalised alone, over its last axis": (
            x / (x.square().mean() + eps).sqrt() * weight
        ),
        "the result is not multiplied by self.weight": right,
        "the root is not taken: divide by sqrt(mean(x^2) + eps)": x / (square + eps) * weight,
        "the input is multiplied by the root; divide by it": x * (square + eps).sqrt() * weight,
    }
    same(norm(x), right * weight, "RMSNorm(8, eps=0.05)(x)", guesses)

    x, weight = numbers(64, 96, dtype=torch.bfloat16), 1 + 0.5 * numbers(96, seed=1, dtype=torch.bfloat16)
    norm = ex.RMSNorm(96, 1e-5, dtype=torch.bfloat16)
    norm.weight.data = weight
    wide = x.float()
    square, low = wide.square().mean(-1, keepdim=True) + 1e-5, x.square().mean(-1, keepdim=True) + 1e-5
    normed = wide * torch.rsqrt(square)
    rough: Guesses = {
        "the mean and the root are computed in bfloat16; convert x to float32 first": (
            x * torch.rsqrt(low) * weight,
            x / low.sqrt() * weight,
        ),
        "the weight is multiplied in float32; cast the normalised x down to x's type first": (
            (normed * weight).to(torch.bfloat16),
            (wide / square.sqrt() * weight).to(torch.bfloat16),
        ),
        "the result is not cast back to x's type": normed * weight,
    }
    got = norm(x)
    rights = [
        y.to(torch.bfloat16) * weight for y in (normed, wide / square.sqrt())
    ]  # they round alike almost always
    right = (
        next((y for y in rights if torch.equal(y, got)), rights[0]) if isinstance(got, torch.Tensor) else rights[0]
    )
    same(got, right, "in bfloat16, RMSNorm(96)(x)", rough, tolerance=0)
