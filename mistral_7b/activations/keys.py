"""The keys that the queries of a forward pass see, and the attention weights over them.

    weight of key j for query i = softmax over visible j of (q_i . k_j / sqrt(K)), 0 where j is not visible

No attention kernel returns its weights, so they are computed a second time, in float32 at least, from the keys as
the cache stores them. T queries · S keys · H query heads · G key/value heads · K head width
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..attention import visible
from ..cache import Cache, GrowingCache, KernelCache, KeysAndValues, Memory, RollingCache, Stateless
from ..cache.entries import compressed, expanded
from ..errors import InterpretError


class Keys(NamedTuple):
    """Keys with what the visibility rule needs."""

    k: Tensor  # (..., S, G, K)
    v: Tensor
    positions: Tensor  # (..., S); those of empty slots are later than any query's
    mask: Tensor  # (..., T, S), True where a key is visible


class KeyReader(Protocol):
    """Reads the keys of one kind of cache. `read` comes before the memory's `attend`."""

    def before(self, cache: Cache) -> None:
        """Note what the cache holds, before it is extended."""

    def after(self, positions: Tensor, sequence_ids: Tensor | None) -> None:
        """Note the positions of the new tokens."""

    def read(self, memory: Memory, k: Tensor, v: Tensor, part: int) -> Keys:
        """All keys that queries of the new k and v (..., T, G, K) see; they are those of part number `part`."""
        ...


class StoredKeys:
    """Reads the keys of Stateless, GrowingCache and RollingCache. They have one part, the whole."""

    def before(self, cache: Cache) -> None:
        self.positions: Tensor | None = None  # (S,) or, in a ring, (B, S)
        self.ids: Tensor | None = None
        self.int8, self.known = False, True
        match cache:
            case GrowingCache():
                self.positions, self.ids, self.int8 = cache.positions, cache.sequence_ids, cache.int8
            case RollingCache():
                self.positions, self.int8 = cache.positions.clone(), len(cache.layers[0].entries) == 4
            case KernelCache():
                raise InterpretError(
                    "an engine's batch holds other requests, which would be recorded or changed too",
                    hint="use LLM(model).generate(prompts, record=..., steer=...)",
                )
            case _:
                self.known = isinstance(cache, Stateless)
        self.window = getattr(cache, "window", None)

    def after(self, positions: Tensor, sequence_ids: Tensor | None) -> None:
        self.new, self.new_ids = positions, sequence_ids
        self.seen: tuple[Tensor, Tensor] | None = None  # positions of all keys and the mask, made on demand

    def read(self, memory: Memory, k: Tensor, v: Tensor, part: int) -> Keys:
        if not self.known:
            raise InterpretError(
                "attention weights can be read with Stateless, GrowingCache and RollingCache only", field="cache"
            )
        k, v = expanded(compressed(k, v, self.int8), k.dtype)
        if self.positions is not None and isinstance(memory, KeysAndValues):
            old = expanded(memory.entries, k.dtype)
            k, v = (torch.cat(pair, dim=-3) for pair in zip(old, (k, v), strict=True))
        self.seen = self.seen or self._seen()
        return Keys(k, v, *self.seen)

    def _seen(self) -> tuple[Tensor, Tensor]:
        p, s = self.new, self.new_ids
        if self.positions is not None:
            p = torch.cat([self.positions, p], dim=-1)
            s = s if s is None or self.ids is None else torch.cat([self.ids, s])
        return p, visible(self.new, p, self.window, self.new_ids, s)


def attention_weights(q: Tensor, keys: Keys) -> Tensor:
    """Attention weights of q (..., T, H, K) over keys (..., S, G, K): (..., T, H, S), float32 at least."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).unflatten(-2, (keys.k.shape[-2], -1))  # (..., T, G, H/G, K)
    scores = torch.einsum("...tgrk,...sgk->...tgrs", grouped, keys.k.to(wide)) / math.sqrt(q.shape[-1])
    hidden = ~keys.mask[..., :, None, None, :]
    return scores.masked_fill(hidden, -math.inf).softmax(-1).flatten(-3, -2)


def attend_with(weights: Tensor, keys: Keys, dtype: torch.dtype) -> Tensor:
    """Weights (..., T, H, S) times the values (..., S, G, K): (..., T, H, K)."""
    grouped = weights.unflatten(-2, (keys.v.shape[-2], -1))
    return torch.einsum("...tgrs,...sgk->...tgrk", grouped, keys.v.to(weights.dtype)).flatten(-3, -2).to(dtype)


def by_position(weights: Tensor, keys: Keys, length: int) -> Tensor:
    """Weights (..., T, H, S) with a column for each of `length` positions: (..., T, H, length)."""
    columns = _columns(weights, keys, length)
    return weights.new_zeros(*weights.shape[:-1], length).scatter_add(-1, columns, weights)


def by_key(weights: Tensor, keys: Keys) -> Tensor:
    """The inverse of `by_position`: weights (..., T, H, S), 0 for keys that are not visible."""
    shape = torch.empty(1, device=weights.device).expand(*weights.shape[:-1], keys.positions.shape[-1])
    found = weights.gather(-1, _columns(shape, keys, weights.shape[-1]))
    return found * keys.mask[..., :, None, :]


def _columns(weights: Tensor, keys: Keys, length: int) -> Tensor:
    """The position of each key, for each weight; weights of empty slots are 0, whatever their column."""
    return keys.positions.clamp(max=length - 1)[..., None, None, :].expand(weights.shape)
