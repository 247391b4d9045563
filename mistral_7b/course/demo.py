"""The bundled model in the learner's own classes: `open_demo` of exercise 7."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from ..checkpoint import read_args
from ..checkpoint.hub import DEMO
from ..checkpoint.names import interleaved, rename, rotated_heads
from ..model import Mistral7B


def open_demo(dtype: torch.dtype = torch.float32) -> Mistral7B:
    """The bundled model. Its file has Hugging Face's names, and the rows of wq and wk in half-split order."""
    args = read_args(DEMO)[0]
    model, state = Mistral7B(args, dtype=dtype), {}
    for name, weight in load_file(DEMO / "model.safetensors").items():
        own = rename(name, "huggingface", "mistral")  # model.layers.0.mlp.up_proj -> layers.0.feed_forward.w3
        assert own is not None
        heads = rotated_heads(own, args)  # H for wq, G for wk, None for all others
        state[own] = weight if heads is None else interleaved(weight, heads)
    model.load_state_dict(state, strict=False)  # output.weight is tied to the embedding
    return model.requires_grad_(False)
