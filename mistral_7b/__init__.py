"""Mistral 7B in PyTorch: readable, exact and fast at once."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.async_llm import AsyncLLM as AsyncLLM
    from .engine.config import EngineConfig as EngineConfig
    from .engine.config import GrammarLimits as GrammarLimits
    from .engine.llm import LLM as LLM
    from .errors import Mistral7BError as Mistral7BError
    from .model import Mistral7B as Mistral7B
    from .model import ModelArgs as ModelArgs
    from .sampling.params import SamplingParams as SamplingParams
    from .sampling.params import StructuredOutputs as StructuredOutputs
    from .text.tokenizer import Tokenizer as Tokenizer

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
    **dict.fromkeys(
        (
            "Mistral7BError", "ConfigError", "CacheError", "CheckpointError", "HubError",
            "QuantizationError", "TokenizerError", "SamplingError", "GenerationError", "TrainingError",
            "EvaluationError", "BenchmarkError", "EngineError", "QueueFullError", "GrammarError", "AdapterError",
            "WriteError",
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
