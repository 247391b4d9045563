"""Facts about the loaded model that /v1/models reports: the precision of its weights, and its chat template."""

from __future__ import annotations

import json
from pathlib import Path

from ...checkpoint.hub import DEMO
from ...model import Mistral7B
from ...quantization.gpu import Fp8Linear, GpuInt4Linear, GpuInt8Linear
from ...quantization.linear import BlockLinear, Int4Linear, Int8Linear

NAMES = {Int8Linear: "int8", GpuInt8Linear: "int8", Int4Linear: "int4", GpuInt4Linear: "int4", Fp8Linear: "fp8"}


def precision(model: Mistral7B) -> str:
    """The weights' quantization, such as "int8", or their type if they are not quantized, such as "bfloat16"."""
    for module in model.modules():
        if isinstance(module, BlockLinear):
            return module.kind
        if type(module) in NAMES:
            return NAMES[type(module)]
    return str(model.norm.weight.dtype).removeprefix("torch.")


def has_chat_template(source: Path | None) -> bool | None:
    """Whether the model's files define a chat template; False marks a base model, None means unknown.

    Only files in the layout of Hugging Face tell the two apart.
    """
    if source is None:
        return None
    if source.resolve() == DEMO.resolve():
        return False
    folder = source if source.is_dir() else source.parent
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return bool(config.get("chat_template")) if isinstance(config, dict) else None
