"""A step in flight: launched, with its tokens still on the device.

    host      plan 2, launch 2, read 1    plan 3, launch 3, read 2    ...
    device    compute 1 ---------------> compute 2 ----------------> compute 3

A sequence has a token in flight from the launch of the step that samples it until that token is read on the host.
It may be part of the next step already, which reads the token on the device. Random numbers, bans and pages depend
on the token's position alone. Where more is needed (`waits`), tokens are read before the next step is planned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..sampling.choice import to_device
from ..sampling.sampler import Row
from .completion import NO_TOKEN
from .request import SequenceState

Plan = Sequence[tuple[SequenceState, int]]
Rows = Sequence[tuple[int, str | None]]  # of hidden states, with the adapter of each


@dataclass(frozen=True)
class Pick:
    """A token to sample: its sequence, its row of the logits, and the unread or draft tokens before it."""

    sequence: SequenceState
    row: int
    ahead: tuple[int, ...] = ()


@dataclass(frozen=True)
class InFlightStep:
    """A launched step; tokens (R,) and logits (R, V) of its R picks are on the device.

    `began` is the time of its start if its duration is a measure of decoding, otherwise None.
    """

    plan: Plan
    picks: Sequence[Pick]
    tokens: Tensor
    logits: Tensor
    began: float | None = None

    @property
    def sampled(self) -> list[SequenceState]:
        """The sequences for which it samples."""
        return list(dict.fromkeys(pick.sequence for pick in self.picks))


def waits(s: SequenceState) -> bool:
    """Whether a sequence's tokens must be read before its next step can be planned or sampled."""
    request = s.request
    return (
        s.grammar is not None or request.speculation is not None or request.pooling is not None
        or not request.forked or s.completion.history is not None
        or request.params.logprobs is not None or request.params.prompt_logprobs is not None
    )  # fmt: skip


def feed(plan: Plan, before: InFlightStep | None, device: torch.device) -> Tensor:
    """The tokens (N,) that a plan feeds; unread ones are copied from the step in flight."""
    tokens: list[int] = []
    unread: list[tuple[int, SequenceState]] = []
    for s, n in plan:
        if s.in_flight:
            unread.append((len(tokens), s))
            tokens.append(0)
        elif s.draft:
            tokens += [s.tokens[-1], *s.draft]
        else:
            tokens += s.tokens[s.computed : s.computed + n]
    out = to_device(tokens, device)
    if unread:
        assert before is not None, "an unread token without a step in flight"
        place = {pick.sequence: i for i, pick in enumerate(before.picks)}
        to, source = to_device([[at for at, _ in unread], [place[s] for _, s in unread]], device)
        out[to] = before.tokens[source].clamp(min=0)  # -1 (not finite) ends the sequence when it is read
    return out


def picks_of(plan: Plan) -> tuple[Rows, list[Pick]]:
    """Rows of hidden states to project, with their adapters, and the tokens to sample from them."""
    rows: list[tuple[int, str | None]] = []
    picks: list[Pick] = []
    at = 0
    for s, n in plan:
        at += n
        if n < s.uncomputed or s.request.pooling:
            continue
        for i in range(1 + len(s.draft)):
            ahead = (NO_TOKEN,) * s.in_flight + tuple(s.draft[:i])
            picks += [Pick(each, len(rows), ahead) for each in s.sampled_sequences]
            rows.append((at - 1 - len(s.draft) + i, s.request.adapter))
    return rows, picks


def row_of(pick: Pick, masks: Sequence[np.ndarray] | None) -> Row:
    """The sampler's row of a pick."""
    row = pick.sequence.completion.row(pick.ahead)
    if masks is None:
        return row
    place = min(len(pick.ahead), len(masks) - 1)  # tokens after a forbidden draft token are dropped
    return replace(row, allowed=masks[place])
