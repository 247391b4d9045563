"""Sample tokens for a batch of rows: adjust each row's logits, then choose.

Names, defaults, ranges and order are vLLM's. For one token, from the model's logits:

    logprobs             of the raw logits, before anything below (logprobs.py)
    adjust               logit_bias, banned tokens (min_tokens), penalties, then a grammar's mask
    integer_weights      temperature, then min_p, top_k, top_p: probabilities as integer weights (choice.py)
    choose               a random number u in [0, 1) picks the token at u of the cumulative distribution

A row's token does not depend on the device, nor on the other rows of the call.

R rows · V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .choice import modes_of, select_tokens, to_device
from .params import SamplingParams

ROWS = 8  # rows that a CPU samples at once, which fit its caches
NOT_FINITE = "the model gives logits that are not finite (float16 overflows; try bfloat16)"


class History:
    """The distinct tokens of one sequence and how often each was generated, for penalties; kept on the host.

    tokens (n,) int64; counts (n,) int64, 0 for a token that only the prompt has.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self.tokens = np.unique(np.asarray(prompt, dtype=np.int64))
        self.counts = np.zeros(len(self.tokens), dtype=np.int64)
        self._index = {token: i for i, token in enumerate(self.tokens.tolist())}

    def add(self, token: int) -> None:
        """Count a generated token."""
        i = self._index.setdefault(token, len(self.tokens))
        if i == len(self.tokens):
            self.tokens, self.counts = np.append(self.tokens, token), np.append(self.counts, 0)
        self.counts[i] += 1

    def after(self, tokens: Sequence[int]) -> History:
        """A copy with these tokens added."""
        later = object.__new__(History)
        later.tokens, later.counts, later._index = self.tokens, self.counts.copy(), dict(self._index)
        for token in tokens:
            later.add(token)
        return later


@dataclass(frozen=True)
class Row:
    """How one row of logits is sampled.

    u        random number in [0, 1); unused by a greedy row
    banned   tokens that are excluded, unless a grammar allows no other
    history  the sequence's tokens, for penalties; None penalizes nothing
    allowed  a grammar's bit mask (ceil(V / 32),) int32, with bit t % 32 of element t // 32 for token t; None: all
    """

    params: SamplingParams
    u: float = 0.0
    banned: Sequence[int] = ()
    history: History | None = None
    allowed: np.ndarray | None = None


def sample_rows(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Sample a token for each row of logits (R, V): ids (R,), -1 where the highest logit is NaN or infinite.

    A row's token is that of the row alone. Nothing is read back from a GPU, so the host does not wait for it.
    """
    if logits.device.type == "mps":  # which has no float64
        return sample_rows(logits.cpu(), rows).to(logits.device)
    if logits.device.type == "cpu" and len(rows) > ROWS:
        parts = (rows[i : i + ROWS] for i in range(0, len(rows), ROWS))
        return torch.cat([sample_rows(part, of) for part, of in zip(logits.split(ROWS), parts, strict=True)])
    modes = modes_of([row.params for row in rows], logits.shape[-1], logits.device)
    return select_tokens(
        adjust(logits, rows), modes, to_device([row.u for row in rows], logits.device, np.float64)
    )


def adjust(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Apply biases, bans, penalties and grammar masks to logits (R, V); return the input if there are none."""
    biased = [(i, row.params.logit_bias) for i, row in enumerate(rows) if row.params.logit_bias]
    banned = [(i, tokens) for i, row in enumerate(rows) if (tokens := lift_bans(row.banned, row.allowed))]
    penalized = [(i, row) for i, row in enumerate(rows) if row.history is not None and row.params.penalizes]
    constrained = [(i, row.allowed) for i, row in enumerate(rows) if row.allowed is not None]
    if not (biased or banned or penalized or constrained):
        return logits
    V, device = logits.shape[-1], logits.device
    if biased or banned or penalized:
        logits = logits.clone(memory_format=torch.contiguous_format)
        flat = logits.view(-1)  # token t of row i is at i * V + t; no index occurs twice
    if biased:
        at = to_device([i * V + token for i, bias in biased for token in bias], device)
        flat[at] += to_device([x for _, bias in biased for x in bias.values()], device, np.float64).to(flat.dtype)
    if banned:
        flat[to_device([i * V + token for i, tokens in banned for token in tokens], device)] = -math.inf
    if penalized:
        _penalize(flat, V, penalized)
    if constrained:
        allowed = np.ones((len(rows), V), dtype=bool)
        for i, mask in constrained:
            allowed[i] = np.unpackbits(mask.view(np.uint8), count=V, bitorder="little")
        logits = torch.where(to_device(allowed, device, np.bool_), logits, -math.inf)
    return logits


def _penalize(flat: Tensor, V: int, rows: Sequence[tuple[int, Row]]) -> None:
    """Penalize the tokens in these rows' histories, in the flat logits (R * V,), in place."""
    at, counts, penalties = [], [], []
    for i, row in rows:
        assert row.history is not None
        at.append(i * V + row.history.tokens)
        counts.append(row.history.counts)
        penalties.append(
            (row.params.repetition_penalty, row.params.frequency_penalty, row.params.presence_penalty)
        )
    places = to_device(np.concatenate(at), flat.device)
    table = np.repeat(np.array(penalties), [len(tokens) for tokens in at], axis=0)  # a row for each token
    table = np.column_stack([table, np.concatenate(counts)])
    factor, frequency, presence, count = to_device(table, flat.device, np.float64).to(flat.dtype).unbind(1)
    x = flat[places]
    x = torch.where(x > 0, x / factor, x * factor)
    flat[places] = x - frequency * count - presence * count.clamp(max=1)


def lift_bans(banned: Sequence[int], mask: np.ndarray | None) -> Sequence[int]:
    """The bans; none if they exclude all tokens of a mask, because a grammar takes precedence over min_tokens."""
    if mask is None or not banned:
        return banned
    left = mask.copy()
    for token in banned:
        left.view(np.uint8)[token // 8] &= 255 ^ (1 << token % 8)
    return banned if left.any() else ()


def draw_seed() -> int:
    """A seed from torch's generator, so that torch.manual_seed also makes unseeded requests reproducible."""
    return int(torch.randint(2**62, ()))
