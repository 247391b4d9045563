"""Open any format, save any: Hugging Face's and Mistral's own (names.py has GGUF's names ready).

names         one table of tensor names, and the order of q's and k's rows
config        what both configuration files share: strict JSON, theta and window
huggingface   config.json
mistral       params.json
stored        tensors where they lie in files, mapped and not read
reading       a folder or file -> a checked Checkpoint -> a model
writing       a model or Checkpoint -> a folder, a tensor at a time
hub           a name -> a folder, downloading what is needed (imports no torch)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .reading import load as load
    from .reading import read_args as read_args
    from .writing import convert as convert
    from .writing import save as save

_HOMES = {"load": "reading", "read_args": "reading", "save": "writing", "convert": "writing"}
__all__ = ["convert", "load", "read_args", "save"]


def __getattr__(name: str) -> Any:  # lazy: `checkpoint.hub` is used where torch is not wanted
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
