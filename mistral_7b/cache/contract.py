"""What the model, the kernels and the engine ask of a cache: two verbs.

    tokens --- cache.extend ---> positions             once per forward
    q, k, v -- memory.attend --> attention's output    once per layer, which also remembers k and v

B sequences · T new tokens · S keys held · G key/value heads · H query heads · K head width · W window
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
        """Remember k, v (..., T, G, K), and return what q (..., T, H, K) sees: (..., T, H, K)."""
        ...


class Cache(Protocol):
    """What the model asks of a cache."""

    @property
    def layers(self) -> Iterable[Memory]: ...

    def writable(self) -> Cache:
        """The cache that the next forward extends: a copy of a cache that is a value, otherwise itself."""
        ...

    def extend(self, tokens: Tensor, sequence_ids: Tensor | None = None) -> Tensor:
        """Make room for tokens (..., T) and return their absolute positions, broadcastable to them."""
        ...


class KeysAndValues(ABC):
    """One layer's memory that is made of tensors: keys and values, in int8 their scales too."""

    entries: Entries

    @property
    def k(self) -> Tensor:
        """Keys as they are kept, (..., S, G, K)."""
        return self.entries[0]

    @property
    def v(self) -> Tensor:
        """Values as they are kept, (..., S, G, K)."""
        return self.entries[1]

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class KernelCache(ABC):
    """A cache that the kernels read and write in place: all blocks can run over it in one call."""

    window: int | None
    layers: Sequence[KeysAndValues]

    @property
    @abstractmethod
    def place(self) -> Place:
        """Where the keys and values of every layer lie, for the tokens of the last `extend`."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The type of the model that it is for."""

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
            f"a cache of {held} layers is not for this model of {n_layers}",
            field="cache",
            hint="make a cache for it",
        )


def check_window(window: int | None) -> int | None:
    """Return `window`. CacheError if no query could see even its own key."""
    if window is not None and window < 1:
        raise CacheError(
            f"a window of {window} keys shows nothing: it must be at least 1, or None for all keys", field="window"
        )
    return window
