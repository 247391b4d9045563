"""Rescaling of channels before rounding (AWQ, Lin et al. 2024, arXiv:2306.00978; SmoothQuant, arXiv:2211.10438).

N outputs · K inputs · T tokens

A Linear's input k may be divided by s_k and its weight's column multiplied by it: the function stays, the errors
change. A channel that carries much gets a finer weight, and an outlier no longer coarsens the int8 activations of
all the others. What makes the input does the dividing, at no cost: a norm's weight, or the rows of the Linear
before it. Every s_k is a power of two, so that nothing is rounded by it, in bfloat16 either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .schemes import Scheme

EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # s is a channel's size to one of these
GAIN = 0.95  # what the error must fall to, of the error of none, for a rescaling to be worth it
TOKENS = 1024  # of the calibration, spread over all of it, and
ROWS = 1024  # of each weight, that the search looks at


def sample(inputs: Sequence[Tensor]) -> Tensor:
    """Some TOKENS of inputs (T, K), evenly spread: (t, K)."""
    stride = max(1, sum(map(len, inputs)) // TOKENS)
    return torch.cat([x[::stride] for x in inputs])


def search(
    linears: dict[str, nn.Linear], x: Tensor, scheme: Scheme, ties: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The s (K,) with which Linears, all of the same input x (T, K), lose least when they are quantized.

    What is tried rounds its inputs as it does in use, so the squared error is that of both roundings. `ties`
    maps sizes (K,) to sizes that are equal where one number does the dividing.
    """
    parts = {name: linear.weight[:: max(1, linear.out_features // ROWS)] for name, linear in linears.items()}
    wanted = {name: x @ weight.T for name, weight in parts.items()}

    def error(s: Tensor) -> float:
        total = 0.0
        for name, weight in parts.items():
            made = scheme.linear(weight * s, name)
            total += (made(x / s).float() - wanted[name].float()).square().sum().item()
        return total

    size = x.float().abs().amax(0)
    size = size if ties is None else ties(size)
    log = size.clamp_min(size.amax() * 1e-4 + 1e-12).log2()
    log -= log.median()
    tried = [torch.exp2((log * exponent).round()).to(x.dtype) for exponent in EXPONENTS]
    errors = [error(s) for s in tried]
    best = min(range(len(tried)), key=errors.__getitem__)
    return tried[best] if errors[best] < GAIN * errors[0] else tried[0]


def multiply(linears: dict[str, nn.Linear], s: Tensor) -> None:
    """Multiply the Linears' columns."""
    for linear in linears.values():
        set_weight(linear, linear.weight * s)


def set_weight(module: nn.Module, weight: Tensor) -> None:
    """Give a module another weight. Never written in place: it may be mapped from a file, or tied to another."""
    module.weight = nn.Parameter(weight, requires_grad=False)
