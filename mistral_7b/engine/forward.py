"""Hidden states and logits of a step: computed kernel by kernel, or by replaying a CUDA graph.

Where code is compiled for each number of rows, a step is padded to a bucket size:

    rows      1  2  4  8  16  24 ... 64  80  96 ...

oneDNN compiles such code for bfloat16 on a CPU and keeps it: some 200 MB if every number of rows occurs.

On a GPU a graph is replayed for steps in which every sequence feeds one token and none has an adapter, records or
steers: most steps after prefill. There is one graph for each bucket size and each width of the block table, which
depends on the longest sequence:

    columns   64  256  1024 ...

Attention of a row does not depend on the other rows (kernels/gpu/paged.py), and neither do the products of a
deterministic engine (docs/gpu.md): there padding changes no result. A graph is recorded on first use.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
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
from .threads import SharedCores, is_light
from .watching import watched

COLUMNS, GROWTH = 64, 4  # width of a graph's narrowest block table, and factor to the next width
Record = Callable[[Callable[[], None]], Callable[[], None]]  # (step) -> a function that replays it


class Forward:
    """Runs the model over the pages of a pool; with `pad_rows`, steps are padded to bucket sizes."""

    overlaps = False  # whether the device computes while the host plans and launches the next step

    def __init__(
        self, adapters: Adapters, pool: PagePool, pad_rows: bool = False,
        cores: AbstractContextManager[None] | None = None,
    ) -> None:  # fmt: skip
        self.adapters, self.pool, self.pad_rows = adapters, pool, pad_rows
        self.cores = cores or nullcontext()
        self.window = adapters.model.args.sliding_window
        self.padding = PaddingRow(np.array([pool.scratch]))

    def hidden(self, plan: Plan, tokens: Tensor) -> Tensor:
        """Final hidden states (N, D) of a plan's tokens (N,); writes their keys and values into the pages.

        The next call may overwrite the returned tensor.
        """
        rows = len(tokens)
        runs = [(s.request.adapter, n) for s, n in plan]
        if more := self._padding_rows(rows):
            tokens = pad(tokens, (0, more))
        with self.cores, self.adapters.over([*runs, (None, more)]) as model:
            batch = PagedBatch(self.pool, self.window, self._with_padding(plan, more))
            return watched(model, plan, batch).hidden(tokens, batch)[:rows]

    def logits(self, hidden: Tensor, rows: Rows) -> Tensor:
        """Logits (R, V) of these rows of hidden (N, D), in the order of `rows`."""
        padded = [*rows, *[(0, None)] * self._padding_rows(len(rows))]
        runs = groupby(padded, lambda row: row[1])
        lengths = [(adapter, len(list(run))) for adapter, run in runs]
        with self.cores, self.adapters.over(lengths) as model:
            all_rows = len(rows) == len(padded) == len(hidden)
            selected = hidden if all_rows else hidden[to_device([i for i, _ in padded], hidden.device)]
            return model.logits(selected)[: len(rows)]

    def _padding_rows(self, rows: int) -> int:
        """The number of padding rows of a step of `rows` rows."""
        return bucket_size(rows) - rows if self.pad_rows else 0

    def _with_padding(self, plan: Plan, more: int) -> list[tuple[Paged, int]]:
        """A plan followed by `more` padding rows."""
        return [*plan, *[(self.padding, 1)] * more]


class GraphForward(Forward):
    """Forward that replays graphs for decoding. The default `record`, for tests, runs steps without recording."""

    overlaps = True

    def __init__(
        self, adapters: Adapters, pool: PagePool, config: EngineConfig, record: Record = lambda step: step
    ) -> None:
        super().__init__(adapters, pool)
        self.max_sequences, self.record = config.max_sequences, record
        self.steps: dict[tuple[int, int], DecodeStep] = {}

    def hidden(self, plan: Plan, tokens: Tensor) -> Tensor:
        if len(tokens) > len(plan) or any(s.request.adapter or s.request.watching for s, _ in plan):
            return super().hidden(plan, tokens)
        size = min(bucket_size(len(plan)), self.max_sequences)
        parts = self._with_padding(plan, size - len(plan))
        longest, columns = max(s.stop for s, _ in plan), COLUMNS
        while columns < longest:
            columns *= GROWTH
        if (step := self.steps.get((size, columns))) is None:
            batch = PagedBatch(self.pool, self.window, parts, columns)
            step = self.steps[size, columns] = DecodeStep(self.adapters.model, batch)
        return step(parts, tokens, self.record)


class DecodeStep:
    """A decode step of one token for each row, over tensors that stay at the same addresses for its graph."""

    def __init__(self, model: Mistral7B, batch: PagedBatch) -> None:
        self.model, self.batch = model, batch
        self.tokens = torch.zeros_like(batch.positions)  # (size,)
        weight = model.norm.weight
        self.out = torch.empty(len(self.tokens), model.args.dim, dtype=weight.dtype, device=weight.device)
        self.replay: Callable[[], None] | None = None

    def __call__(self, parts: Parts, tokens: Tensor, record: Record) -> Tensor:
        """Hidden states (N, D) of tokens (N,), which belong to the first N of `parts`."""
        self.batch.refill(parts)
        self.tokens[: len(tokens)] = tokens
        if self.replay is None:
            self.replay = record(self.run)
        self.replay()
        return self.out[: len(tokens)]

    def run(self) -> None:
        """The step that is recorded. Running it twice has the same effect as once."""
        self.out.copy_(self.model.hidden(self.tokens, self.batch))


def bucket_size(n: int) -> int:
    """The bucket size to which n rows are padded, which bounds how many shapes are compiled or recorded."""
    if n <= 4:
        return (0, 1, 2, 4, 4)[n]
    step = 8 if n <= 64 else 16
    return -(-n // step) * step


def forward_for(adapters: Adapters, pool: PagePool, config: EngineConfig) -> Forward:
    """Choose the Forward for the device of the pages."""
    device = pool.layers[0][0].device
    if not uses(Backend.CUDA_GRAPH, STEP, torch.empty(0, dtype=pool.dtype, device=device)):  # pages may be int8
        linears = [m for m in adapters.model.modules() if type(m) is torch.nn.Linear]
        # Sums of PyTorch's products may depend on the number of threads.
        fixed = device.type != "cpu" or config.deterministic
        pad_rows = any(uses(Backend.ONEDNN, LINEAR, m.weight) for m in linears)
        return Forward(adapters, pool, pad_rows, None if fixed else SharedCores(is_light(adapters.model)))
    recorder = Recorder(device)

    def record(step: Callable[[], None]) -> Callable[[], None]:
        def warm_up() -> None:
            for _ in range(WARM_UP):
                step()

        return recorder(step, warm_up).replay

    return GraphForward(adapters, pool, config, record)
