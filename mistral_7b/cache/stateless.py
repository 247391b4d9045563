"""Causal, windowed attention without a cache: for training, or a single forward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import repeat

import torch
from torch import Tensor

from ..attention import Band, banded_attention, bands
from ..errors import CacheError
from .contract import Memory, check_window
from .sequences import interleaved, run_positions


class Stateless:
    """A cache that stores nothing: each forward starts at position 0.

    `sequence_ids` of `extend`, in the tokens' shape, isolate documents packed into one row. With a window, each
    document's tokens must be consecutive, never interleaved. Positions restart with each document. In a packed
    batch (T,) consecutive documents are attended one by one, so that its cost is the sum of theirs.
    """

    def __init__(self, window: int | None) -> None:
        self.window = check_window(window)
        self.step: tuple[Band, ...] = ()

    @property
    def layers(self) -> Iterable[Memory]:
        return repeat(self)

    def writable(self) -> Stateless:
        return self

    def extend(self, tokens: Tensor, sequence_ids: Tensor | None = None) -> Tensor:
        if sequence_ids is None:
            positions = torch.arange(tokens.shape[-1], device=tokens.device)
            self.step = bands(positions, positions, self.window, consecutive=True)
            return positions
        # The checks read values, which a compiled graph cannot: there the caller must ensure order.
        ordered = not torch.compiler.is_compiling() and not interleaved(sequence_ids)
        if self.window is not None and not ordered and not torch.compiler.is_compiling():
            raise CacheError(
                "sequence ids are interleaved: with Stateless the tokens of one sequence must be consecutive; "
                "GrowingCache takes them in any order",
                field="sequence_ids",
            )
        positions = run_positions(sequence_ids)
        if ordered and sequence_ids.dim() == 1:
            self.step = tuple(self._documents(positions, sequence_ids))
        else:
            self.step = bands(positions, positions, self.window, sequence_ids, sequence_ids)
        return positions

    def _documents(self, positions: Tensor, sequence_ids: Tensor) -> Iterator[Band]:
        """The bands of each document in a packed batch (T,)."""
        start = 0
        for length in torch.unique_consecutive(sequence_ids, return_counts=True)[1].tolist():
            place = positions[start : start + length]
            for band in bands(place, place, self.window, consecutive=True):
                queries, keys = (slice(s.start + start, s.stop + start) for s in (band.queries, band.keys))
                yield band._replace(queries=queries, keys=keys)
            start += length

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return banded_attention(q, k, v, self.step)
