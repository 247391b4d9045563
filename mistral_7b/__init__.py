"""Mistral 7B in PyTorch: readable, exact and fast at once."""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.async_llm import AsyncLLM as AsyncLLM
    from .engine.config import EngineConfig as EngineConfig
    from .engine.config import GrammarLimits as GrammarLimits
    from .engine.llm import LLM as LLM
    from .errors import Mistral7BError as Mistral7BError
    from .generate import generate as generate
    from .generate import stream as stream
    from .model import Mistral7B as Mistral7B
    from .model import ModelArgs as ModelArgs
    from .sampling.params import SamplingParams as SamplingParams
    from .sampling.params import StructuredOutputs as StructuredOutputs
    from .text.tokenizer import Tokenizer as Tokenizer
    from .training.finetune_args import FinetuneArgs as FinetuneArgs
    from .training.finetuning import finetune as finetune

__version__ = "0.1.0"

# Name -> the room it lives in. Looked up on first use, so that importing the package costs no torch.
_HOMES = {
    "Mistral7B": "model",
    "ModelArgs": "model",
    "Tokenizer": "text.tokenizer",
    "SamplingParams": "sampling.params",
    "LLM": "engine.llm",
    "AsyncLLM": "engine.async_llm",
    "EngineConfig": "engine.config",
    "GrammarLimits": "engine.config",
    "StructuredOutputs": "sampling.params",
    "generate": "generate",
    "stream": "generate",
    "finetune": "training.finetuning",
    "FinetuneArgs": "training.finetune_args",
    **dict.fromkeys(
        (
            "Mistral7BError", "ConfigError", "CacheError", "CheckpointError", "HubError",
            "QuantizationError", "TokenizerError", "SamplingError", "GenerationError", "TrainingError",
            "EvaluationError", "BenchmarkError", "EngineError", "QueueFullError", "GrammarError", "AdapterError",
            "WriteError", "InterpretError",
        ),
        "errors",
    ),
}  # fmt: skip
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(types.ModuleType):
    """The package, whose name `generate` is the function, also after the submodule generate.py was imported.

    The import system binds a submodule to its name in the package; this property takes precedence over it.
    """

    @property
    def generate(self) -> Any:
        return importlib.import_module(".generate", __name__).generate

    @generate.setter
    def generate(self, module: types.ModuleType) -> None:
        """Called by the import of the submodule, which remains in sys.modules."""


sys.modules[__name__].__class__ = _Package
