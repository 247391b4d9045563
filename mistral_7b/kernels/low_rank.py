"""y += (x A^T) B for selected rows: the LoRA update of a product, with a different adapter for each row.

The kernel accumulates in float32, in an order that depends on the shape only, and rounds once: a row is
bit-identical in any batch, with any other adapters. Blocks computed in one call (cpu/calls.py) include it. The
twin uses PyTorch's matrix products, for other devices and types; they are not batch-invariant.

    M rows of x and y · K inputs · N outputs · r rank
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import LOW_RANK, Backend, uses
from .cpu import arguments, calls

RANKS = 4  # computed at a time: ranks are padded to a multiple


class LowRank:
    """The factors of one adapter for one product: A (r, K), and B transposed, (r, N).

    r is padded with zeros to a multiple of RANKS.
    """

    def __init__(self, a: Tensor, b: Tensor, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        """From A (r, K) and B (N, r) of any type, the scale already folded into B; stored as `dtype`."""
        pad = (0, 0, 0, -a.shape[0] % RANKS)
        self.a = F.pad(a.to(dtype), pad).to(device).contiguous()
        self.b = F.pad(b.to(dtype).T, pad).to(device).contiguous()

    def described(self) -> arguments.LowRank:
        """The kernel's descriptor; it holds pointers to the tensors."""
        return arguments.LowRank(rank=self.a.shape[0], a=self.a.data_ptr(), b=self.b.data_ptr())

    @property
    def nbytes(self) -> int:
        """The size of both factors, in bytes."""
        return self.a.nbytes + self.b.nbytes


class Mixture:
    """The adapter of each row of a call, by adapter index. All products of a model share one."""

    def __init__(self) -> None:
        self.struct = arguments.Mixture()
        self.choose({}, 0, "cpu")

    def choose(self, rows: Mapping[int, Sequence[int]], total: int, device: torch.device | str) -> None:
        """Set the rows of each adapter, for a call of `total` rows; a row has one adapter at most. {}: none."""
        self.which, self.total = torch.tensor(list(rows), dtype=torch.long), total
        self.counts = torch.tensor([len(own) for own in rows.values()], dtype=torch.long)
        self.rows = torch.tensor([i for own in rows.values() for i in own], dtype=torch.long, device=device)
        pointers = (t.data_ptr() for t in (self.which, self.counts, self.rows))
        self.struct.__init__(len(rows), *pointers, total, 0)  # type: ignore[misc]  # in place: pointers to it exist

    @property
    def refused(self) -> int:
        """The row count of a product that did not match `total` and was not updated; 0: all matched."""
        return self.struct.refused


class LowRanks:
    """The factors of all loaded adapters for one product: own[i] for adapter i, None if it has none."""

    def __init__(self, own: Sequence[LowRank | None], mixture: Mixture) -> None:
        self.own, self.mixture = own, mixture
        descriptors = [arguments.LowRank() if o is None else o.described() for o in own]
        self.table = (arguments.LowRank * len(own))(*descriptors)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add the adapters' updates for x (..., K) to y (..., N), contiguous, in place."""
        mixture = self.mixture
        active = [o for i in mixture.which.tolist() if (o := self.own[i]) is not None]
        if not active:
            return
        x, y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        if uses(Backend.CPU, LOW_RANK, y, x, active[0].a):
            calls.low_rank(self.table, mixture.struct, x, y)
        else:
            self.add_twin(x, y)

    def add_twin(self, x: Tensor, y: Tensor) -> None:
        """`add` in plain PyTorch, for x (M, K) and y (M, N)."""
        mixture = self.mixture
        if len(x) != mixture.total:
            mixture.struct.refused = len(x)
            return
        for i, rows in zip(mixture.which.tolist(), mixture.rows.split(mixture.counts.tolist()), strict=True):
            if (own := self.own[i]) is not None:
                y.index_add_(0, rows, F.linear(x[rows], own.a) @ own.b)
