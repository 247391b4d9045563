"""SwiGLU, and the roles of its three matrices."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from mistral_7b.course.compare import same
from mistral_7b.course.setting import SMALL, fill, numbers


def check(ex: Any) -> None:
    ffn = fill(ex.FeedForward(SMALL))
    x = 2 * numbers(2, 5, SMALL.dim)
    gate, up = F.linear(x, ffn.w1.weight), F.linear(x, ffn.w3.weight)

    def down(inner: torch.Tensor) -> torch.Tensor:
        return F.linear(inner, ffn.w2.weight)

    guesses = {
        "w1 is the gate and w3 the other factor; here they are swapped": down(gate * F.silu(up)),
        "silu applies to w1 x alone, not to the product": down(F.silu(gate * up)),
        "silu is missing": down(gate * up),
        "the gate is sigmoid; silu(a) is a * sigmoid(a)": down(gate.sigmoid() * up),
        "the gate is gelu; SwiGLU's is silu": down(F.gelu(gate) * up),
        "the gate is relu; SwiGLU's is silu": down(F.relu(gate) * up),
        "the factor w3 x is missing": down(F.silu(gate)),
        "the two are added; multiply them": down(F.silu(gate) + up),
    }
    same(ffn(x), down(F.silu(gate) * up), "FeedForward(x)", guesses)
