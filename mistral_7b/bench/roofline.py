"""Measure this machine's ceilings: memory bandwidth and matrix product throughput.

Bandwidth is measured by reading a buffer much larger than the last-level cache, in huge pages, with all threads
and the fastest of several loops: our own loop with prefetching, and reductions of PyTorch. The peaks are products
of large matrices: PyTorch's in float32, oneDNN's in bfloat16, and in int8 this package's kernel, including the
quantization of its activations. (Where oneDNN lacks an int8 kernel for a CPU, it runs a reference loop, a thousand
times slower.) No workload here should exceed these ceilings by more than the measurement error of 1 to 3%.

Every probe has a time limit, which it also keeps on unknown CPUs: work starts small and grows while the next run
is expected to fit.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ..machine import last_level_cache, memory

if TYPE_CHECKING:
    from torch import Tensor

PROBES = ("read_bandwidth", "fp32", "bf16", "int8")  # in the order of measurement
SECONDS = 1.5  # per probe; a fifth with `quick`
LEAST = 0.2  # seconds: a shorter probe underestimates the ceiling
CHUNK = 64 << 20  # bytes of the buffer filled per step
GROWTH = 4  # growth factor of a product's rows


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Bytes per second, and operations per second by type; None for unsupported types."""

    read_bandwidth: float
    fp32: float
    bf16: float | None = None
    int8: float | None = None
    threads: int = 1

    def peak(self, scheme: str) -> float:
        """Return the peak operations per second for the products of a scheme.

        The peak is at least that of more precise types, which could do the same work: on a CPU without bf16
        instructions float32 is faster.
        """
        integers = scheme not in ("bf16", "none", "BF16")
        return max(self.fp32, self.bf16 or 0, (self.int8 or 0) if integers else 0)

    def best(self, other: Ceilings) -> Ceilings:
        """Return the maximum of two measurements of one machine, field by field."""
        return Ceilings(
            max(self.read_bandwidth, other.read_bandwidth), max(self.fp32, other.fp32),
            max(self.bf16 or 0, other.bf16 or 0) or None, max(self.int8 or 0, other.int8 or 0) or None,
            self.threads,
        )  # fmt: skip


def measure(quick: bool = False, until: float | None = None) -> Iterator[tuple[str, float | None]]:
    """Yield each of PROBES as soon as it is measured; uses 2 GB of memory if free.

    `until` (as time.time()) is a deadline shared by the remaining probes; those that no longer fit are skipped.
    None gives each probe its full time.
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
    """Return the buffer size: 4 times the last-level cache, >= 2 GB, <= 1/4 of free memory."""
    size = max(2 << 30, 4 * last_level_cache())
    free = memory()[1] or 4 << 30
    return max(CHUNK, min(size, free // 4)) >> 20 << 20


def read_bandwidth(size: int | None = None, seconds: float = SECONDS) -> float:
    """Return the bytes per second of reading `size` bytes with all threads, best of all loops.

    The buffer is smaller where filling it would exceed `seconds`.
    """
    import torch

    from ..kernels.backend import READ, Backend, uses
    from ..kernels.cpu import calls, huge_pages

    words = _filled(huge_pages.empty(((size or buffer_bytes()) // 4,), torch.int32), seconds)
    numbers, size = words.view(torch.float32), words.nbytes
    half = numbers.numel() // 2
    loops: list[Callable[[], object]] = [
        lambda: words.amax(),
        lambda: numbers.amax(),
        lambda: torch.dot(numbers[:half], numbers[half:]),
    ]
    if uses(Backend.CPU, READ, numbers):
        loops.insert(0, lambda: calls.read(words))
    return size / _shortest(loops, seconds)


def _filled(words: Tensor, seconds: float) -> Tensor:
    """Fill a buffer for at most `seconds`; return the filled part, at least the first chunk."""
    end, done = time.perf_counter() + seconds, 0
    for part in words.split(CHUNK // words.itemsize):
        part.fill_(1)
        done += len(part)
        if time.perf_counter() > end:
            break
    return words[:done]


def _shortest(loops: Sequence[Callable[[], object]], seconds: float) -> float:
    """Return the time of the fastest run, cycling through loops while the next run should fit."""
    end, best = time.perf_counter() + seconds, float("inf")
    for loop in itertools.cycle(loops):
        began = time.perf_counter()
        loop()
        now = time.perf_counter()
        best = min(best, now - began)
        if now + (now - began) > end:
            return best
    raise AssertionError("no loops to measure")


def fp32_peak(side: int, rows: int, seconds: float = SECONDS) -> float:
    """Return the operations per second of PyTorch's float32 matrix product."""
    import torch.nn.functional as F

    w, x = _random(side, side), _random(rows, side)
    return 2 * side * side * _most(lambda m: F.linear(x[:m], w), rows, seconds)


def bf16_peak(side: int, rows: int, seconds: float = SECONDS) -> float | None:
    """Return the operations per second of a bfloat16 product, prepacked for oneDNN if possible."""
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
    """Return the operations per second of this package's int8 product; None if not compiled.

    The time includes the quantization of activations.
    """
    import torch

    from ..kernels import block_formats
    from ..kernels.backend import QUANTIZED_LINEAR, Backend, uses
    from ..kernels.linear import block_linear

    x = _random(rows, side).to(torch.bfloat16)
    if not uses(Backend.CPU, QUANTIZED_LINEAR, x):
        return None
    q = _random(side, side).mul_(40).add_(128).clamp_(1, 255).to(torch.uint8)
    codes, d = block_formats.tile("Q8_0", q, None, torch.ones(side, side // 32, 1, dtype=torch.float16))
    return 2 * side * side * _most(lambda m: block_linear(x[:m], codes, d, side, "Q8_0"), rows, seconds)


def _random(rows: int, columns: int) -> Tensor:
    """Return random numbers, repeated in each row: speed does not depend on them."""
    import torch

    return torch.randn(columns).repeat(rows, 1)


def _most(work: Callable[[int], object], most: int, seconds: float) -> float:
    """Return the peak rows per second of work(rows), growing rows from 1 to `most`.

    Each run has at most GROWTH times the rows of the previous one, so that its duration can be predicted.
    """
    end, rows, best = time.perf_counter() + seconds, 1, 0.0
    work(rows)  # warmup: starts threads and initializes
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
