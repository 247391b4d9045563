"""The errors of another engine, module by module: each half of each block, on the engine's own input, in float64.

What came before has no part in an error, nor has this package's rounding: what is left is the engine's own, in
float32 about 1e-6, or a fault of that module.

R rows · T tokens · D width
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...checkpoint.names import EMBEDDING
from .sides import Side
from .streaming import Place, Progress, block_of, settings_of


@torch.inference_mode()
def module_errors(side: Side, tokens: Tensor, states: Sequence[Tensor], progress: Progress) -> Iterator[Place]:
    """Yield the error of each module whose output, with the residual, is in `states` (R, T, D), as Ran has them.

    An error is that of the worst position, relative to the state there: the states of a text's first positions are
    much larger than the rest, and would hide it.
    """
    yield Place("tok_embeddings", _worst(side.weight(EMBEDDING)[tokens], states[0]))
    side.release(EMBEDDING)
    settings = settings_of(side.args, tokens, torch.float64)
    n_layers = side.args.n_layers
    for layer in range(n_layers):
        progress(layer, n_layers, f"layers.{layer}")
        block = block_of(side, layer).double()
        x, middle, after = (t.double() for t in states[2 * layer : 2 * layer + 3])
        wanted = x + block.attention(block.attention_norm(x), *settings)
        yield Place(f"layers.{layer}.attention", _worst(wanted, middle))
        wanted = middle + block.feed_forward(block.ffn_norm(middle))
        yield Place(f"layers.{layer}.feed_forward", _worst(wanted, after))
        for key in block.state_dict():
            side.release(f"layers.{layer}.{key}")
        del block


def _worst(wanted: Tensor, found: Tensor) -> float:
    """The largest |wanted - found| / |wanted| of a position; infinity where one is not finite."""
    errors = (wanted.double() - found.double()).norm(dim=-1) / wanted.double().norm(dim=-1).clamp_min(1e-30)
    return float(errors.nan_to_num(nan=float("inf")).max())
