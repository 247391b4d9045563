"""Evaluate a model, and compare it with its original.

perplexity   perplexity and bits per byte of texts
fidelity     the distance of a quantized, adapted or merged model from its original
comparison/  compare(): two models in any format; whether their distance is noise, and the cause if not
"""

import importlib
from typing import TYPE_CHECKING, Any

from .fidelity import Distance as Distance
from .fidelity import distance as distance
from .perplexity import Perplexity as Perplexity
from .perplexity import perplexity as perplexity

if TYPE_CHECKING:
    from .comparison.run import compare as compare

_MODULES = {"compare": "comparison.run"}


def __getattr__(name: str) -> Any:  # lazy: a comparison opens files of every format
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
