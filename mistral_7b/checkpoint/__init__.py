"""Open any format, save any: Hugging Face's, Mistral's own, GGUF, quantised.

names           one table of tensor names, and the order of q's and k's rows
config          what both configuration files share: strict JSON, theta and window
huggingface     config.json
mistral         params.json
stored          tensors where they lie in files, mapped and not read
gguf_file       GGUF's container: header, metadata, table of tensors (imports no torch)
gguf_blocks     its quantised blocks, to values and back
gguf            its keys -> ModelArgs, and its tensors where they lie
gguf_tokenizer  the tokenizer inside it, as a SentencePiece model and back (imports no torch)
gguf_writing    the one file, a tensor at a time
chat_templates  the templates in it, for llama.cpp; chat_template_json is their part that rereads JSON
reading         a folder or file -> a checked Checkpoint -> a model
writing         a model or Checkpoint -> a folder or file, a tensor at a time
quantized       what a quantised folder holds, and opening it
quantizing      a model or Checkpoint -> a quantised folder, a layer at a time, and its distance from the original
adapter         LoRA adapters: PEFT's folders, mistral-finetune's files, and writing them
hub             a name -> a folder or file, downloading what is needed (imports no torch)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .quantized import read_record as read_record
    from .quantizing import quantize as quantize
    from .reading import load as load
    from .reading import read_args as read_args
    from .writing import convert as convert
    from .writing import save as save

_HOMES = {
    "load": "reading",
    "read_args": "reading",
    "read_record": "quantized",
    "save": "writing",
    "convert": "writing",
    "quantize": "quantizing",
}
__all__ = ["convert", "load", "quantize", "read_args", "read_record", "save"]


def __getattr__(name: str) -> Any:  # lazy: `checkpoint.hub` is used where torch is not wanted
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
