"""From a plan to hidden states and logits: launched kernel by kernel, or as one recorded graph.

Where code is made for each number of rows, a step is padded to one of few sizes:

    rows      1  2  4  8  16  24 ... 64  80  96 ...

oneDNN makes such code, for bfloat16 on a CPU, and keeps it: some 200 MB where every number of rows comes up.

On a GPU a graph is replayed for steps in which every sequence feeds one token and none has an adapter: for most
steps, once prompts are read. There is one for each number of sequences, padded in the same way, and of

    columns   64  256  1024 ...                of the table of pages, as the longest of them needs

No row's result depends on those beside it (kernels/gpu/paged.py; docs/gpu.md says where products do), so padding
changes none. A graph is recorded when it is first needed.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..kernels.backend import LINEAR, STEP, Backend, uses
from ..kernels.gpu.graph import WARM_UP, Recorder
from ..lora.adapters import Adapters
from ..model import Mistral7B
from ..sampling.choice import to_device
from .batch import PaddingRow, Paged, PagedBatch, Parts
from .config import EngineConfig
from .in_flight import Plan, Rows
from .pages import PagePool

COLUMNS, WIDER = 64, 4  # pages that a graph's table has room for at first, and how many times more each next one
Record = Callable[[Callable[[], None]], Callable[[], None]]  # from a step to what does the same again


class Forward:
    """The model over the pages of a pool. With `fill` its steps have one of few numbers of rows."""

    overlaps = False  # whether the device computes while the host plans and launches the next step

    def __init__(self, adapters: Adapters, pool: PagePool, fill: bool = False) -> None:
        self.adapters, self.pool, self.fill = adapters, pool, fill
        self.window = adapters.model.args.sliding_window
        self.padding = PaddingRow(np.array([pool.scratch]))

    def hidden(self, plan: Plan, tokens: Tensor) -> Tensor:
        """Final states (N, D) of a plan's tokens (N,), whose keys and values are then in its pages.

        They may lie where those of the next call will.
        """
        rows = len(tokens)
        runs = [(s.request.adapter, n) for s, n in plan]
        if more := self._missing(rows):
            tokens = pad(tokens, (0, more))
        with self.adapters.over([*runs, (None, more)]) as model:
            return model.hidden(tokens, PagedBatch(self.pool, self.window, self._padded(plan, more)))[:rows]

    def logits(self, hidden: Tensor, rows: Rows) -> Tensor:
        """Logits (R, V) of these rows, in their order, of hidden (N, D)."""
        wanted = [*rows, *[(0, None)] * self._missing(len(rows))]
        runs = groupby(wanted, lambda row: row[1])
        with self.adapters.over([(adapter, len(list(run))) for adapter, run in runs]) as model:
            whole = len(wanted) == len(hidden)
            some = hidden if whole else hidden[to_device([at for at, _ in wanted], hidden.device)]
            return model.logits(some)[: len(rows)]

    def _missing(self, rows: int) -> int:
        """How many rows more a step should have."""
        return bucket_size(rows) - rows if self.fill else 0

    def _padded(self, plan: Plan, more: int) -> list[tuple[Paged, int]]:
        """A plan with so many padding rows after it."""
        return [*plan, *[(self.padding, 1)] * more]


class GraphForward(Forward):
    """The same, with decoding in graphs. Without a recorder, as in tests, their steps are run as they are."""

    overlaps = True

    def __init__(
        self, adapters: Adapters, pool: PagePool, config: EngineConfig, record: Record = lambda step: step
    ) -> None:
        super().__init__(adapters, pool)
        self.most, self.record = config.max_sequences, record
        self.steps: dict[tuple[int, int], DecodeStep] = {}

    def hidden(self, plan: Plan, tokens: Tensor) -> Tensor:
        if len(tokens) > len(plan) or any(s.request.adapter is not None for s, _ in plan):
            return super().hidden(plan, tokens)
        size = min(bucket_size(len(plan)), self.most)
        parts = self._padded(plan, size - len(plan))
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


def bucket_size(n: int) -> int:
    """The number of rows, among those for which code or a graph is made, to which n are padded."""
    if n <= 4:
        return (0, 1, 2, 4, 4)[n]
    step = 8 if n <= 64 else 16
    return -(-n // step) * step


def forward_for(adapters: Adapters, pool: PagePool, config: EngineConfig) -> Forward:
    """How steps are computed where the pages lie. Nothing else in the engine asks which device that is."""
    device = pool.layers[0][0].device
    if not uses(Backend.CUDA_GRAPH, STEP, torch.empty(0, dtype=pool.dtype, device=device)):  # keys may be int8
        linears = [m for m in adapters.model.modules() if type(m) is torch.nn.Linear]
        return Forward(adapters, pool, any(uses(Backend.ONEDNN, LINEAR, m.weight) for m in linears))
    recorder = Recorder(device)

    def record(step: Callable[[], None]) -> Callable[[], None]:
        def rehearse() -> None:
            for _ in range(WARM_UP):
                step()

        return recorder(step, rehearse).replay

    return GraphForward(adapters, pool, config, record)
