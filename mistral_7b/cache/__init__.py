"""All state of the model, behind two methods.

    cache.extend(tokens) -> positions    once per forward: makes space, returns the tokens' absolute positions
    memory.attend(q, k, v) -> out        once per layer: stores k and v, attends

The model zips its layers with `cache.layers`, so no layer knows its index. Keys are stored rotated, each with its
absolute position, so nothing is ever un-rotated, and visibility depends on positions alone (attention.py).
`extend` computes once what all layers need and keeps it as the cache's `step`, which the memories read.

    contract    Cache, Memory and KernelCache: the interface for the model and the kernels
    entries     keys and values as they are stored: in the model's type or in int8
    sequences   positions of packed tokens that belong to several sequences
    stateless   stores nothing: training
    growing     stores and concatenates; immutable: `model(tokens)`
    rolling     a ring of slots, written in place (paper, figure 2)

The engine's cache over pages is engine/batch.py.
"""

from __future__ import annotations

from .contract import Cache, KernelCache, KeysAndValues, Memory, check_fit
from .growing import GrowingCache
from .rolling import RollingCache
from .stateless import Stateless

__all__ = [
    "Cache", "GrowingCache", "KernelCache", "KeysAndValues", "Memory", "RollingCache", "Stateless", "check_fit",
]  # fmt: skip
