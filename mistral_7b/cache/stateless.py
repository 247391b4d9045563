"""Causal, windowed attention without a cache: for training, or a single forward."""

from __future__ import annotations

from collections.abc import Iterable
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
    document's tokens must be consecutive, never interleaved. Positions restart with each document.
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
        else:
            # The check reads values, which a compiled graph cannot: there the caller must ensure it.
            if self.window is not None and not torch.compiler.is_compiling() and interleaved(sequence_ids):
                raise CacheError(
                    "sequence ids are interleaved: with Stateless the tokens of one sequence must be consecutive; "
                    "GrowingCache takes them in any order",
                    field="sequence_ids",
                )
            positions = run_positions(sequence_ids)
        self.step = bands(
            positions, positions, self.window, sequence_ids, sequence_ids, consecutive=sequence_ids is None
        )
        return positions

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return banded_attention(q, k, v, self.step)
