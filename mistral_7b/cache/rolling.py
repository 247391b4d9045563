"""What lies between RoPE and wo: all state of the model, in two verbs.

    cache.extend(tokens) -> positions    once per forward: makes room, says where the tokens stand
    memory.attend(q, k, v) -> out        once per layer: remembers k and v, attends

A cache hands its layers' memories out in `cache.layers`, which the model zips with its own layers: no
layer knows its index. Keys are remembered already rotated, and each with its absolute position, so
nothing is ever un-rotated, and what is visible is decided by position alone (attention.py).

    B sequences · T new tokens · S keys held · G key/value heads · K head width · W window

A ring of W = 4 slots after six tokens, position p in slot p mod W (paper, figure 3):

    slot        0   1   2   3
    position    4   5   2   3      token 6 goes to slot 2, where position 2 has just left the window

With `slack` more slots than the window needs, the last `slack` tokens can be taken back: what they
overwrote is older than anything that a query in their place could see.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import islice, repeat
from typing import Protocol

import torch
from torch import Tensor

from .attention import Band, attention, banded_attention, bands, visible
from .errors import CacheError
from .kernels.attend import Place, Remembered, attend, quantize_kv
from .kernels.backend import ATTENTION, Backend, uses
from .kernels.cpu import huge_pages

EMPTY = 2**62  # the position of a slot that holds nothing: later than any query, so never visible


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
        """The cache to go on with: a copy where a cache is a value, itself where it is a place."""
        ...

    def extend(self, tokens: Tensor, sequence_ids: Tensor | None = None) -> Tensor:
        """Make room for tokens (..., T) and return their absolute positions, broadcastable to them."""
        ...


def check_fit(cache: Cache, n_layers: int, tokens: Tensor, sequence_ids: Tensor | None) -> None:
    """CacheError for tokens or a cache that cannot go through a model of so many layers."""
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
    """The window as it was given. CacheError if no query could see even its own key."""
    if window is not None and window < 1:
        raise CacheError(
            f"a window of {window} keys shows nothing: it must be at least 1, or None for all keys", field="window"
        )
    return window


def run_positions(sequence_ids: Tensor) -> Tensor:
    """For each token the number of earlier ones with its id: (..., T) ids to (..., T) positions."""
    sorted_ids, order = torch.sort(sequence_ids, dim=-1, stable=True)
    place = torch.arange(sorted_ids.shape[-1], device=sorted_ids.device).expand_as(sorted_ids)
    starts = torch.searchsorted(sorted_ids, sorted_ids)  # where each id's run begins
    return torch.empty_like(place).scatter(-1, order, place - starts)


def interleaved(sequence_ids: Tensor) -> bool:
    """Whether any of the ids (..., T) comes back after another, so that its tokens are not one run."""

    def runs(ids: Tensor) -> Tensor:
        return (ids[..., 1:] != ids[..., :-1]).sum(-1)

    return bool((runs(sequence_ids) != runs(sequence_ids.sort(-1).values)).any())


def still_visible(positions: Tensor, sequence_ids: Tensor, window: int) -> Tensor:
    """Which of the keys (S,) lie among the last W of their own sequence: their places, in order."""
    ids, row = torch.unique(sequence_ids, return_inverse=True)
    last = torch.zeros_like(ids, dtype=positions.dtype).scatter_reduce(0, row, positions, "amax")
    return (positions > last[row] - window).nonzero().squeeze(1)


Entries = tuple[Tensor, ...]  # k and v (..., S, G, K); in int8 also their scales (..., S, G, 1)


def check_kv_dtype(kv_dtype: torch.dtype | None) -> bool:
    """Whether keys and values are kept in int8. CacheError for a type that they cannot be kept in."""
    if kv_dtype not in (None, torch.int8):
        raise CacheError(
            f"kv_dtype is torch.int8, or None for the model's own type, not {kv_dtype}", field="kv_dtype"
        )
    return kv_dtype == torch.int8


def compressed(k: Tensor, v: Tensor, int8: bool) -> Entries:
    """Keys and values (..., T, G, K) as they are kept."""
    if not int8:
        return k, v
    (k, k_scale), (v, v_scale) = quantize_kv(k), quantize_kv(v)
    return k, v, k_scale, v_scale


def expanded(entries: Entries, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values as they are attended to."""
    if len(entries) == 2:
        return entries[0], entries[1]
    k, v, k_scale, v_scale = entries
    return (k * k_scale).to(dtype), (v * v_scale).to(dtype)


class Stateless:
    """Causal, windowed attention that keeps nothing: for training, and for one forward alone.

    `sequence_ids` (in `extend`, of the tokens' shape) isolate documents packed into one row: each id
    must lie in one run (documents one after another, never interleaved). Positions restart with each.
    """

    def __init__(self, window: int | None) -> None:
        self.window = check_window(window)
        self.plan: list[Band] = []

    @property
    def layers(self) -> Iterable[Memory]:
        return repeat(self)

    def writable(self) -> Stateless:
        return self

    def extend(self, tokens: Tensor, sequence_ids: Tensor | None = None) -> Tensor:
        if sequence_ids is None:
            positions = torch.arange(tokens.shape[-1], device=tokens.device)
        else:
            # Asked of the values, which a compiled graph cannot do: there it is the caller's promise.
            if self.window is not None and not torch.compiler.is_compiling() and interleaved(sequence_ids):
                raise CacheError(
                    "sequence ids come back after another: with Stateless the tokens of one sequence must lie "
                    "together; GrowingCache takes them in any order",
                    field="sequence_ids",
                )
            positions = run_positions(sequence_ids)
        self.plan = bands(
            positions, positions, self.window, sequence_ids, sequence_ids, consecutive=sequence_ids is None
        )
        return positions

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return banded_attention(q, k, v, self.plan)


class GrowingCache:
    """Keeps k and v and concatenates; with a window, no more than the last W of them.

    A value: `model(tokens, cache)` leaves the cache it was given as it was, so that one prefix can be
    continued twice. Holds a rectangle (B, T), whose rows march together, or packed tokens (T,) with a
    sequence id each, in any order and mixture.
    """

    def __init__(self, n_layers: int, window: int | None, kv_dtype: torch.dtype | None = None) -> None:
        self.window, self.int8 = check_window(window), check_kv_dtype(kv_dtype)
        self.batch: torch.Size | None = None  # (B,) or (), once begun
        self.length = 0  # tokens seen so far, those included that have left the window
        self.positions: Tensor | None = None  # (S,)
        self.sequence_ids: Tensor | None = None  # (S,), packed only
        self.layers: list[_GrowingMemory] = [_GrowingMemory(self) for _ in range(n_layers)]
        self.plan: list[Band] = []
        self.kept: Tensor | slice = slice(None)
        self.start = self.held = torch.empty(0)  # (B,): the first new position, and how many are held before it
        self.origin = 0  # the position of the first key held

    def writable(self) -> GrowingCache:
        copy = GrowingCache(0, self.window, torch.int8 if self.int8 else None)
        copy.batch = self.batch
        copy.length, copy.positions, copy.sequence_ids = self.length, self.positions, self.sequence_ids
        copy.layers = [_GrowingMemory(copy, m.entries) for m in self.layers]
        return copy

    def extend(self, tokens: Tensor, sequence_ids: Tensor | None = None) -> Tensor:
        if self.positions is not None and (sequence_ids is None) != (self.sequence_ids is None):
            raise CacheError(
                "this cache was begun {} sequence ids and must continue so".format(
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
                f"this cache was begun with tokens ({', '.join(map(str, [*self.batch, 'T']))}) and cannot "
                f"continue with {tuple(tokens.shape)}",
                field="tokens",
            )
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
        packed = sequence_ids is not None
        self.plan = bands(new_p, p, self.window, sequence_ids, s, ordered=not packed, consecutive=not packed)
        B, held = tokens.shape[:-1].numel(), 0 if old_p is None else len(old_p)
        self.origin = self.length - held
        self.start = torch.full((B,), self.length, device=tokens.device)
        self.held = torch.full((B,), held, device=tokens.device)
        self.kept = slice(None)
        if self.window is not None and p.shape[0] > self.window:
            self.kept = slice(-self.window, None) if s is None else still_visible(p, s, self.window)
        self.positions = p[self.kept]
        self.sequence_ids = None if s is None else s[self.kept]
        self.length += tokens.shape[-1]
        return new_p

    def rollback(self, n: int) -> None:
        """Forget the last n tokens, in place. CacheError if keys that they pushed out are needed."""
        held = 0 if self.positions is None else self.positions.shape[0]
        if self.sequence_ids is not None:
            raise CacheError(
                "a packed cache cannot be rolled back: its sequences end in different places", field="n"
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


class KeysAndValues(ABC):
    """One layer's memory that is made of tensors: keys and values, in int8 their scales too."""

    entries: Entries

    @property
    def k(self) -> Tensor:
        """Keys as they are kept, (..., S, G, K)."""
        return self.entries[0]

    @property
    def v(self) -> Tensor:
        """Values likewise."""
        return self.entries[1]

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class _GrowingMemory(KeysAndValues):
    """One layer of a GrowingCache: entries (..., S, G, K), none at first."""

    def __init__(self, cache: GrowingCache, entries: Entries = ()) -> None:
        self.cache, self.entries = cache, entries

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache, old = self.cache, self.entries
        new = compressed(k, v, cache.int8)
        held = tuple(torch.cat(pair, dim=-3) for pair in zip(old, new, strict=True)) if old else new
        if cache.sequence_ids is None and uses(Backend.CPU, ATTENTION, q):
            out = self._attend_fast(q, new, old or new)
        else:
            out = banded_attention(q, *expanded(held, q.dtype), cache.plan)
        self.entries = tuple(t[..., cache.kept, :, :] for t in held)
        if held[0].shape[-3] > 2 * self.entries[0].shape[-3]:  # a view would keep a long prompt alive
            self.entries = tuple(t.clone() for t in self.entries)
        return out

    def _attend_fast(self, q: Tensor, new: Entries, old: Entries) -> Tensor:
        cache = self.cache
        if q.dim() == 3:
            return self._attend_fast(q[None], *(tuple(t[None] for t in e) for e in (new, old)))[0]
        old = tuple(t.contiguous() for t in old)  # what was kept of a batch is a view
        place = Place(cache.start, cache.held, old[0].shape[1], cache.origin)
        return attend(q, *four(new), Remembered(*four(old), place), cache.window)


def four(entries: Entries) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """k, v and their scales, None where they have none."""
    return entries if len(entries) == 4 else (*entries, None, None)  # type: ignore[return-value]


class KernelCache(ABC):
    """A cache that the kernels read and write where it lies: all blocks can run over it in one call."""

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


class RollingCache(KernelCache):
    """A ring of slots for each of B sequences, written in place: memory stays flat however long they run.

    Position p lies in slot p mod slots. With a window there are W + `slack` slots and the ring goes
    round for ever; without one, or with `max_seq_len` < W, there are `max_seq_len` + `slack`, and what
    would not fit is refused. Rows may differ in length: prefill them with `rows(i, j)` and decode all
    together with tokens (B, T). No gradient flows through what is remembered: train with Stateless or
    GrowingCache.

    `slack` tokens at least can be rolled back at any time, and up to slack + 1 new ones are written
    before they are attended to: decode of length one is what a ring without slack has of that.

    `static` is for compiled or graph-captured decode: every step touches every slot and asks the device
    for nothing, so shapes never change; whether there is room is then for the caller to check.
    """

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
            raise CacheError(f"slack is the number of tokens that may be taken back, not {slack}", field="slack")
        self.window, self.static, self.slack = check_window(window), static, slack
        self.slots = (max_seq_len if window is None else min(window, max_seq_len)) + slack
        self.positions = torch.full((batch, self.slots), EMPTY, dtype=torch.long, device=device)
        self.length = torch.zeros(batch, dtype=torch.long, device=device)
        self.end = self.length.clone()  # one past the last position ever written: what lies a ring before is gone
        empty = torch.zeros(batch, self.slots, n_kv_heads, head_dim, dtype=dtype, device=device)
        blank = compressed(empty, empty, check_kv_dtype(kv_dtype))
        self.layers: list[_RollingMemory] = [
            _RollingMemory(self, tuple(huge_pages.copied(t) for t in blank), dtype) for _ in range(n_layers)
        ]
        self._new_forward()

    def _new_forward(self) -> None:
        self.plan: list[Band] = []  # prefill: old keys, oldest first, then the new
        self.mask: Tensor | None = None  # decode: over the ring as it lies
        self.start = self.held = self.length  # (B,): the first new position, and how many are held before it
        self.filled = self.slots
        self.old: Tensor | slice | None = None  # the slots of the old keys, None: there are none
        self.slot = self.row = self.length  # (B, m), (B, 1): where the last m of the new tokens go
        self.decoding = False

    def writable(self) -> RollingCache:
        return self

    @property
    def place(self) -> Place:
        return Place(self.start, self.held, self.slots)

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].dtype

    def rows(self, start: int, stop: int) -> RollingCache:
        """The sequences start..stop as a cache of their own, on the same memory."""
        part = object.__new__(RollingCache)
        part.window, part.static, part.slack, part.slots = self.window, self.static, self.slack, self.slots
        part.positions, part.length = self.positions[start:stop], self.length[start:stop]
        part.end = self.end[start:stop]
        part.layers = [_RollingMemory(part, tuple(t[start:stop] for t in m.entries), m.dtype) for m in self.layers]
        part._new_forward()
        return part

    def extend(self, tokens: Tensor, sequence_ids: Tensor | None = None) -> Tensor:
        if tokens.dim() != 2 or tokens.shape[0] != self.length.shape[0] or sequence_ids is not None:
            raise CacheError(
                f"this rolling cache holds {self.length.shape[0]} rows and takes tokens (B, T) without "
                f"sequence ids, not {tuple(tokens.shape)}; packed tokens go with GrowingCache",
                field="tokens",
            )
        T, slots = tokens.shape[1], self.slots
        self._new_forward()
        new_p = self.length[:, None] + torch.arange(T, device=self.length.device)  # (B, T)
        self.decoding = self.slack + 1 >= T  # what the new tokens overwrite has left the window of them all
        lengths = [] if self.static and self.decoding else self.length.tolist()
        # A shorter ring, or one without a window, must not go round.
        endless = self.window is not None and slots == self.window + self.slack
        if lengths and not endless and max(lengths) + T > slots:
            raise CacheError(
                f"{max(lengths)} tokens held and {T} more do not fit a context of {slots}",
                field="tokens",
                hint=f"make the cache with max_seq_len >= {max(lengths) + T}",
            )
        equal = bool(lengths) and min(lengths) == max(lengths)
        self.start = self.length.clone()
        self.held = self.start - (self.end - slots).clamp(min=0)
        # A prefill longer than the ring leaves only its last tokens there: the rest would collide.
        m = min(T, slots)
        self.slot = new_p[:, T - m :] % slots
        self.row = torch.arange(self.slot.shape[0], device=self.slot.device)[:, None]
        if self.decoding:
            self.positions.scatter_(1, self.slot, new_p)
            if lengths:
                self.filled = min(max(lengths) + T, slots)
            # In step, one token sees all that is there, until a ring with slack holds more than its window.
            if not (equal and T == 1 and (self.slack == 0 or self.window is None or lengths[0] < self.window)):
                self.mask = visible(new_p, self.positions[:, : self.filled], self.window)
        else:
            if equal:
                n = lengths[0]
                held = min(n, self.window or slots)
                old_p = torch.arange(n - held, n, device=new_p.device)
                self.old = old_p % slots if held else None
                p_q = torch.arange(n, n + T, device=new_p.device)
                p_k = torch.cat([old_p, p_q])
                self.plan = bands(p_q, p_k, self.window, consecutive=True)
            else:  # rows out of step: the ring as it lies, what is visible told by position alone
                self.old = slice(None)
                p_k = torch.cat([self.positions, new_p], dim=1)
                self.plan = bands(new_p, p_k, self.window, ordered=False)
            self.positions.scatter_(1, self.slot, new_p[:, T - m :])
        self.length += T
        torch.maximum(self.end, self.length, out=self.end)
        return new_p

    def rollback(self, n: int | Tensor) -> None:
        """Forget the last n tokens of every row, or n[b] of row b: (B,).

        CacheError, and nothing changed, if keys that they overwrote are needed. Up to `slack` tokens can
        always be taken back, counted from the furthest that a row has ever been.
        """
        counts = torch.as_tensor(n, device=self.length.device).expand_as(self.length)
        kept = self.length - counts
        gone = self.end - self.slots  # positions below have been overwritten
        needed = (kept - (self.window or 0)).clamp(min=0)  # without a window nothing is ever gone
        if bool(((counts < 0) | (kept < 0) | ((counts > 0) & (needed < gone))).any()):
            shortest, longest = int(self.length.min()), int(self.length.max())
            raise CacheError(
                f"cannot roll back {n if isinstance(n, int) else n.tolist()} tokens of {shortest}..{longest} in a "
                f"ring of {self.slots}: the keys they overwrote are gone; it was made with slack={self.slack}",
                field="n",
            )
        self.length -= counts
        self.positions.masked_fill_(self.positions >= self.length[:, None], EMPTY)


class _RollingMemory(KeysAndValues):
    """One layer of a RollingCache: entries (B, slots, G, K), for a model whose type is `dtype`."""

    def __init__(self, cache: RollingCache, entries: Entries, dtype: torch.dtype) -> None:
        self.cache, self.entries, self.dtype = cache, entries, dtype

    def _write(self, new: Entries) -> None:
        slot, row = self.cache.slot, self.cache.row  # (B, m)
        m = slot.shape[1]
        for held, t in zip(self.entries, new, strict=True):
            held[row, slot] = t[:, t.shape[1] - m :]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if k.dtype != self.dtype:
            raise CacheError(
                f"this cache holds {self.dtype} and was given {k.dtype}",
                field="cache",
                hint="make it with the model's type",
            )
        if k.shape[-2:] != self.k.shape[-2:]:  # the kernel would write beside its place
            raise CacheError(
                f"this cache holds {tuple(self.k.shape[-2:])} keys (heads, width) and was given "
                f"{tuple(k.shape[-2:])}",
                field="cache",
                hint="make it with the model's shape",
            )
        cache, held = self.cache, self.entries
        new = compressed(k.detach(), v.detach(), len(held) == 4)  # or the ring would hold every step's graph
        if uses(Backend.CPU, ATTENTION, q):
            return attend(q, *four(new), Remembered(*four(held), cache.place), cache.window, keep=True)
        if cache.decoding:  # the new key takes the place of the one that has just left the window
            self._write(new)
            return attention(q, *expanded(tuple(t[:, : cache.filled] for t in held), q.dtype), cache.mask)
        # A chunk's first queries still see keys that its last ones overwrite: attend, then write.
        own = (k, v) if len(held) == 2 else expanded(new, q.dtype)
        if cache.old is None:
            out = banded_attention(q, *own, cache.plan)
        else:
            old = expanded(tuple(t[:, cache.old] for t in held), q.dtype)
            k, v = (torch.cat(pair, 1) for pair in zip(old, own, strict=True))
            out = banded_attention(q, k, v, cache.plan)
        self._write(new)
        return out
