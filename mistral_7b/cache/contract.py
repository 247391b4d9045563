"""The interface of a cache: two methods for the model, and the memory layout for kernels.

    tokens --- cache.extend ---> positions             once per forward
    q, k, v -- memory.attend --> attention's output    once per layer, which also stores k and v

B sequences · T new tokens · S stored keys · G key/value heads · H query heads · K head width · W window
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from ..errors import CacheError
from ..kernels.attend import Place
from .entries import Entries


class Memory(Protocol):
    """One layer's share of a cache."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k, v (..., T, G, K), and return the attention of q (..., T, H, K): (..., T, H, K)."""
        ...


class Cache(Protocol):
    """The cache interface that the model uses."""

    @property
    def layers(self) -> Iterable[Memory]: ...

    def writable(self) -> Cache:
        """The cache that the next forward extends: a copy of an immutable cache, otherwise itself."""
        ...

    def extend(self, tokens: Tensor, sequence_ids: Tensor | None = None) -> Tensor:
        """Make space for tokens (..., T) and return their absolute positions, broadcastable to them."""
        ...


class KeysAndValues(ABC):
    """One layer's keys and values as tensors; in int8 with their scales."""

    entries: Entries

    @property
    def k(self) -> Tensor:
        """Keys as they are stored, (..., S, G, K)."""
        return self.entries[0]

    @property
    def v(self) -> Tensor:
        """Values as they are stored, (..., S, G, K)."""
        return self.entries[1]

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class KernelCache(ABC):
    """A cache that kernels read and write in place, so that all blocks can run in one call."""

    window: int | None
    layers: Sequence[KeysAndValues]

    @property
    @abstractmethod
    def place(self) -> Place:
        """Where each layer stores keys and values, for the tokens of the last `extend`."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of queries and outputs; stored entries may be int8."""

    @abstractmethod
    def writable(self) -> KernelCache: ...

    @abstractmethod
    def extend(self, tokens: Tensor, sequence_ids: Tensor | None = None) -> Tensor: ...


def check_fit(cache: Cache, n_layers: int, tokens: Tensor, sequence_ids: Tensor | None) -> None:
    """CacheError for tokens or a cache that do not fit a model of n_layers."""
    if tokens.dim() == 0 or tokens.shape[-1] == 0:
        raise CacheError("no tokens: a forward pass needs at least one, as (B, T) or (T,)", field="tokens")
    if sequence_ids is not None and sequence_ids.shape != tokens.shape:
        shapes = f"{tuple(sequence_ids.shape)} ids for tokens {tuple(tokens.shape)}"
        raise CacheError(f"each token needs the id of its sequence, not {shapes}", field="sequence_ids")
    if (held := sum(1 for _ in islice(cache.layers, n_layers))) < n_layers:
        raise CacheError(
            f"the cache has {held} layers and the model {n_layers}",
            field="cache",
            hint="make the cache for this model",
        )


def check_window(window: int | None) -> int | None:
    """Return `window`. CacheError if no query could see even its own key."""
    if window is not None and window < 1:
        raise CacheError(
            f"a window of {window} keys shows nothing: it must be at least 1, or None for all keys", field="window"
        )
    return window
