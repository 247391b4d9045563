"""LoRA adapters: y = W x + scale B (A x).

files      read and write adapter files: PEFT, mistral-finetune and llama.cpp
peft       PEFT's adapter_config.json: scales, and what is refused
gguf       llama.cpp's adapters
adapters   many adapters of one model in memory, a different one for each row of a forward
applied    one adapter of any kind over a whole model
trainable  an adapter that is trained, around any Linears
bases      the weights that an adapter is merged into
merging    an adapter merged into a checkpoint, with its measured distance
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .applied import apply as apply
    from .files import read_adapter as read_adapter
    from .files import save_adapter as save_adapter
    from .merging import merge as merge

_MODULES = {"apply": "applied", "merge": "merging", "read_adapter": "files", "save_adapter": "files"}
__all__ = ["apply", "merge", "read_adapter", "save_adapter"]


def __getattr__(name: str) -> Any:  # lazy: importing `lora` must not import torch
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
