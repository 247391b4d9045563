"""How much memory the KV pages get. Imports no torch before pages are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..distributed import ranks
from ..errors import ConfigError
from ..machine import memory
from .config import EngineConfig

if TYPE_CHECKING:
    from ..model import Mistral7B
    from .pages import PagePool

CPU_SHARE, ACCELERATOR_SHARE = 0.5, 0.9  # of free memory, for pages


def pool_for(model: Mistral7B, config: EngineConfig, lengths: Sequence[int] | None = None) -> PagePool:
    """Allocate a model's KV pages: `kv_cache_bytes`, or a share of free memory. ConfigError if no page fits.

    Without `kv_cache_bytes`, at most as many as `max_sequences` sequences of full context use. If the `lengths` of
    all future sequences are known, at most as many as these use, and at least as many as the longest uses.
    """
    import torch

    from .pages import PagePool
    from .window import most_pages

    args, p, page = model.args, model.norm.weight, config.page_size
    int8 = config.kv_dtype == "int8"
    row = (
        args.head_dim + 4 if int8 else args.head_dim * p.dtype.itemsize
    )  # bytes of a head, in int8 with its scale
    page_bytes = 2 * args.n_layers * args.n_kv_heads * row * page
    known = [args.max_seq_len] * config.max_sequences if lengths is None else lengths
    needs = sorted((most_pages(n, args.sliding_window, config) for n in known), reverse=True) or [1]
    # The scheduler admits a sequence only if one more page for each running one is free.
    most = sum(needs[: config.max_sequences]) + (0 if lengths is None else config.max_sequences)
    if config.kv_cache_bytes is not None:
        n_pages = config.kv_cache_bytes // page_bytes
    else:
        cpu = p.device.type == "cpu"
        free = memory()[1] if cpu else torch.cuda.mem_get_info(p.device)[0] if p.is_cuda else 0
        share = (free or 4 << 30) * (CPU_SHARE / ranks.sharing() if cpu else ACCELERATOR_SHARE)
        n_pages = min(max(int(share) // page_bytes, 0 if lengths is None else needs[0]), most)
    n_pages = ranks.least(n_pages)  # or ranks would preempt at different steps
    if n_pages < 1:
        raise ConfigError(
            f"{config.kv_cache_bytes or 'the free'} bytes for keys and values hold no page of {page} tokens",
            field="kv_cache_bytes",
            hint=f"raise kv_cache_bytes: a page takes {page_bytes}",
        )
    return PagePool(
        args.n_layers, args.n_kv_heads, args.head_dim, n_pages, page, dtype=p.dtype, device=p.device, int8=int8
    )
