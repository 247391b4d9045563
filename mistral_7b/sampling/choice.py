"""From adjusted logits to tokens: probabilities as integer weights, and inverse transform sampling.

    w_t = floor(2^n exp((l_t - max l) / temperature))            then min_p, top_k, top_p set small weights to 0
    the token is the first whose cumulative sum w_0 + ... + w_t exceeds u (w_0 + ... + w_(V-1))

Integer sums do not depend on their order, so a row's token is the same on every device and beside any other rows.
u in [0, 1) is a hash of (seed, completion, position), see `uniforms`.

R rows · D sampled rows, the others are greedy · N filtered rows, with min_p, top_k or top_p · V vocabulary
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .params import SamplingParams

ALL = (0, 0, 1)  # values of min_p, top_k and top_p that keep every token
CANDIDATES = 1024  # tokens of a row that a CPU sorts at first; few rows need more


def select_tokens(logits: Tensor, modes: SamplingModes, u: Tensor) -> Tensor:
    """Choose a token for each row of adjusted logits (R, V) by u (R,) float64: ids (R,), -1 as in sample_rows."""
    if modes.any_greedy:
        best, tokens = logits.max(-1)  # the first of equal logits; NaN propagates
    else:
        best = logits.amax(-1)
        tokens = torch.empty_like(best, dtype=torch.long)
    if modes.any_sampled:
        weights = integer_weights(logits[modes.sampled], best[modes.sampled], modes)
        tokens[modes.sampled] = choose(weights, u[modes.sampled])
    return torch.where(best.isfinite(), tokens, -1)


def integer_weights(logits: Tensor, best: Tensor, modes: SamplingModes) -> Tensor:
    """Integer weights (D, V) int64, proportional to probabilities, of logits (D, V) with maxima `best` (D,).

    The most probable token has weight 2^47 for V = 32768, so that V of them can be summed. Tokens that are 10^14
    times less probable have weight 0, as have those that min_p, top_k or top_p exclude.
    """
    t = modes.temperature.to(logits.dtype)
    exponents = (logits / t).double().sub_((best[:, None] / t).double())
    weights = exponents.exp_().mul_(_max_weight(logits.shape[-1])).long()
    if modes.any_filtered:
        cutoff, of = torch.zeros_like(weights[:, :1]), _cutoff_on_cpu if weights.is_cpu else _cutoff
        cutoff[modes.filtered] = of(weights[modes.filtered], modes.min_p, modes.top_k, modes.top_p)
        weights *= torch.ge(weights, cutoff, out=exponents.view(torch.long))  # faster than where() on a CPU
    return weights


def _max_weight(V: int) -> float:
    """The weight of the most probable of V tokens: the largest power of two of which V sum to at most 2^62."""
    return 2.0 ** (62 - (V - 1).bit_length())


def _cutoff(weights: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The smallest weight (N, 1) that is kept of weights (N, V); equal weights are kept too.

    min_p   keeps weights of at least min_p times the highest
    top_k   keeps the k highest
    top_p   keeps, of those, the fewest highest that sum to p
    """
    best = weights.sort(-1, descending=True).values
    least = best.gather(-1, (top_k - 1).clamp(min=0)) * (top_k > 0)
    least = least.maximum((min_p * _max_weight(weights.shape[-1])).long())
    kept = best * (best >= least)
    sums = kept.cumsum(-1)
    inside = sums - kept < top_p * sums[:, -1:]  # where the sum of the higher weights falls short
    return least.maximum(kept.gather(-1, (inside.sum(-1, keepdim=True) - 1).clamp(min=0)))


def _cutoff_on_cpu(weights: Tensor, *params: Tensor) -> Tensor:
    """The same as `_cutoff`, by numpy, which sorts a row seven times as fast as torch."""
    rows = zip(weights.numpy(), *(t[:, 0].tolist() for t in params), strict=True)
    return torch.tensor([_row_cutoff(*row) for row in rows])[:, None]


def _row_cutoff(weights: np.ndarray, min_p: float, top_k: int, top_p: float, most: int = CANDIDATES) -> int:
    """The cutoff of weights (V,): sorts the `most` highest at first, and all of a row that needs more."""
    V = len(weights)
    # With many equal weights (zeros) a full sort is fast and partitioning is slow.
    some = most < V and 2 * np.count_nonzero(weights[::16]) > V // 16
    best = np.sort(np.partition(weights, V - most)[V - most :] if some else weights)[::-1]
    least = max(int(best[min(top_k, len(best)) - 1]) if top_k else 0, int(min_p * _max_weight(V)))
    kept = best[: max(1, np.count_nonzero(best >= least))]
    sums = kept.cumsum()
    total = float(sums[-1] if least else weights.sum())
    last = int(sums[:-1].astype(np.float64).searchsorted(top_p * total))
    if some and len(kept) == most and (least or last == most - 1):  # more weights may be kept
        return _row_cutoff(weights, min_p, top_k, top_p, V)
    return int(kept[last])


def choose(weights: Tensor, u: Tensor) -> Tensor:
    """The token at u (D,) in [0, 1) of the cumulative distribution of weights (D, V) int64: ids (D,).

    Tokens are in order of their ids; one of weight zero is never chosen.
    """
    sums = weights.cumsum(-1)
    total = sums[:, -1]
    target = (u * total).long().minimum(total - 1)
    chosen = torch.searchsorted(sums, target[:, None], right=True)[:, 0]
    return chosen.clamp(max=weights.shape[-1] - 1)  # V only if all weights are zero


def uniforms(seed: int, index: int, position: int, n: int) -> np.ndarray:
    """Random numbers (n,) float64 in [0, 1), a function of seed, index and position alone.

    They sample the tokens of completion `index` from `position` on. Philox4x64 (Salmon et al. 2011, "Parallel
    random numbers: as easy as 1, 2, 3"), a hash of a counter under a key: the first word of each block of four.
    The upper 53 bits are used, so that every value is a float64.
    """
    words = np.random.Philox(key=seed % 2**128, counter=[position, index, 0, 0]).random_raw(4 * n)
    return (words[::4] >> np.uint64(11)) * 2.0**-53


def modes_of(params: Sequence[SamplingParams], vocabulary: int, device: torch.device) -> SamplingModes:
    """The sampling modes of these rows, cached because a step's rows are mostly those of the last step."""
    return _cached_modes(tuple(_settings(p, vocabulary) for p in params), device)


def _settings(p: SamplingParams, vocabulary: int) -> tuple[float, ...]:
    """Temperature, min_p, top_k and top_p; an empty tuple for a greedy row."""
    return () if p.greedy else (p.temperature, p.min_p, p.top_k if 0 < p.top_k < vocabulary else 0, p.top_p)


class SamplingModes:
    """How R rows are sampled, as tensors on their device, which the host never reads back.

    sampled   indices (D,) of the rows that are not greedy; temperature (D, 1)
    filtered  indices (N,) into sampled; min_p, top_k (0: all), top_p (N, 1)

    Indices of all rows are a slice, which copies nothing.
    """

    def __init__(self, settings: Sequence[tuple[float, ...]], device: torch.device) -> None:
        sampled = [i for i, row in enumerate(settings) if row]
        filtered = [n for n, i in enumerate(sampled) if settings[i][1:] != ALL]
        self.any_sampled, self.any_filtered = bool(sampled), bool(filtered)
        self.any_greedy = len(sampled) < len(settings)
        self.sampled = _indices(sampled, len(settings), device)
        self.filtered = _indices(filtered, len(sampled), device)
        if sampled:
            table = to_device([settings[i] for i in sampled], device, np.float64)
            self.temperature = table[:, :1]
            self.min_p, top_k, self.top_p = table[self.filtered, 1:].split(1, dim=1)
            self.top_k = top_k.long()


_cached_modes = functools.lru_cache(maxsize=64)(SamplingModes)


def _indices(some: Sequence[int], n: int, device: torch.device) -> Tensor | slice:
    return slice(None) if len(some) == n else to_device(some, device)


def to_device(values: Sequence[Any] | np.ndarray, device: torch.device, dtype: type = np.int64) -> Tensor:
    """Numbers as a tensor on the device; the host does not wait for the copy."""
    tensor = torch.from_numpy(np.asarray(values, dtype=dtype))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
