"""Small models and inputs of the checks: no two sizes are alike, so that a confused dimension cannot fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..attention import attention, visible
from ..model import Mistral7B, ModelArgs
from .compare import same

SMALL = ModelArgs(
    dim=40,
    n_layers=2,
    head_dim=10,
    hidden_dim=56,
    n_heads=6,
    n_kv_heads=3,
    vocab_size=67,
    sliding_window=8,
    max_seq_len=96,
)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal random numbers, the same in every run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def fill(module: torch.nn.Module, seed: int = 0) -> Any:
    """Random weights for a module, in place: sharp attention, and norm weights that all differ."""
    for i, (name, p) in enumerate(sorted(module.named_parameters())):
        noise = numbers(*p.shape, seed=seed + i)
        scale = (
            1.0
            if "tok_embeddings" in name
            else (2.0 if "wq" in name or "wk" in name else 1.0) / p.shape[-1] ** 0.5
        )
        p.data = (1 + 0.3 * noise if p.dim() == 1 else noise * scale).to(p.dtype)
    return module.requires_grad_(False)


def small_model(dtype: torch.dtype = torch.float32, **changes: Any) -> Mistral7B:
    """The package's model of this shape."""
    return fill(Mistral7B(dataclasses.replace(SMALL, **changes), dtype=dtype, device="cpu"))


def tokens(n: int, seed: int = 1) -> Tensor:
    """Token ids (1, n)."""
    return torch.randint(0, SMALL.vocab_size, (1, n), generator=torch.Generator().manual_seed(seed))


def check_memory(make: Any, window: int | None, chunks: Sequence[int]) -> None:
    """Feed a cache's one layer these chunks, and compare every output with attention over all keys.

    The mistakes of a cache are those of a mask: which keys a query of a chunk sees that it should not, or misses.
    """
    T, H, G, K = sum(chunks), 6, 3, 10
    q, k, v = (numbers(1, T, heads, K, seed=i) for i, heads in enumerate((H, G, G)))
    cache, p, start = make(), torch.arange(T), 0
    for n in chunks:
        stop = start + n
        cache = cache.writable()
        positions = cache.extend(torch.zeros(1, n, dtype=torch.long))
        same(
            positions.broadcast_to(1, n),
            p[None, start:stop],
            f"the positions that extend returns for {n} tokens after {start}",
            {"each step starts at position 0; it continues after the tokens that are cached": p[None, :n]},
        )
        part = slice(start, stop)
        right = visible(p[part], p[:stop], window)
        wider = visible(p[part], p[:stop], None if window is None else window + 1)
        masks = {
            "only the step's own keys are seen, not the cached ones": right & (p[:stop] >= start),
            "the window counts the query's own key: a query sees W keys with its own, here it sees W + 1": wider,
            "every earlier key is seen: there is no window": p[part, None] >= p[:stop],
            "a chunk's later keys are seen by its earlier queries": right | (p[:stop] >= start),
        }
        if window is not None:
            masks["older keys are dropped, or overwritten, before the step's first queries have seen them"] = (
                right & (p[:stop] >= stop - window)
            )
        guesses = {why: attention(q[:, part], k[:, :stop], v[:, :stop], m[None]) for why, m in masks.items()}
        zeros = torch.zeros(1, max(0, (window or 0) - stop), G, K)
        padded = torch.cat([right, torch.ones(n, zeros.shape[1], dtype=torch.bool)], 1)[None]
        guesses["empty slots are attended as if they held keys"] = attention(
            q[:, part], torch.cat([k[:, :stop], zeros], 1), torch.cat([v[:, :stop], zeros], 1), padded
        )
        out = cache.layers[0].attend(q[:, part], k[:, part], v[:, part])
        expected = attention(q[:, part], k[:, :stop], v[:, :stop], right[None])
        what = f"W = {window}, {n} tokens after {start} cached ones: attend(q, k, v)"
        same(out, expected, what, guesses, tolerance=1e-4)
        start = stop
