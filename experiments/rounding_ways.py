"""Ways to round weights and activations, side by side: KL divergence of the starter model from its own float32.

    python experiments/rounding_ways.py TEXT [--rows 4] [--json-file FILE]

Rounding is simulated in float32. The rows have 512 tokens and are independent. "row": one scale per row of
activations or output; a number: one per that many inputs. Hadamard: activations and weights are rotated in blocks
of 64 inputs. The starter's weights lie on Q4_1's grid, which flatters formats with a minimum per 32 inputs.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mistral_7b import Mistral7B, Tokenizer
from mistral_7b.kernels.block_formats import FORMATS
from mistral_7b.quantization.rounding import grid, round_blocks

ROW = 512
Change = Callable[[Tensor], Tensor]


def keep(x: Tensor) -> Tensor:
    return x


def int8(size: int | None) -> Change:
    """Round to int8 with one scale per `size` inputs; None: per row."""

    def change(x: Tensor) -> Tensor:
        width = size or x.shape[-1]
        blocks = F.pad(x, (0, -x.shape[-1] % width)).unflatten(-1, (-1, width))
        scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
        return ((blocks / scale).round() * scale).flatten(-2)[..., : x.shape[-1]]

    return change


def block_format(kind: str) -> Change:
    def change(weight: Tensor) -> Tensor:
        blocks = round_blocks(weight, kind)
        step, offset = grid(kind, blocks)
        return (step * (blocks.q.float() - FORMATS[kind].zero) + offset)[:, : weight.shape[1]]

    return change


def integer_levels(size: int) -> Change:
    """s m (q - z), with a float s per output, and m 1..15 and z 0..15 per `size` inputs, |m (q - z)| <= 127."""

    def change(weight: Tensor) -> Tensor:
        w = F.pad(weight, (0, -weight.shape[1] % size)).unflatten(1, (-1, size))
        low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
        step = ((high - low) / 15).clamp_min(1e-30)
        z = (-low / step).round().clamp(0, 15)
        most = torch.floor(127 / torch.maximum(z, 15 - z))
        scale = (step / most).amax((1, 2), keepdim=True)
        best, error = w, torch.full_like(step, torch.inf)
        for m in range(1, 16):
            unit = scale * m
            rounded = ((w / unit + z).round().clamp(0, 15) - z) * unit
            distance = (rounded - w).square().sum(-1, keepdim=True)
            better = (distance < error) & (m <= most)
            best, error = torch.where(better, rounded, best), torch.where(better, distance, error)
        return best.flatten(1)[:, : weight.shape[1]]

    return change


def hadamard(change: Change, size: int = 64) -> Change:
    """Rotate in blocks of inputs, change, and rotate back: the product of two changed operands is the same."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    matrix = matrix / math.sqrt(size)

    def rotate(x: Tensor) -> Tensor:
        return (x.unflatten(-1, (-1, size)) @ matrix).flatten(-2)

    return lambda x: rotate(change(rotate(x)))


class Rounded(nn.Module):
    def __init__(self, weight: Tensor, activations: Change) -> None:
        super().__init__()
        self.weight, self.activations = weight, activations

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.activations(x), self.weight)


# Name: weights, activations
WAYS: dict[str, tuple[Change, Change]] = {
    **{f"activations int8, {size or 'row'}": (keep, int8(size)) for size in (32, 64, 128, 256, None)},
    **{f"weights int8, {size or 'row'}": (int8(size), keep) for size in (32, 256, None)},
    "Hadamard, int8 with a scale per row": (hadamard(int8(None)), hadamard(int8(None))),
    "weights m (q - z), groups of 32": (integer_levels(32), keep),
    "weights m (q - z), groups of 16": (integer_levels(16), keep),
    **{f"weights {kind}": (block_format(kind), keep) for kind in ("Q4_0", "Q4_K", "Q5_0", "Q6_K")},
    "Q8_0, activations int8, 32": (block_format("Q8_0"), int8(32)),
    "Q4_K, activations int8, 256": (block_format("Q4_K"), int8(256)),
    "Q4_K, activations int8, 32": (block_format("Q4_K"), int8(32)),
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--json-file", type=pathlib.Path)
    options = parser.parse_args()
    ids = Tokenizer.from_pretrained("starter").encode(options.text.read_text(encoding="utf-8"))
    rows = torch.tensor(ids[: options.rows * ROW]).view(-1, 1, ROW)
    model = Mistral7B.from_pretrained("starter", dtype=torch.float32)
    plain = {n: m for n, m in model.named_modules() if hasattr(m, "dequantized") and n != "tok_embeddings"}
    weights = {name: module.dequantized() for name, module in plain.items()}
    results = {}

    def use(weight: Change, activations: Change) -> None:
        for name, original in weights.items():
            changed = original if weight is keep else weight(original)
            model.set_submodule(name, Rounded(changed, activations))

    use(keep, keep)
    exact = [model(row)[0][0].log_softmax(-1) for row in rows]
    for name, way in WAYS.items():
        use(*way)
        others = [model(row)[0][0].log_softmax(-1) for row in rows]
        kl = sum(float((a.exp() * (a - b)).sum(-1).mean()) for a, b in zip(exact, others, strict=True)) / len(rows)
        top = sum(float((a.argmax(-1) == b.argmax(-1)).float().mean()) for a, b in zip(exact, others, strict=True))
        results[name] = {"kl": kl, "top1_agreement": top / len(rows)}
        print(f"{name:40} KL {kl:.5f}  top-1 {top / len(rows):.1%}", flush=True)
    if options.json_file:
        options.json_file.write_text(json.dumps({"tokens": rows.numel(), "ways": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
