"""PEFT models of every kind that is opened here, with trained-looking weights, saved by PEFT itself."""

from __future__ import annotations

import dataclasses
import pathlib
import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tiny import TINY, tiny_args, tiny_model, tokens_of
from torch import Tensor
from transformers import MistralForCausalLM

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TIED = "tied "  # names of kinds on a base with tied embeddings
RESIZED = {"resized": 69, "resized and adapted": 70, "tied resized": 69, "shrunk": 64}

KINDS: dict[str, dict[str, Any]] = {
    "list": {"target_modules": LINEARS},
    "regex": {"target_modules": r".*\.(q|v)_proj"},
    "all-linear": {"target_modules": "all-linear", "exclude_modules": ["down_proj"], "bias": "all"},
    "layers": {"target_modules": LINEARS, "layers_to_transform": [1], "layers_pattern": "layers"},
    "modules": {"target_modules": LINEARS, "modules_to_save": ["embed_tokens", "lm_head"]},
    "norms": {"target_modules": ["k_proj"], "modules_to_save": ["norm", "input_layernorm", "q_proj"]},
    "resized": {"target_modules": LINEARS},
    "resized and adapted": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "shrunk": {"target_modules": LINEARS},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"], "rank_pattern": {"embed_tokens": 3}},
    "dora": {"target_modules": LINEARS, "use_dora": True},
    "dora with rslora": {"target_modules": ["q_proj", "k_proj", "lm_head"], "use_dora": True, "use_rslora": True},
    "bias": {"target_modules": ["q_proj", "k_proj", "o_proj"], "lora_bias": True},
    "tied embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "tied output": {"target_modules": ["q_proj", "lm_head"]},
    "tied module": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "tied modules": {
        "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True,
    },
    "tied resized": {"target_modules": LINEARS},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Saved:
    """What PEFT saved, and its logits of `tokens`, which are longer than twice the window."""

    base: pathlib.Path
    folder: pathlib.Path
    tokens: Tensor
    logits: Tensor


def theirs(base: pathlib.Path) -> MistralForCausalLM:
    return MistralForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()


def trained(model: Any, seed: int = 5) -> Any:
    """Every weight that PEFT saves at random, so that each one affects the logits."""
    draw = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=draw)
        if "lora_magnitude" in name:
            value.data.mul_(1 + 0.2 * noise)
        elif "lora_B" in name and value.dim() == 1:
            value.data.copy_(0.2 * noise)
        elif "lora_" in name:
            value.data.copy_(0.3 * noise / value.shape[1] ** 0.5)
        elif "modules_to_save" in name:
            value.data.add_(0.1 * noise)
    return model.eval()


def save(name: str, root: pathlib.Path) -> Saved:
    """Build the kind `name` on a fresh base and save it under `root`."""
    base, folder = root / "base", root / "adapter"
    args = tiny_args(tie_embeddings=True) if name.startswith(TIED) else TINY
    tiny_model(args).save_pretrained(base)
    model = theirs(base)
    if size := RESIZED.get(name):
        model.resize_token_embeddings(size, mean_resizing=False)
        more = size - TINY.vocab_size
        if more > 0:
            for embedding in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
                rows = torch.randn(more, TINY.dim, generator=torch.Generator().manual_seed(2))
                embedding.data[-more:] = rows / TINY.dim**0.5
    tokens = tokens_of((2, 21), tiny_args(vocab_size=size or TINY.vocab_size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, **KINDS[name]})
        adapted = trained(get_peft_model(model, config))
        adapted.save_pretrained(folder)
    return Saved(base, folder, tokens, adapted(tokens).logits.detach())
