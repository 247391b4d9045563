"""What this machine could do at best, measured: bytes read a second, and operations of a matrix product.

The bandwidth is that of reading a buffer far beyond the last cache with all threads, in huge pages, by the
fastest of several loops: ours, which asks ahead of time for what it reads, and PyTorch's reductions. The peaks
are products of large matrices: PyTorch's in float32, oneDNN's in bfloat16, and in int8 this package's own kernel,
its rounding of the activations included. (Where oneDNN has no int8 product for a CPU it runs a reference loop, a
thousand times slower.) What runs here may not pass them, up to what measuring leaves open: 1 to 3%.

Every probe has a time, and keeps to it on a CPU that it knows nothing of: work begins small and grows as long as
the next run is expected to fit.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from .machine import last_level_cache, memory

if TYPE_CHECKING:
    from torch import Tensor

PROBES = ("read_bandwidth", "fp32", "bf16", "int8")  # in the order in which they are measured
SECONDS = 1.5  # of a probe; a quick one takes a fifth
LEAST = 0.2  # seconds: in less a probe would find less than there is
CHUNK = 64 << 20  # bytes of the buffer that are filled at a time
GROWTH = 4  # rows of a product, over those of the one before


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


def measure(quick: bool = False, until: float | None = None) -> Iterator[tuple[str, float | None]]:
    """Each of PROBES as soon as it is measured: some seconds, and 2 GB of memory where there is as much.

    `until`, by the clock of time.time(), is shared by those that are left, and what cannot be measured well in
    that time is not; none: each has the time it takes at best.
    """
    import torch

    side, rows = (1024, 512) if quick else (4096, 1024)
    probes: tuple[Callable[[float], float | None], ...] = (
        lambda seconds: read_bandwidth(seconds=seconds),
        lambda seconds: fp32_peak(side, rows, seconds),
        lambda seconds: bf16_peak(side, rows, seconds),
        lambda seconds: int8_peak(side, rows, seconds),
    )
    for n, (name, probe) in enumerate(zip(PROBES, probes, strict=True)):
        share = SECONDS if until is None else (until - time.time()) / (len(PROBES) - n)
        if share < LEAST:
            return
        with torch.inference_mode():
            value = probe(min(share, SECONDS / 5 if quick else SECONDS))
        yield name, value


def buffer_bytes() -> int:
    """Four times the last cache and 2 GB at least, so that it holds little; a quarter of free memory at most."""
    wanted = max(2 << 30, 4 * last_level_cache())
    free = memory()[1] or 4 << 30
    return max(CHUNK, min(wanted, free // 4)) >> 20 << 20


def read_bandwidth(size: int | None = None, seconds: float = SECONDS) -> float:
    """Bytes a second of reading `size` bytes with as many threads as PyTorch has: the best of several ways.

    Less is read where to fill that takes longer than it may be read for.
    """
    import torch

    from ..kernels.backend import READ, Backend, uses
    from ..kernels.cpu import calls, huge_pages

    words = _filled(huge_pages.empty(((size or buffer_bytes()) // 4,), torch.int32), seconds)
    numbers, size = words.view(torch.float32), words.nbytes
    half = numbers.numel() // 2
    ways: list[Callable[[], object]] = [
        lambda: words.amax(),
        lambda: numbers.amax(),
        lambda: torch.dot(numbers[:half], numbers[half:]),
    ]
    if uses(Backend.CPU, READ, numbers):
        ways.insert(0, lambda: calls.read(words))
    return size / _shortest(ways, seconds)


def _filled(words: Tensor, seconds: float) -> Tensor:
    """As much of a buffer as is filled in so many seconds: its first part at least."""
    end, done = time.perf_counter() + seconds, 0
    for part in words.split(CHUNK // words.itemsize):
        part.fill_(1)
        done += len(part)
        if time.perf_counter() > end:
            break
    return words[:done]


def _shortest(ways: Sequence[Callable[[], object]], seconds: float) -> float:
    """Seconds of the fastest run, the ways taking turns while another run is expected to fit."""
    end, best = time.perf_counter() + seconds, float("inf")
    for way in itertools.cycle(ways):
        began = time.perf_counter()
        way()
        now = time.perf_counter()
        best = min(best, now - began)
        if now + (now - began) > end:
            return best
    raise AssertionError("there is a way at least")


def fp32_peak(side: int, rows: int, seconds: float = SECONDS) -> float:
    """float32 matrix product, operations a second."""
    import torch.nn.functional as F

    w, x = _random(side, side), _random(rows, side)
    return 2 * side * side * _most(lambda m: F.linear(x[:m], w), rows, seconds)


def bf16_peak(side: int, rows: int, seconds: float = SECONDS) -> float | None:
    """bfloat16 product with the weight packed once for oneDNN; by the plain operator where it cannot be packed."""
    import torch
    import torch.nn.functional as F

    w, x = _random(side, side).to(torch.bfloat16), _random(rows, side).to(torch.bfloat16)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(w, None)

        def product(m: int) -> Tensor:
            return torch.ops.mkldnn._linear_pointwise(x[:m], packed, None, "none", [], "")

        return 2 * side * side * _most(product, rows, seconds)
    except (RuntimeError, AttributeError, NotImplementedError):
        return 2 * side * side * _most(lambda m: F.linear(x[:m], w), rows, seconds)


def int8_peak(side: int, rows: int, seconds: float = SECONDS) -> float | None:
    """int8 product by this package's kernel, its inputs' rounding included; None where it is not compiled."""
    import torch

    from ..kernels import layout
    from ..kernels.backend import QUANTIZED_LINEAR, Backend, uses
    from ..kernels.linear import int8_linear

    scale, x = torch.ones(side), _random(rows, side).to(torch.bfloat16)
    if not uses(Backend.CPU, QUANTIZED_LINEAR, x):
        return None
    codes = layout.tile_int8(_random(side, side).mul_(40).add_(128).clamp_(1, 255).to(torch.uint8))
    return 2 * side * side * _most(lambda m: int8_linear(x[:m], codes, scale, side), rows, seconds)


def _random(rows: int, columns: int) -> Tensor:
    """Random numbers, each row the same: speed does not depend on them, and to draw more would take its time."""
    import torch

    return torch.randn(columns).repeat(rows, 1)


def _most(work: Callable[[int], object], most: int, seconds: float) -> float:
    """Rows a second of work(rows), at best. Rows grow from 1 to `most` while the next run is expected to fit.

    Each has GROWTH times the rows of the one before it, so that none is started whose length nothing tells of.
    """
    end, rows, best = time.perf_counter() + seconds, 1, 0.0
    work(rows)  # starts threads, and makes what is made once
    while True:
        began = time.perf_counter()
        work(rows)
        took = time.perf_counter() - began
        best = max(best, rows / took)
        left = end - time.perf_counter()
        if rows < most and GROWTH * took < left:
            rows = min(most, GROWTH * rows)
        elif took > left:
            return best
