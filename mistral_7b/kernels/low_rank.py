"""y += (x A^T) B for some rows: what LoRA adapters add to a product, each to rows of its own.

The kernel sums in float32, in an order that depends on nothing but the shape, and rounds once: a row's result is
the same bits whatever rows and adapters are beside it. Within a block that is computed in one call (cpu/calls.py)
it runs there. The twin is PyTorch's own products, for other devices and types; those promise no such thing.

    M rows of x and y · K inputs · N outputs · r rank
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import LOW_RANK, Backend, uses
from .cpu import arguments, calls

RANKS = 4  # that the kernel takes at once


class LowRank:
    """An adapter's two factors for one product, laid out for the kernel: A (r, K), and B transposed, (r, N).

    r is filled up with zeros.
    """

    def __init__(self, a: Tensor, b: Tensor, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        """From A (r, K) and B (N, r) of any type, the scale in B already, to compute in `dtype`."""
        fill = (0, 0, 0, -a.shape[0] % RANKS)
        self.a = F.pad(a.to(dtype), fill).to(device).contiguous()
        self.b = F.pad(b.to(dtype).T, fill).to(device).contiguous()

    def described(self) -> arguments.LowRank:
        """Itself as the kernel takes it; it points at the tensors."""
        return arguments.LowRank(rank=self.a.shape[0], a=self.a.data_ptr(), b=self.b.data_ptr())

    @property
    def nbytes(self) -> int:
        """The size of both, in bytes."""
        return self.a.nbytes + self.b.nbytes


class Mixture:
    """Which rows of a call belong to which adapters, by number. All products of a model share one."""

    def __init__(self) -> None:
        self.struct = arguments.Mixture()
        self.choose({}, 0, "cpu")

    def choose(self, rows: Mapping[int, Sequence[int]], total: int, device: torch.device | str) -> None:
        """For a call with `total` rows, each adapter's own; no two have the same row. {}: none adds anything."""
        self.which, self.total = torch.tensor(list(rows), dtype=torch.long), total
        self.counts = torch.tensor([len(own) for own in rows.values()], dtype=torch.long)
        self.rows = torch.tensor([i for own in rows.values() for i in own], dtype=torch.long, device=device)
        pointers = (t.data_ptr() for t in (self.which, self.counts, self.rows))
        self.struct.__init__(len(rows), *pointers, total, 0)  # type: ignore[misc]  # in place: it is pointed at

    @property
    def refused(self) -> int:
        """The rows of a product that had another number of them, and to which nothing was added; 0: none had."""
        return self.struct.refused


class LowRanks:
    """What the resident adapters add to one product: number i what own[i] says, None nothing."""

    def __init__(self, own: Sequence[LowRank | None], mixture: Mixture) -> None:
        self.own, self.mixture = own, mixture
        parts = [arguments.LowRank() if o is None else o.described() for o in own]
        self.table = (arguments.LowRank * len(own))(*parts)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add to y (..., N), contiguous, in place, what they make of x (..., K)."""
        mixture = self.mixture
        adding = [o for i in mixture.which.tolist() if (o := self.own[i]) is not None]
        if not adding:
            return
        x, y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        if uses(Backend.CPU, LOW_RANK, y, x, adding[0].a):
            calls.low_rank(self.table, mixture.struct, x, y)
        else:
            self.add_twin(x, y)

    def add_twin(self, x: Tensor, y: Tensor) -> None:
        """`add` of x (M, K) to y (M, N) in plain PyTorch."""
        mixture = self.mixture
        if len(x) != mixture.total:
            mixture.struct.refused = len(x)
            return
        for i, rows in zip(mixture.which.tolist(), mixture.rows.split(mixture.counts.tolist()), strict=True):
            if (own := self.own[i]) is not None:
                y.index_add_(0, rows, F.linear(x[rows], own.a) @ own.b)
