"""Rescaling of channels before rounding (AWQ, Lin et al. 2024, arXiv:2306.00978; SmoothQuant, arXiv:2211.10438).

N outputs · K inputs · T tokens

Input k of a Linear can be divided by s_k if the weight's column k is multiplied by it: the function is the same,
the quantization errors differ. Important channels get a finer weight, and outliers reduce the precision of the
other int8 activations less. The division is folded into the producer of the input, a norm's weight or the rows of
the preceding Linear, at no cost. All s_k are powers of two, so that scaling is exact, also in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .schemes import Scheme

EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # s is a channel's absmax to the power of one of these
GAIN = 0.95  # use a rescaling only if its error is below this fraction of the error without
TOKENS = 1024  # calibration tokens that the search uses, evenly spaced
ROWS = 1024  # rows of each weight that the search uses


def sample(inputs: Sequence[Tensor]) -> Tensor:
    """About TOKENS rows of inputs (T, K), evenly spaced: (t, K)."""
    stride = max(1, sum(map(len, inputs)) // TOKENS)
    return torch.cat([x[::stride] for x in inputs])


def search(
    linears: dict[str, nn.Linear], x: Tensor, scheme: Scheme, ties: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The s (K,) that minimizes the quantization error of Linears with the same input x (T, K).

    The squared error includes the quantization of activations. `ties` maps absmax values (K,) to equal values for
    channels that must share one s.
    """
    parts = {name: linear.weight[:: max(1, linear.out_features // ROWS)] for name, linear in linears.items()}
    expected = {name: x @ weight.T for name, weight in parts.items()}

    def error(s: Tensor) -> float:
        total = 0.0
        for name, weight in parts.items():
            quantized = scheme.linear(weight * s, name)
            total += (quantized(x / s).float() - expected[name].float()).square().sum().item()
        return total

    size = x.float().abs().amax(0)
    size = size if ties is None else ties(size)
    log = size.clamp_min(size.amax() * 1e-4 + 1e-12).log2()
    log -= log.median()
    candidates = [torch.exp2((log * exponent).round()).to(x.dtype) for exponent in EXPONENTS]
    errors = [error(s) for s in candidates]
    best = min(range(len(candidates)), key=errors.__getitem__)
    return candidates[best] if errors[best] < GAIN * errors[0] else candidates[0]


def multiply(linears: dict[str, nn.Linear], s: Tensor) -> None:
    """Multiply the Linears' columns by s (K,)."""
    for linear in linears.values():
        set_weight(linear, linear.weight * s)


def set_weight(module: nn.Module, weight: Tensor) -> None:
    """Replace a module's weight. Never in place: it may be memory-mapped or tied to another."""
    module.weight = nn.Parameter(weight, requires_grad=False)
