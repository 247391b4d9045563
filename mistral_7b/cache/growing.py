"""A cache that concatenates keys and values. Callers see it as immutable: see GrowingCache."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention import Band, banded_attention, bands
from ..errors import CacheError
from ..kernels.attend import Place, Remembered, attend
from ..kernels.backend import ATTENTION, Backend, uses
from .contract import KeysAndValues, check_window
from .entries import Described, Entries, check_kv_dtype, compressed, expanded, four
from .sequences import run_positions, still_visible


class GrowingStep(NamedTuple):
    """What all layers share in one forward."""

    plan: tuple[Band, ...]  # attention of the new queries over the stored and the new keys
    kept: Tensor | slice  # which of these keys are kept afterwards
    place: Place | None  # the stored keys, for the kernels; None for packed tokens


class GrowingCache(Described):
    """Concatenates keys and values; with a window it keeps the last W of them.

    Immutable: `model(tokens, cache)` does not change its argument, so one prefix can be continued twice. It holds
    tokens (B, T), with rows of equal length, or packed tokens (T,) with a sequence id each, in any order.
    """

    def __init__(self, n_layers: int, window: int | None, kv_dtype: torch.dtype | None = None) -> None:
        self.window, self.int8 = check_window(window), check_kv_dtype(kv_dtype)
        self.batch: torch.Size | None = None  # (B,) or (); None while empty
        self.length = 0  # tokens so far, with those that have left the window
        self.positions: Tensor | None = None  # (S,)
        self.sequence_ids: Tensor | None = None  # (S,), packed only
        self.layers: list[_GrowingMemory] = [_GrowingMemory(self) for _ in range(n_layers)]
        self.step = GrowingStep((), slice(None), None)

    def writable(self) -> GrowingCache:
        other = copy.copy(self)
        other.layers = [_GrowingMemory(other, m.entries) for m in self.layers]
        return other

    def extend(self, tokens: Tensor, sequence_ids: Tensor | None = None) -> Tensor:
        self._check(tokens, sequence_ids)
        self.batch = tokens.shape[:-1]
        old_p, old_s = self.positions, self.sequence_ids
        if sequence_ids is None:
            new_p = torch.arange(self.length, self.length + tokens.shape[-1], device=tokens.device)
        else:
            new_p = run_positions(sequence_ids)
            if old_p is not None and old_s is not None:
                same = sequence_ids[:, None] == old_s  # (T, S)
                new_p = new_p + torch.where(same, old_p + 1, 0).amax(-1)
        p = new_p if old_p is None else torch.cat([old_p, new_p])
        s = sequence_ids if old_s is None or sequence_ids is None else torch.cat([old_s, sequence_ids])
        packed = s is not None
        plan = bands(new_p, p, self.window, sequence_ids, s, ordered=not packed, consecutive=not packed)
        kept: Tensor | slice = slice(None)
        if self.window is not None and p.shape[0] > self.window:
            kept = slice(-self.window, None) if s is None else still_visible(p, s, self.window)
        self.step = GrowingStep(plan, kept, None if packed else self._place(tokens))
        self.positions, self.sequence_ids = p[kept], None if s is None else s[kept]
        self.length += tokens.shape[-1]
        return new_p

    def _check(self, tokens: Tensor, sequence_ids: Tensor | None) -> None:
        """CacheError for tokens that cannot follow the stored ones."""
        if self.positions is not None and (sequence_ids is None) != (self.sequence_ids is None):
            raise CacheError(
                "this cache was started {} sequence ids and must continue so".format(
                    "without" if self.sequence_ids is None else "with"
                ),
                field="sequence_ids",
            )
        if sequence_ids is not None and tokens.dim() != 1:
            raise CacheError(
                "sequence ids go with packed tokens (T,); the rows of a rectangle need none", field="sequence_ids"
            )
        if self.batch not in (None, tokens.shape[:-1]):
            raise CacheError(
                f"this cache was started with tokens ({', '.join(map(str, [*self.batch, 'T']))}) and cannot "
                f"continue with {tuple(tokens.shape)}",
                field="tokens",
            )

    def _place(self, tokens: Tensor) -> Place:
        """Where the stored keys are: consecutive, from position `length - held` on."""
        B, held = tokens.shape[:-1].numel(), 0 if self.positions is None else len(self.positions)
        start, before = (torch.full((B,), n, device=tokens.device) for n in (self.length, held))
        return Place(start, before, held or tokens.shape[-1], self.length - held)

    def rollback(self, n: int) -> None:
        """Remove the last n tokens, in place. CacheError if keys that they pushed out are needed."""
        held = 0 if self.positions is None else self.positions.shape[0]
        if self.sequence_ids is not None:
            raise CacheError(
                "a packed cache cannot be rolled back: its sequences end at different positions", field="n"
            )
        if not 0 <= n <= held or (held < self.length and n > 0):
            raise CacheError(
                f"cannot roll back {n} of {self.length} tokens: the keys before them have left the window",
                field="n",
            )
        if n and self.positions is not None:
            self.positions = self.positions[: held - n]
            self.length -= n
            for m in self.layers:
                m.entries = tuple(t[..., : held - n, :, :] for t in m.entries)


class _GrowingMemory(KeysAndValues):
    """One layer of a GrowingCache: entries (..., S, G, K), empty at first."""

    def __init__(self, cache: GrowingCache, entries: Entries = ()) -> None:
        self.cache, self.entries = cache, entries

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache, step, old = self.cache, self.cache.step, self.entries
        new = compressed(k, v, cache.int8)
        held = tuple(torch.cat(pair, dim=-3) for pair in zip(old, new, strict=True)) if old else new
        if step.place is not None and uses(Backend.CPU, ATTENTION, q):
            out = _attend_by_kernel(q, new, old or new, step.place, cache.window)
        else:
            out = banded_attention(q, *expanded(held, q.dtype), step.plan)
        self.entries = tuple(t[..., step.kept, :, :] for t in held)
        if held[0].shape[-3] > 2 * self.entries[0].shape[-3]:  # a view would keep a long prompt alive
            self.entries = tuple(t.clone() for t in self.entries)
        return out


def _attend_by_kernel(q: Tensor, new: Entries, old: Entries, place: Place, window: int | None) -> Tensor:
    if q.dim() == 3:
        new, old = (tuple(t[None] for t in entries) for entries in (new, old))
        return _attend_by_kernel(q[None], new, old, place, window)[0]
    old = tuple(t.contiguous() for t in old)  # the kept entries are a view
    return attend(q, *four(new), Remembered(*four(old), place), window)
