"""Read and write checkpoints: Hugging Face, Mistral, GGUF and quantized formats.

names        one table of tensor names, and the row order of wq and wk
config       helpers shared by both configuration files: strict JSON, theta, window
huggingface  config.json
mistral      params.json
rope         a scaled rotary embedding in config.json and GGUF
packing      quantization_config of GPTQ, AWQ and compressed-tensors
packed       their tensors, dequantized one matrix at a time
others       what a folder or file is that holds no checkpoint
stored       tensors in memory-mapped files, loaded lazily
gguf/        GGUF: container, tensors, tokenizer, chat templates
reading      a folder or file -> a validated Checkpoint -> a model
writing      a model or Checkpoint -> a folder or file, one tensor at a time
json_files   the small files beside weights, as text and JSON (imports no torch)
chat_templates       the chat templates of a folder
generation_settings  a model's own sampling settings, from a folder or a GGUF file
tokenizer_files  the tokenizer's files beside weights, carried from one layout to another
quantized    read a quantized folder
quantizing   write a quantized folder, one layer at a time, and measure its distance from the original
hub          a name -> a local path, downloading what is needed (imports no torch)
starter      the model "starter", downloaded with pip (imports no torch)
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

_MODULES = {
    "load": "reading",
    "read_args": "reading",
    "read_record": "quantized",
    "save": "writing",
    "convert": "writing",
    "quantize": "quantizing",
}
__all__ = ["convert", "load", "quantize", "read_args", "read_record", "save"]


def __getattr__(name: str) -> Any:  # lazy: importing `checkpoint.hub` must not import torch
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
