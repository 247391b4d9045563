"""What this machine could do at best, measured: bytes read a second, and operations of a matrix product.

The bandwidth is that of reading a buffer far beyond the last cache with all threads, in huge pages, by the
fastest of several loops: ours, which asks ahead of time for what it reads, and PyTorch's reductions. The peaks
are oneDNN's products of large matrices (AMX or VNNI where the CPU has them). What runs here may not pass them,
up to what measuring leaves open: 1 to 3%.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from .machine import last_level_cache, memory

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Bytes a second, and operations a second by type; a type that this machine cannot do is None."""

    read_bandwidth: float
    fp32: float
    bf16: float | None = None
    int8: float | None = None
    threads: int = 1

    def peak(self, scheme: str) -> float:
        """Operations a second at best for the products of a scheme.

        Never below that of a more exact type, which could do the same work: on a CPU without bf16
        instructions float32 is faster.
        """
        integers = scheme in ("int4", "int8", "Q4_0", "Q8_0")
        return max(self.fp32, self.bf16 or 0, (self.int8 or 0) if integers else 0)

    def best(self, other: Ceilings) -> Ceilings:
        """The better of two measurements of one machine, by each figure."""
        return Ceilings(
            max(self.read_bandwidth, other.read_bandwidth), max(self.fp32, other.fp32),
            max(self.bf16 or 0, other.bf16 or 0) or None, max(self.int8 or 0, other.int8 or 0) or None,
            self.threads,
        )  # fmt: skip


def measure(threads: int | None = None, quick: bool = False) -> Ceilings:
    """Measure all of them; some seconds, and 2 GB of memory where there is as much."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    with torch.inference_mode():
        side, rows = (1024, (512,)) if quick else (4096, (512, 1024))
        return Ceilings(
            read_bandwidth=read_bandwidth(), threads=torch.get_num_threads(),
            fp32=fp32_peak(side, rows), bf16=bf16_peak(side, rows), int8=int8_peak(side, rows),
        )  # fmt: skip


def buffer_bytes() -> int:
    """Four times the last cache and 2 GB at least, so that it holds little; a quarter of free memory at most."""
    wanted = max(2 << 30, 4 * last_level_cache())
    free = memory()[1] or 4 << 30
    return max(64 << 20, min(wanted, free // 4)) >> 20 << 20


def read_bandwidth(size: int | None = None, seconds: float = 1.5) -> float:
    """Bytes a second of reading `size` bytes with as many threads as PyTorch has: the best of several ways."""
    import torch

    from ..kernels import compiler, pages

    size = size or buffer_bytes()
    words = pages.empty((size // 4,), torch.int32).fill_(1)
    numbers = words.view(torch.float32)
    half = numbers.numel() // 2
    ways: list[Callable[[], object]] = [
        lambda: words.amax(),
        lambda: numbers.amax(),
        lambda: torch.dot(numbers[:half], numbers[half:]),
    ]
    if (kernels := compiler.library()) is not None:
        ways.append(lambda: kernels.m7b_read(words.data_ptr(), size, torch.get_num_threads()))
    return size / min(_best(way, seconds / len(ways)) for way in ways)


def fp32_peak(side: int, rows: tuple[int, ...]) -> float:
    """float32 matrix product, operations a second."""
    import torch
    import torch.nn.functional as F

    w = torch.randn(side, side)
    return _peak(lambda x: F.linear(x, w), lambda m: torch.randn(m, side), side, rows)


def bf16_peak(side: int, rows: tuple[int, ...]) -> float | None:
    """bfloat16 product with the weight packed once for oneDNN; by the plain operator where it cannot be packed."""
    import torch
    import torch.nn.functional as F

    w = torch.randn(side, side).to(torch.bfloat16)

    def make(m: int) -> Tensor:
        return torch.randn(m, side).to(torch.bfloat16)

    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(w, None)

        def product(x: Tensor) -> Tensor:
            return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

        return _peak(product, make, side, rows)
    except (RuntimeError, AttributeError, NotImplementedError):
        return _peak(lambda x: F.linear(x, w), make, side, rows)


def int8_peak(side: int, rows: tuple[int, ...]) -> float | None:
    """int8 product into int32 sums, through oneDNN; None where it has none for this CPU."""
    import torch

    w = torch.randint(-127, 128, (side, side), dtype=torch.int8)
    ones, zeros = torch.ones(side), torch.zeros(side, dtype=torch.long)
    try:
        packed = torch.ops.onednn.qlinear_prepack(w, None)

        def product(x: Tensor) -> Tensor:
            return torch.ops.onednn.qlinear_pointwise(
                x, 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
            )

        return _peak(product, lambda m: torch.randint(-127, 128, (m, side), dtype=torch.int8), side, rows)
    except (RuntimeError, AttributeError, NotImplementedError):
        return None


def _peak(
    product: Callable[[Tensor], Tensor], make: Callable[[int], Tensor], side: int, rows: tuple[int, ...]
) -> float:
    """The best over numbers of rows, of a (rows, side) by (side, side) product."""
    return max(2 * m * side * side / _best(_with(product, make(m)), 0.4) for m in rows)


def _with(product: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    return lambda: product(x)


def _best(work: Callable[[], object], seconds: float) -> float:
    """The shortest of the runs that fit into so many seconds, after one to warm up: three at least."""
    work()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)
