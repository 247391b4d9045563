"""A model whose activations pass through watchers: the modules of model.py with a tap at every point.

    taps = Taps([Part(..., [recorder])])
    logits, cache = Watched(model, taps)(tokens)

The watched model shares all weights, and the norms, attention and feed-forward of the model. Only the blocks' sums
are written again. A quantized model computes without its kernels of a whole block; its results keep their bits,
because those kernels round and add in the same order as the single operations (tests/activations/test_watched.py).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from types import EllipsisType
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor, nn

from ..cache import Cache, Memory
from ..model import Attention, FeedForward, Layers, Mistral7B, Rope, TransformerBlock
from .keys import KeyReader, Keys, StoredKeys, attend_with, attention_weights, by_key, by_position


class Watcher(Protocol):
    """Sees activations, and may return others in their place."""

    def wants(self, point: str, layer: int | None) -> bool:
        """Whether it wants to see this point's activation."""
        ...

    def see(self, point: str, layer: int | None, x: Tensor, positions: Tensor) -> Tensor:
        """Return x itself, or what replaces it: (..., T, ...) of the same shape and type.

        `positions` are those of its tokens, broadcastable to (..., T). Attention weights are (..., T, H, S) here.
        """
        ...


class Part(NamedTuple):
    """Rows of the tokens, `...` for all, with those who watch them, in order."""

    rows: slice | EllipsisType
    watchers: Sequence[Watcher]


class Taps:
    """Shows activations to the watchers of each part."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.positions: Tensor | None = None  # of the last forward

    def wants(self, point: str, layer: int | None = None) -> bool:
        """Whether anyone wants to see this point."""
        return any(w.wants(point, layer) for part in self.parts for w in part.watchers)

    def see(self, point: str, layer: int | None, x: Tensor) -> Tensor:
        """Show x (..., T, ...) to those who want it; return what replaces it."""
        if not self.wants(point, layer):
            return x
        for i, part in enumerate(self.parts):
            old = x[part.rows]
            if (new := self.show(i, point, layer, old)) is not old:
                x = _replaced(x, part.rows, new)
        return x

    def show(self, i: int, point: str, layer: int | None, x: Tensor) -> Tensor:
        """Show the rows of part number i."""
        assert self.positions is not None, "activations follow the positions"
        part = self.parts[i]
        positions = self.positions[part.rows]
        for w in part.watchers:
            if w.wants(point, layer):
                x = w.see(point, layer, x, positions)
        return x


def _replaced(x: Tensor, rows: slice | EllipsisType, new: Tensor) -> Tensor:
    if rows is ...:
        return new
    x = x.clone()
    x[rows] = new
    return x


class Watched(Mistral7B):
    """A model that shares everything with `model` and computes through taps."""

    def __init__(self, model: Mistral7B, taps: Taps, reader: KeyReader | None = None) -> None:
        nn.Module.__init__(self)
        self.args, self.source, self.taps = model.args, model.source, taps
        self.reader = reader or StoredKeys()
        self.tok_embeddings = Tap(model.tok_embeddings, taps, "embedding")
        self.layers = WatchedLayers(
            WatchedBlock(block, n, taps)  # type: ignore[arg-type]
            for n, block in enumerate(model.layers)
        )
        self.norm = Tap(model.norm, taps, "norm")  # type: ignore[assignment]
        self.output = model.output

    def hidden(self, tokens: Tensor, cache: Cache, sequence_ids: Tensor | None = None) -> Tensor:
        return super().hidden(tokens, WatchedCache(cache, self.taps, self.reader), sequence_ids)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.taps.see("logits", None, super().logits(hidden))


class Tap(nn.Module):
    """A module whose output is shown, in heads of `head_dim` if it has them; or its input, with `before`."""

    def __init__(
        self,
        module: nn.Module,
        taps: Taps,
        point: str,
        layer: int | None = None,
        head_dim: int = 0,
        before: bool = False,
    ) -> None:
        super().__init__()
        self.module, self.taps, self.point, self.layer = module, taps, point, layer
        self.head_dim, self.before = head_dim, before

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            return self.module(self.taps.see(self.point, self.layer, x))
        out = self.module(x)
        if not self.head_dim:
            return self.taps.see(self.point, self.layer, out)
        heads = out.unflatten(-1, (-1, self.head_dim))
        return self.taps.see(self.point, self.layer, heads).flatten(-2)


class WatchedLayers(Layers):
    """The watched blocks one after another."""


class WatchedBlock(TransformerBlock):
    """A block with its taps; `layer` is its number."""

    def __init__(self, block: TransformerBlock, layer: int, taps: Taps) -> None:
        nn.Module.__init__(self)
        self.layer, self.taps = layer, taps
        self.attention_norm, self.ffn_norm = block.attention_norm, block.ffn_norm
        self.attention: Attention = block.attention
        self.feed_forward: FeedForward = block.feed_forward
        width = block.attention.head_dim
        for key, point in (("wq", "q"), ("wk", "k")):
            if taps.wants(point, layer):
                linear = getattr(block.attention, key)
                self.attention = _with(self.attention, key, Tap(linear, taps, point, layer, head_dim=width))
        if taps.wants("ffn", layer):
            tap = Tap(block.feed_forward.w2, taps, "ffn", layer, before=True)
            self.feed_forward = _with(self.feed_forward, "w2", tap)

    def forward(self, x: Tensor, rope: Rope, memory: Memory) -> Tensor:  # (..., D)
        x = self.see("residual_before", x)
        normed = self.see("attention_norm", self.attention_norm(x))
        x = self.see("residual_mid", x + self.see("attn_out", self.attention(normed, rope, memory)))
        normed = self.see("ffn_norm", self.ffn_norm(x))
        return self.see("residual", x + self.see("ffn_out", self.feed_forward(normed)))

    def see(self, point: str, x: Tensor) -> Tensor:
        return self.taps.see(point, self.layer, x)


M = TypeVar("M", bound=nn.Module)


def _with(module: M, key: str, child: nn.Module) -> M:
    """A copy of a module that shares all but one of its children."""
    out = copy.copy(module)
    out._modules = {**module._modules, key: child}
    return out


class WatchedCache:
    """A cache whose queries, keys, values, weights and outputs are shown. It wraps the working one."""

    def __init__(self, cache: Cache, taps: Taps, reader: KeyReader) -> None:
        self.cache, self.taps, self.reader = cache, taps, reader

    @property
    def layers(self) -> Iterator[Memory]:
        return (WatchedMemory(self, memory, n) for n, memory in enumerate(self.cache.layers))

    def writable(self) -> WatchedCache:
        return self

    def extend(self, tokens: Tensor, sequence_ids: Tensor | None = None) -> Tensor:
        self.reader.before(self.cache)
        positions = self.cache.extend(tokens, sequence_ids)
        self.taps.positions = positions
        self.reader.after(positions, sequence_ids)
        return positions


class WatchedMemory:
    """One layer of a WatchedCache."""

    def __init__(self, cache: WatchedCache, memory: Memory, layer: int) -> None:
        self.taps, self.reader, self.memory, self.layer = cache.taps, cache.reader, memory, layer

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        taps, n = self.taps, self.layer
        q, k, v = taps.see("rotated_q", n, q), taps.see("rotated_k", n, k), taps.see("v", n, v)
        edited = list(self._weights(q, k, v)) if taps.wants("attention", n) else []
        out = self.memory.attend(q, k, v)
        for rows, weights, keys in edited:
            out = _replaced(out, rows, attend_with(weights, keys, out.dtype))
        return taps.see("z", n, out)

    def _weights(self, q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[slice | EllipsisType, Tensor, Keys]]:
        """Show each part's weights; yield those that were changed, for the keys as they lie."""
        for i, part in enumerate(self.taps.parts):
            if not any(w.wants("attention", self.layer) for w in part.watchers):
                continue
            assert self.taps.positions is not None
            length = int(self.taps.positions[part.rows].max()) + 1
            keys = self.reader.read(self.memory, k[part.rows], v[part.rows], i)
            weights = by_position(attention_weights(q[part.rows], keys), keys, length)
            new = self.taps.show(i, "attention", self.layer, weights)
            if new is not weights:
                yield part.rows, by_key(new, keys), keys
