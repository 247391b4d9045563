"""Evaluate a model, verify its files, and compare it with its original.

perplexity   perplexity and bits per byte of documents
sliding      perplexity of a text file of any size, resumable
fidelity     the distance of a quantized, adapted or merged model from its original
comparison/  compare(): two models in any format; whether their distance is noise, and the cause if not
scoring      scores of given tokens on the engine, with shared prefixes and equal bits in any batch
harness      tasks of lm-eval on the engine
passkey      retrieval over long contexts; passkey_plot draws it
verify       what is wrong with the files of a model
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .fidelity import Distance as Distance
from .fidelity import distance as distance
from .perplexity import Perplexity as Perplexity
from .perplexity import perplexity as perplexity

if TYPE_CHECKING:
    from .comparison.run import compare as compare
    from .harness import evaluate as evaluate
    from .passkey import retrieve as retrieve
    from .sliding import sliding_perplexity as sliding_perplexity
    from .verify import verify_model as verify_model

_MODULES = {
    "compare": "comparison.run",
    "evaluate": "harness",
    "retrieve": "passkey",
    "sliding_perplexity": "sliding",
    "verify_model": "verify",
}
__all__ = [
    "Distance", "Perplexity", "compare", "distance", "evaluate", "perplexity", "retrieve", "sliding_perplexity",
    "verify_model",
]  # fmt: skip


def __getattr__(name: str) -> Any:  # lazy: lm-eval takes seconds to import
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
