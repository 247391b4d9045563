"""The bytes of a KV page, all layers one after another."""

from __future__ import annotations

import torch
from torch import Tensor

from .pages import PagePool


def page_bytes(pool: PagePool) -> int:
    """The bytes of a page in all layers."""
    return sum(t[pool.scratch].nbytes for entries in pool.layers for t in entries)


def contents_of(pool: PagePool, page: int) -> Tensor:
    """A copy of a page's bytes in all layers, uint8 (page_bytes,), on the pool's device."""
    return torch.cat([t[page].view(torch.uint8).flatten() for entries in pool.layers for t in entries])


def fill(pool: PagePool, page: int, contents: Tensor) -> None:
    """Overwrite a page with what `contents_of` returned."""
    contents, at = contents.to(pool.layers[0][0].device), 0
    for entries in pool.layers:
        for t in entries:
            own = t[page].view(torch.uint8)
            own.copy_(contents[at : at + own.numel()].view(own.shape))
            at += own.numel()
