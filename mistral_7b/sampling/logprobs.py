"""Log-probabilities of raw logits: of the chosen token and its top-k alternatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LOGPROB_ROWS = 64  # rows whose logits exist at once for a prompt: 8 MB for 32768 tokens


class Logprob(NamedTuple):
    """A token's log-probability, its rank (1: the most probable), and its text; None without a tokenizer."""

    logprob: float
    rank: int
    decoded_token: str | None = None


class Score(NamedTuple):
    """A given token's log-probability, and whether it is the most probable one (of equals: the lowest id)."""

    logprob: float
    greedy: bool


def scores(logits: Tensor, ids: Tensor) -> list[Score]:
    """The scores of ids (R,) by raw logits (R, V)."""
    table = logits.float().log_softmax(-1)
    chosen = table.gather(-1, ids[:, None])[:, 0].tolist()
    return list(map(Score, chosen, (table.argmax(-1) == ids).tolist()))


def logprobs(
    logits: Tensor, tokens: Tensor, k: int | Sequence[int], piece: Callable[[int], str] | None = None
) -> list[dict[int, Logprob]]:
    """For each row of raw logits (R, V): its token (R,) first, then the k most probable tokens; k = -1 is all.

    k is for all rows, or one for each. Equally probable tokens are ordered by id, so a row's result does not
    depend on the k of other rows.
    """
    R, V = logits.shape
    each = [k] * R if isinstance(k, int) else list(k)
    each = [V if number < 0 else min(number, V) for number in each]
    table = logits.float().log_softmax(-1)  # (R, V)
    chosen = table.gather(-1, tokens[:, None])
    ranks = ((table > chosen).sum(-1) + 1).tolist()
    best = _first(table, max(each, default=0))
    values = table.gather(-1, best).tolist()
    rows = zip(each, tokens.tolist(), chosen[:, 0].tolist(), ranks, best.tolist(), values, strict=True)
    out = []
    for top, token, value, rank, ids, found in rows:
        entries = {token: (value, rank)}
        ranked = enumerate(zip(ids[:top], found[:top], strict=True), 1)
        entries.update({t: (v, r) for r, (t, v) in ranked if t != token})
        out.append({t: Logprob(v, r, piece(t) if piece else None) for t, (v, r) in entries.items()})
    return out


def following_logprobs(
    project: Callable[[Tensor], Tensor], hidden: Tensor, ids: Tensor, k: int, piece: Callable[[int], str] | None
) -> list[dict[int, Logprob]]:
    """Log-probabilities of ids (T,) after hidden (T, D); `project` gets few rows at a time, never (T, V)."""
    out: list[dict[int, Logprob]] = []
    for h, t in zip(hidden.split(LOGPROB_ROWS), ids.split(LOGPROB_ROWS), strict=True):
        out += logprobs(project(h), t, k, piece)
    return out


def _first(table: Tensor, k: int) -> Tensor:
    """Ids (R, k) of the k highest log-probabilities (R, V); of equal ones, the lower ids first.

    Bit patterns of non-negative floats are ordered as their values. With the id in the low bits, all keys differ.
    """
    bits = (0 - table).view(torch.int32).long() << 32
    ids = torch.arange(table.shape[-1], device=table.device)
    return (bits | ids).topk(k, largest=False).values & (2**32 - 1)
