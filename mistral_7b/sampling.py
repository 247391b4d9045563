"""From logits to a token: what may be asked, what is done to the logits, and the choice.

Names, defaults, ranges and order are vLLM's. For one token, from the model's logits:

    log-probabilities    of the raw logits, before anything below
    allow                -inf for tokens that a grammar leaves out
    adjust               logit_bias, banned tokens (min_tokens), then penalties
    narrow               temperature, then min_p, top_k, top_p
    choose               one number u in [0, 1) picks the token at u of the cumulative distribution

u is a function of (seed, which of the n completions, which token), so a completion does not depend on
what is sampled beside it or before it. Every function works on rows alone: (..., V) in, each row's
result the same to the bit whatever other rows there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .sampling_params import SamplingParams as SamplingParams  # where it can be read without torch

CANDIDATES = 512  # top_p first tries with so many: sorting a whole vocabulary takes 2 ms on a CPU


class History:
    """Which tokens stand in the prompts (B, V), and how often each in the outputs (B, V)."""

    def __init__(self, prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device | str) -> None:
        self.prompt = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
        for row, prompt in zip(self.prompt, prompts, strict=True):
            row[torch.tensor(prompt, dtype=torch.long, device=device)] = True
        self.counts = torch.zeros(len(prompts), vocab_size, dtype=torch.int32, device=device)

    def add(self, tokens: Tensor, rows: Sequence[int] | None = None) -> None:
        """Count one new token (B,) of each row, or of these rows."""
        at = torch.arange(len(self.counts)) if rows is None else torch.tensor(rows)
        self.counts[at.to(tokens.device), tokens] += 1

    def select(self, rows: Sequence[int]) -> History:
        """The history of these rows, in this order."""
        part = object.__new__(History)
        part.prompt, part.counts = self.prompt[list(rows)], self.counts[list(rows)]
        return part


def adjust(
    logits: Tensor, params: SamplingParams, banned: Sequence[int] = (), history: History | None = None
) -> Tensor:
    """Logits (..., V) with bias, bans and penalties. These can change which token is the most probable."""
    if params.logit_bias:
        tokens = torch.tensor(list(params.logit_bias), device=logits.device)
        values = torch.tensor(list(params.logit_bias.values()), dtype=logits.dtype, device=logits.device)
        logits = logits.index_add(-1, tokens, values.expand(*logits.shape[:-1], -1))
    if banned:
        logits = logits.index_fill(-1, torch.tensor(list(banned), device=logits.device), -math.inf)
    if params.penalizes and history is not None:
        known = history.prompt | (history.counts > 0)
        factor = params.repetition_penalty
        repeated = torch.where(logits > 0, logits / factor, logits * factor)
        logits = torch.where(known, repeated, logits)
        counts = history.counts.to(logits.dtype)
        logits = logits - params.frequency_penalty * counts - params.presence_penalty * counts.clamp(max=1)
    return logits


def allow(logits: Tensor, masks: Sequence[np.ndarray | None]) -> Tensor:
    """Logits (R, V) with -inf for tokens that a row's mask leaves out; a row without a mask stays as it is.

    A mask (ceil(V / 32),) int32 holds a bit for each token, the lowest of the first number for token 0.
    """
    rows = [row for row, mask in enumerate(masks) if mask is not None]
    if not rows:
        return logits
    packed = np.stack([mask for mask in masks if mask is not None]).view(
        np.uint8
    )  # 4 bytes a number, lowest first
    bits = torch.from_numpy(packed).to(logits.device)[..., None] >> torch.arange(
        8, dtype=torch.uint8, device=logits.device
    )  # (len(rows), bytes, 8)
    allowed = (bits & 1).flatten(1).bool()[:, : logits.shape[-1]]
    if len(rows) == len(logits):
        return logits.masked_fill(~allowed, -math.inf)
    at = torch.tensor(rows, device=logits.device)
    return logits.index_copy(0, at, logits[at].masked_fill(~allowed, -math.inf))


def lift(banned: Sequence[int], mask: np.ndarray | None) -> Sequence[int]:
    """The bans, or none where they would leave no token of a mask: a grammar comes before min_tokens."""
    if mask is None or not banned:
        return banned
    left = mask.copy()
    for token in banned:
        left.view(np.uint8)[token // 8] &= 255 ^ (1 << token % 8)
    return banned if left.any() else ()


def narrow(logits: Tensor, params: SamplingParams, candidates: int = CANDIDATES) -> Tensor:
    """Logits (..., V) over the temperature, and -inf for tokens that min_p, top_k or top_p leave out."""
    logits = logits / params.temperature
    if params.min_p > 0:
        logits = keep_min_p(logits, params.min_p)
    if 0 < params.top_k < logits.shape[-1]:
        logits = keep_top_k(logits, params.top_k)
    if params.top_p < 1:
        logits = keep_top_p(logits, params.top_p, candidates)
    return logits


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """-inf for tokens less than p times as probable as the most probable one."""
    return _cut(logits, logits.amax(-1, keepdim=True) + math.log(p))


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf for all but the k highest logits, and those equal to the k-th."""
    return _cut(logits, logits.topk(k).values[..., -1:])


def keep_top_p(logits: Tensor, p: float, candidates: int = CANDIDATES) -> Tensor:
    """-inf for all but the fewest most probable tokens that sum to p, and those equal to their last.

    Tries with so many `candidates` first; with V of them the device is asked for nothing.
    """
    weights = _weights(logits)
    total = weights.cumsum(-1)[..., -1:]
    k = min(candidates, logits.shape[-1])
    while True:
        best = weights.topk(k)
        before = best.values.cumsum(-1) - best.values  # the sum of all more probable ones
        inside = before < p * total
        if k == logits.shape[-1] or not bool(inside[..., -1].any()):
            break
        k = logits.shape[-1]
    last = inside.sum(-1, keepdim=True) - 1
    return _cut(logits, logits.gather(-1, best.indices.gather(-1, last)))


def _cut(logits: Tensor, least: Tensor) -> Tensor:
    return logits.masked_fill(logits < least, -math.inf)


def _weights(logits: Tensor) -> Tensor:
    """Probabilities up to a factor, in float64: (..., V) with 1 for the most probable token."""
    logits = logits.double()
    return (logits - logits.amax(-1, keepdim=True)).exp()


def choose(logits: Tensor, u: Tensor) -> Tensor:
    """The token at u (...) in [0, 1) of the cumulative distribution of logits (..., V): ids (...).

    Tokens lie in the order of their ids; one of probability zero is never chosen.
    """
    cumulative = _weights(logits).cumsum(-1)  # float64, and in the order of ids: the same for any batch
    total = cumulative[..., -1]
    target = torch.minimum(u.to(total) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target[..., None], right=True)[..., 0]


def uniform(seed: int, index: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments: token `position` of completion `index`.

    Philox4x64 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), a hash of a counter
    under a key. The upper 53 bits are used, so that every value is a float64.
    """
    block = np.random.Philox(key=seed % 2**128, counter=[position, index, 0, 0]).random_raw()
    return (block >> 11) * 2.0**-53


def draw_seed() -> int:
    """A fresh seed from torch's generator, so that torch.manual_seed makes unseeded requests repeat too."""
    return int(torch.randint(2**62, ()))


def sample(
    logits: Tensor,
    params: SamplingParams,
    u: Sequence[float],
    banned: Sequence[int] = (),
    history: History | None = None,
) -> Tensor:
    """One token for each row of logits (B, V): ids (B,). `u` is a number in [0, 1) per row."""
    logits = adjust(logits, params, banned, history)
    if params.greedy:
        return logits.argmax(-1)
    if logits.device.type == "mps":  # which has no float64
        return choose(narrow(logits.cpu(), params), torch.tensor(u, dtype=torch.float64)).to(logits.device)
    return choose(narrow(logits, params), torch.tensor(u, dtype=torch.float64, device=logits.device))


class Logprob(NamedTuple):
    """A token's log-probability, its rank (1: the most probable), and the token as text if that is known."""

    logprob: float
    rank: int
    decoded_token: str | None = None


def logprobs(
    logits: Tensor, tokens: Tensor, k: int, piece: Callable[[int], str] | None = None
) -> list[dict[int, Logprob]]:
    """For each row of raw logits (R, V): its token (R,) first, then the k most probable ones; -1: all."""
    table = logits.float().log_softmax(-1)  # (R, V)
    chosen = table.gather(-1, tokens[:, None])
    ranks = ((table > chosen).sum(-1) + 1).tolist()
    best = table.topk(table.shape[-1] if k < 0 else min(k, table.shape[-1]))
    rows = zip(
        tokens.tolist(), chosen[:, 0].tolist(), ranks, best.indices.tolist(), best.values.tolist(), strict=True
    )
    out = []
    for token, value, rank, ids, values in rows:
        places = {token: (value, rank)}
        places.update({t: (v, r) for r, (t, v) in enumerate(zip(ids, values, strict=True), 1) if t != token})
        out.append({t: Logprob(v, r, piece(t) if piece else None) for t, (v, r) in places.items()})
    return out
