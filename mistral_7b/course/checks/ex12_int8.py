"""int8 rounding, an exact integer product, and what it costs the bundled model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mistral_7b.course.compare import equal, expect, same
from mistral_7b.course.int8 import Int8Linear
from mistral_7b.course.setting import numbers
from mistral_7b.kernels.linear import quantize_rows
from mistral_7b.model import Mistral7B
from mistral_7b.text.tokenizer import Tokenizer

TEXT = """import os


def main(argv=None):
    for path in argv:
        with open(path) as file:
            print(file.read())
"""


def check(ex: Any) -> str:
    _check_rounding(ex)
    linear = torch.nn.Linear(96, 20, bias=False)
    linear.weight.data = numbers(20, 96, seed=3) * (1 + torch.arange(20)[:, None])
    own, real = ex.Int8Linear(linear), Int8Linear(linear)
    x = numbers(7, 96, seed=4)
    q, scale = quantize_rows(x)
    exact = (real.codes * real.scale[..., None]).flatten(1)
    guesses = {
        "x is not rounded to int8: the weight is dequantized and multiplied in float": x @ exact.T,
        "x has one scale a row; it has one for each block of 32 inputs, as the weight": (q * scale) @ exact.T,
        "the scales of x are not multiplied": _without(real, x, of_x=False),
        "the scales of the weight are not multiplied": _without(real, x, of_w=False),
        "neither scale is multiplied": _without(real, x, False, False),
        "this is the unquantized product": linear(x).detach(),
    }
    same(own(x), real(x), "Int8Linear(x)", guesses)
    together, alone = own(x), torch.cat([own(row[None]) for row in x])
    expect(
        torch.equal(alone, together),
        f"a row's result depends on the rows beside it: alone and together differ by "
        f"{float((alone - together).abs().max()):.1g}",
        "sum the products of a block as whole numbers (float64 or int32), and add the blocks in order",
    )
    equal(
        own(x.bfloat16()).dtype,
        torch.bfloat16,
        "the type of Int8Linear(x) of a bfloat16 x",
        {torch.float32: "the result is cast back to x's type"},
    )
    return _cost(ex)


def _without(layer: Int8Linear, x: Tensor, of_x: bool = True, of_w: bool = True) -> Tensor:
    q, sx = quantize_rows(x.unflatten(-1, (-1, 32)))
    sx, sw = (sx if of_x else torch.ones_like(sx)), (layer.scale if of_w else torch.ones_like(layer.scale))
    return torch.einsum("tbk,tb,nbk,nb->tn", q, sx[..., 0], layer.codes.float(), sw)


def _check_rounding(ex: Any) -> None:
    x = numbers(4, 6) * torch.tensor([[0.01], [1.0], [30.0], [0.0]])
    top = x.abs().amax(-1, keepdim=True)
    q, scale = quantize_rows(x)
    safe = top.clamp(min=1e-30)
    guesses = {
        "round to the nearest integer; here the fraction is cut off": (x / safe * 127).trunc(),
        "round to the nearest integer; here it is rounded down": (x / safe * 127).floor(),
        "the largest magnitude becomes 127, not 128": (x / safe * 128).round(),
        "each row has its own scale, here there is one for all": (x / x.abs().max() * 127).round(),
        "the largest value is taken, not the largest magnitude": (
            x / x.amax(-1, keepdim=True).clamp(min=1e-30) * 127
        ).round(),
        "a row of zeros divides by zero": (x / top * 127).round(),
    }
    answer = ex.quantize_rows(x)
    expect(isinstance(answer, tuple) and len(answer) == 2, "quantize_rows returns no pair", "return (q, scale)")
    same(answer[0], q, "the integers of quantize_rows(x)", guesses, 0)
    same(
        answer[1],
        scale,
        "the scales of quantize_rows(x)",
        {
            "this is the inverse: x is about q * scale, so scale = max / 127": 127 / top,
            "the scale is max / 127": top,
            "the scales keep their axis: (..., 1)": scale[..., 0],
        },
        1e-6,
    )


def _cost(ex: Any) -> str:
    ids = torch.tensor([Tokenizer.from_pretrained("demo").encode(TEXT)])
    model = Mistral7B.from_pretrained("demo", dtype=torch.float32).requires_grad_(False)
    before = model(ids)[0][0].log_softmax(-1)
    after = ex.quantize_linears(model)(ids)[0][0].log_softmax(-1)
    kl = float((before.exp() * (before - after)).sum(-1).mean())
    agree = int((before.argmax(-1) == after.argmax(-1)).sum())
    expect(
        kl < 0.01, f"the bundled model in int8 is {kl:.3f} nats from the unquantized one; below 0.01 was expected"
    )
    return f"int8 keeps the most probable token at {agree} of {len(ids[0])} positions; KL divergence {kl:.1e} nats"
