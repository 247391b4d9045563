"""What lies between RoPE and wo: all state of the model, in two verbs.

    cache.extend(tokens) -> positions    once per forward: makes room, says where the tokens stand
    memory.attend(q, k, v) -> out        once per layer: remembers k and v, attends

A cache hands out its layers' memories in `cache.layers`, which the model zips with its own layers: no layer knows
its index. Keys are remembered already rotated, and each with its absolute position, so nothing is ever un-rotated,
and what is visible is decided by position alone (attention.py). `extend` computes once what all layers need and
keeps it as the cache's `step`, an immutable value that the memories read.

    contract    Cache, Memory and KernelCache: what the model and the kernels ask of a cache
    entries     keys and values as they are kept: in the model's type or in int8
    sequences   positions of packed tokens that belong to several sequences
    stateless   keeps nothing: training
    growing     keeps and concatenates; a value: `model(tokens)`
    rolling     a ring of slots, written in place (paper, figure 3)

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
