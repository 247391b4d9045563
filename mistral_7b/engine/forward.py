"""From a plan to hidden states and logits: launched kernel by kernel, or as one recorded graph.

A graph is replayed for steps in which every sequence feeds one token and none has an adapter: for most steps, once
prompts are read. Sequences are filled up with rows of nobody to a number for which there is a graph:

    rows      1  2  4  8  16  24  32 ...       sequences, filled up
    columns   64  256  1024 ...                of the table of pages, as the longest of them needs

No row's result depends on those beside it (kernels/paged.py; docs/gpu.md says where products do), so filling up
changes none. A graph is recorded when it is first needed.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from ..kernels.graph import WARM_UP, Recorder
from ..model import Mistral7B
from ..sampling import put
from .adapters import Adapters
from .batch import Nobody, Paged, PagedBatch, Parts
from .config import EngineConfig
from .flight import Plan, Rows
from .pages import PagePool

COLUMNS, WIDER = 64, 4  # pages that a graph's table has room for at first, and how many times more each next one
Record = Callable[[Callable[[], None]], Callable[[], None]]  # from a step to what does the same again


class Forward:
    """The model over the pages of a pool."""

    aside = False  # whether the device computes while the host goes on: then the next step is launched meanwhile

    def __init__(self, adapters: Adapters, pool: PagePool) -> None:
        self.adapters, self.pool = adapters, pool
        self.window = adapters.model.args.sliding_window

    def hidden(self, plan: Plan, tokens: Tensor) -> Tensor:
        """Final states (N, D) of a plan's tokens (N,), whose keys and values are then in its pages.

        They may lie where those of the next call will.
        """
        with self.adapters.over([(s.request.adapter, n) for s, n in plan]) as model:
            return model.hidden(tokens, PagedBatch(self.pool, self.window, plan))

    def logits(self, hidden: Tensor, rows: Rows) -> Tensor:
        """Logits (R, V) of these rows, in their order, of hidden (N, D)."""
        runs = groupby(rows, lambda row: row[1])
        with self.adapters.over([(adapter, len(list(run))) for adapter, run in runs]) as model:
            whole = len(rows) == len(hidden)
            return model.logits(hidden if whole else hidden[put([at for at, _ in rows], hidden.device)])


class GraphForward(Forward):
    """The same, with decoding in graphs. Without a recorder, as in tests, their steps are run as they are."""

    aside = True

    def __init__(
        self, adapters: Adapters, pool: PagePool, config: EngineConfig, record: Record = lambda step: step
    ) -> None:
        super().__init__(adapters, pool)
        self.sizes, self.record = sizes_up_to(config.max_sequences), record
        self.nobody = Nobody(np.array([pool.scratch]))
        self.steps: dict[tuple[int, int], DecodeStep] = {}

    def hidden(self, plan: Plan, tokens: Tensor) -> Tensor:
        if len(tokens) > len(plan) or any(s.request.adapter is not None for s, _ in plan):
            return super().hidden(plan, tokens)
        size = next(size for size in self.sizes if size >= len(plan))
        parts: list[tuple[Paged, int]] = [*plan, *[(self.nobody, 1)] * (size - len(plan))]
        longest, columns = max(s.stop for s, _ in plan), COLUMNS
        while columns < longest:
            columns *= WIDER
        if (step := self.steps.get((size, columns))) is None:
            batch = PagedBatch(self.pool, self.window, parts, columns)
            step = self.steps[size, columns] = DecodeStep(self.adapters.model, batch)
        return step(parts, tokens, self.record)


class DecodeStep:
    """One token for each row of a batch that stays in place, from buffer to buffer."""

    def __init__(self, model: Mistral7B, batch: PagedBatch) -> None:
        self.model, self.batch = model, batch
        self.tokens = torch.zeros_like(batch.positions)  # (size,)
        weight = model.norm.weight
        self.out = torch.empty(len(self.tokens), model.args.dim, dtype=weight.dtype, device=weight.device)
        self.replay: Callable[[], None] | None = None

    def __call__(self, parts: Parts, tokens: Tensor, record: Record) -> Tensor:
        """Hidden states (N, D) of tokens (N,), those of the first N parts."""
        self.batch.refill(parts)
        self.tokens[: len(tokens)] = tokens
        if self.replay is None:
            self.replay = record(self.run)
        self.replay()
        return self.out[: len(tokens)]

    def run(self) -> None:
        """What is recorded. A second time it does the same: what it writes to the pages it does not read."""
        self.out.copy_(self.model.hidden(self.tokens, self.batch))


def sizes_up_to(most: int) -> list[int]:
    """Numbers of rows for which there are graphs."""
    sizes = [n for n in (1, 2, 4) if n < most]
    return [*sizes, *range(8, most, 8), most]


def forward_for(adapters: Adapters, pool: PagePool, config: EngineConfig) -> Forward:
    """How steps are computed where the pages lie. Nothing else in the engine asks which device that is."""
    device = pool.layers[0][0].device
    if device.type != "cuda":
        return Forward(adapters, pool)
    recorder = Recorder(device)

    def record(step: Callable[[], None]) -> Callable[[], None]:
        def rehearse() -> None:
            for _ in range(WARM_UP):
                step()

        return recorder(step, rehearse).replay

    return GraphForward(adapters, pool, config, record)
