"""Tensors in huge pages: reading weights from them is up to a sixth faster.

The CPU's prefetchers do not cross a page of 4 KB, and each page needs its own TLB entry. The system provides huge
pages of 2 MB for anonymous memory on request, but not for mapped files.
"""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

HUGE = 2**21  # bytes


def empty(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """An uninitialized CPU tensor, in huge pages if it is large enough and the system supports them."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    mapping = mmap.mmap(-1, nbytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # allocated on first write
    flat = torch.frombuffer(mapping, dtype=torch.uint8)  # keeps a reference to the mapping
    begin = -flat.data_ptr() % HUGE
    with contextlib.suppress(OSError):  # not supported by all systems; the remainder uses small pages
        mapping.madvise(mmap.MADV_HUGEPAGE, begin, nbytes // HUGE * HUGE)
    return flat[begin : begin + nbytes].view(dtype).view(shape)


def copied(value: Tensor) -> Tensor:
    """A copy of a tensor, in huge pages if it is on a CPU."""
    return empty(value.shape, value.dtype).copy_(value) if value.device.type == "cpu" else value.clone()
