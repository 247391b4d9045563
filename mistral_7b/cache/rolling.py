"""A ring of slots for each sequence, written in place: constant memory (arXiv:2310.06825, figure 2).

A ring of W = 4 slots after six tokens, position p in slot p mod W:

    slot        0   1   2   3
    position    4   5   2   3      token 6 goes to slot 2, where position 2 has just left the window

With `slack` more slots than the window needs, the last `slack` tokens can be rolled back: the keys that they
overwrote are older than anything that a query at their positions could see.

B sequences · T new tokens · S stored keys · G key/value heads · K head width · W window
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention import Band, attention, banded_attention, bands, visible
from ..errors import CacheError
from ..kernels.attend import Place, Remembered, attend
from ..kernels.backend import ATTENTION, Backend, uses
from ..kernels.cpu import huge_pages
from .contract import KernelCache, KeysAndValues, check_window
from .entries import Described, Entries, check_kv_dtype, compressed, expanded, four

EMPTY = 2**62  # position of an empty slot: later than any query, so never visible


class Slots(NamedTuple):
    """Where the new keys and values go: the last m of T in each row, m = min(T, slots)."""

    row: Tensor  # (B, 1)
    slot: Tensor  # (B, m)

    def write(self, held: Entries, new: Entries) -> None:
        m = self.slot.shape[1]
        for ring, t in zip(held, new, strict=True):
            ring[self.row, self.slot] = t[:, t.shape[1] - m :]


class Decode(NamedTuple):
    """A step of at most slack + 1 tokens, which overwrite only keys that none of them can see."""

    place: Place
    new: Slots
    filled: int  # slots that are in use afterwards
    mask: Tensor | None  # (B, T, filled); None: all visible

    def attend(self, q: Tensor, held: Entries, new: Entries, own: tuple[Tensor, Tensor]) -> Tensor:
        """Write first, then attend over the ring in the order of its slots."""
        self.new.write(held, new)
        return attention(q, *expanded(tuple(t[:, : self.filled] for t in held), q.dtype), self.mask)


class Prefill(NamedTuple):
    """A step of more tokens: its first queries still see keys that its last ones overwrite."""

    place: Place
    new: Slots
    old: Tensor | slice | None  # slots of the stored keys, oldest first; None if there are none
    plan: tuple[Band, ...]  # attention over these and then the new keys

    def attend(self, q: Tensor, held: Entries, new: Entries, own: tuple[Tensor, Tensor]) -> Tensor:
        """Attend first, over the stored and the new keys, then write."""
        k, v = own
        if self.old is not None:
            old = expanded(tuple(t[:, self.old] for t in held), q.dtype)
            k, v = (torch.cat(pair, 1) for pair in zip(old, own, strict=True))
        out = banded_attention(q, k, v, self.plan)
        self.new.write(held, new)
        return out


class RollingCache(Described, KernelCache):
    """A ring of slots for each of B sequences, written in place: constant memory for any number of tokens.

    Position p is in slot p mod slots. With a window there are W + `slack` slots, which are overwritten without
    end. Without one, or with `max_seq_len` < W, there are `max_seq_len` + `slack`, and tokens that do not fit are
    refused. Rows may differ in length: prefill them with `rows(i, j)` and decode all together with tokens (B, T).
    No gradient flows through stored keys and values: train with Stateless or GrowingCache.

    At least `slack` tokens can be rolled back at any time. Steps of up to slack + 1 tokens write before attending;
    longer ones attend first. Without slack, only decode of one token writes first.

    `static` is for compiled or graph-captured decode: every step uses every slot and reads nothing back from the
    device, so shapes never change. The caller must then check that the tokens fit.
    """

    step: Decode | Prefill

    def __init__(
        self,
        n_layers: int,
        n_kv_heads: int,
        head_dim: int,
        window: int | None,
        *,
        batch: int = 1,
        max_seq_len: int = 32768,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        static: bool = False,
        slack: int = 0,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        if slack < 0:
            raise CacheError(
                f"slack must be a number of tokens that can be rolled back, not {slack}", field="slack"
            )
        self.window, self.static, self.slack = check_window(window), static, slack
        self.slots = (max_seq_len if window is None else min(window, max_seq_len)) + slack
        self.positions = torch.full((batch, self.slots), EMPTY, dtype=torch.long, device=device)
        self.length = torch.zeros(batch, dtype=torch.long, device=device)
        self.end = self.length.clone()  # one past the last position ever written
        empty = torch.zeros(batch, self.slots, n_kv_heads, head_dim, dtype=dtype, device=device)
        blank = compressed(empty, empty, check_kv_dtype(kv_dtype))
        self.layers: list[_RollingMemory] = [
            _RollingMemory(self, tuple(huge_pages.copied(t) for t in blank), dtype) for _ in range(n_layers)
        ]

    def writable(self) -> RollingCache:
        return self

    @property
    def place(self) -> Place:
        return self.step.place

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].dtype

    def rows(self, start: int, stop: int) -> RollingCache:
        """A cache of the rows start..stop, on the same memory."""
        part = copy.copy(self)
        part.positions, part.length, part.end = (t[start:stop] for t in (self.positions, self.length, self.end))
        part.layers = [_RollingMemory(part, tuple(t[start:stop] for t in m.entries), m.dtype) for m in self.layers]
        return part

    def extend(self, tokens: Tensor, sequence_ids: Tensor | None = None) -> Tensor:
        if tokens.dim() != 2 or tokens.shape[0] != self.length.shape[0] or sequence_ids is not None:
            raise CacheError(
                f"this rolling cache holds {self.length.shape[0]} rows and takes tokens (B, T) without "
                f"sequence ids, not {tuple(tokens.shape)}; packed tokens go with GrowingCache",
                field="tokens",
            )
        T, slots = tokens.shape[1], self.slots
        decoding = self.slack + 1 >= T
        lengths = [] if self.static and decoding else self.length.tolist()
        self._check_fit(T, lengths)
        new_p = self.length[:, None] + torch.arange(T, device=self.length.device)  # (B, T)
        start = self.length.clone()
        place = Place(start, start - (self.end - slots).clamp(min=0), slots)
        # A prefill longer than the ring leaves only its last tokens there: the rest would collide.
        last = new_p[:, T - min(T, slots) :]
        new = Slots(torch.arange(len(last), device=last.device)[:, None], last % slots)
        if decoding:
            self.positions.scatter_(1, new.slot, last)
            self.step = self._decode(place, new, new_p, lengths)
        else:
            self.step = self._prefill(place, new, new_p, lengths)
            self.positions.scatter_(1, new.slot, last)
        self.length += T
        torch.maximum(self.end, self.length, out=self.end)
        return new_p

    def _check_fit(self, T: int, lengths: list[int]) -> None:
        """CacheError if tokens do not fit a ring that may not overwrite: without a window, or shorter than one."""
        endless = self.window is not None and self.slots == self.window + self.slack
        if lengths and not endless and max(lengths) + T > self.slots:
            raise CacheError(
                f"{max(lengths)} tokens and {T} more do not fit a context of {self.slots}",
                field="tokens",
                hint=f"make the cache with max_seq_len >= {max(lengths) + T}",
            )

    def _decode(self, place: Place, new: Slots, new_p: Tensor, lengths: list[int]) -> Decode:
        T = new_p.shape[1]
        filled = min(max(lengths) + T, self.slots) if lengths else self.slots
        # One token per row, all rows of one length: no mask is needed while the slots hold at most W keys.
        equal = bool(lengths) and min(lengths) == max(lengths)
        if equal and T == 1 and (self.slack == 0 or self.window is None or lengths[0] < self.window):
            return Decode(place, new, filled, None)
        return Decode(place, new, filled, visible(new_p, self.positions[:, :filled], self.window))

    def _prefill(self, place: Place, new: Slots, new_p: Tensor, lengths: list[int]) -> Prefill:
        if min(lengths) == max(lengths):
            n, T = lengths[0], new_p.shape[1]
            held = min(n, self.window or self.slots)
            old_p = torch.arange(n - held, n, device=new_p.device)
            p_q = torch.arange(n, n + T, device=new_p.device)
            plan = bands(p_q, torch.cat([old_p, p_q]), self.window, consecutive=True)
            return Prefill(place, new, old_p % self.slots if held else None, plan)
        # Rows of different lengths: all slots in order; positions alone decide which keys are visible.
        p_k = torch.cat([self.positions, new_p], dim=1)
        return Prefill(place, new, slice(None), bands(new_p, p_k, self.window, ordered=False))

    def rollback(self, n: int | Tensor) -> None:
        """Remove the last n tokens of every row, or n[b] of row b: (B,).

        CacheError, with nothing changed, if keys that they overwrote are needed. Up to `slack` tokens can always
        be rolled back, counted from the longest that a row has ever been.
        """
        counts = torch.as_tensor(n, device=self.length.device).expand_as(self.length)
        kept = self.length - counts
        overwritten = self.end - self.slots  # positions below are overwritten
        needed = (kept - (self.window or 0)).clamp(min=0)  # without a window nothing is overwritten
        if bool(((counts < 0) | (kept < 0) | ((counts > 0) & (needed < overwritten))).any()):
            shortest, longest = int(self.length.min()), int(self.length.max())
            raise CacheError(
                f"cannot roll back {n if isinstance(n, int) else n.tolist()} tokens of {shortest}..{longest} in a "
                f"ring of {self.slots}: the keys they overwrote are needed; it was made with slack={self.slack}",
                field="n",
            )
        self.length -= counts
        self.positions.masked_fill_(self.positions >= self.length[:, None], EMPTY)


class _RollingMemory(KeysAndValues):
    """One layer of a RollingCache: entries (B, slots, G, K), for a model whose type is `dtype`."""

    def __init__(self, cache: RollingCache, entries: Entries, dtype: torch.dtype) -> None:
        self.cache, self.entries, self.dtype = cache, entries, dtype

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if k.dtype != self.dtype:
            raise CacheError(
                f"this cache stores {self.dtype} and was given {k.dtype}",
                field="cache",
                hint="make it with the model's type",
            )
        if k.shape[-2:] != self.k.shape[-2:]:  # the kernel would write out of bounds
            raise CacheError(
                f"this cache stores {tuple(self.k.shape[-2:])} keys (heads, width) and was given "
                f"{tuple(k.shape[-2:])}",
                field="cache",
                hint="make it with the model's shape",
            )
        step, held = self.cache.step, self.entries
        # Detached, because the ring would keep every step's autograd graph.
        new = compressed(k.detach(), v.detach(), len(held) == 4)
        if uses(Backend.CPU, ATTENTION, q):
            return attend(q, *four(new), Remembered(*four(held), step.place), self.cache.window, keep=True)
        # Without int8, the new keys keep their gradient within the forward.
        return step.attend(q, held, new, (k, v) if len(held) == 2 else expanded(new, q.dtype))
