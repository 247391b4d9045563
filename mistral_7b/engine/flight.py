"""A step on its way: what it was to compute, and its tokens, which lie on the device until somebody reads them.

    host      plan 2, launch 2, read 1    plan 3, launch 3, read 2    ...
    device    compute 1 ---------------> compute 2 ----------------> compute 3

A sequence has a token `flying` from the launch of the step that samples it until it is read, and may be in the
next step already: what it feeds there is taken from where it was sampled. Random numbers, bans and pages are a
matter of the token's place alone. Where more is asked (`waits`), tokens are read before the next step is planned.
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
    """A token to be sampled: for which sequence, from which row of the logits, after which tokens yet to come."""

    sequence: SequenceState
    row: int
    ahead: tuple[int, ...] = ()


@dataclass(frozen=True)
class Flight:
    """What was launched. tokens (R,) and logits (R, V) of its R picks are on the device.

    `began`: when, of a step whose time says how long decoding takes.
    """

    plan: Plan
    picks: Sequence[Pick]
    tokens: Tensor
    logits: Tensor
    began: float | None = None

    @property
    def sampled(self) -> list[SequenceState]:
        """Those for which it samples."""
        return list(dict.fromkeys(pick.sequence for pick in self.picks))


def waits(s: SequenceState) -> bool:
    """Whether a sequence's tokens must be read before its next step can be planned or sampled."""
    request = s.request
    return (
        s.grammar is not None or request.speculation is not None or request.pooling is not None
        or not request.forked or s.completion.history is not None
        or request.params.logprobs is not None or request.params.prompt_logprobs is not None
    )  # fmt: skip


def feed(plan: Plan, before: Flight | None, device: torch.device) -> Tensor:
    """The tokens (N,) that a plan feeds; those not yet read come from the flight before."""
    tokens: list[int] = []
    unread: list[tuple[int, SequenceState]] = []
    for s, n in plan:
        if s.flying:
            unread.append((len(tokens), s))
            tokens.append(0)
        elif s.draft:
            tokens += [s.tokens[-1], *s.draft]
        else:
            tokens += s.tokens[s.computed : s.computed + n]
    out = to_device(tokens, device)
    if unread:
        assert before is not None, "a token is in no flight"
        place = {pick.sequence: i for i, pick in enumerate(before.picks)}
        to, source = to_device([[at for at, _ in unread], [place[s] for _, s in unread]], device)
        out[to] = before.tokens[source].clamp(min=0)  # -1, not finite: this row is in vain, as will be found
    return out


def picks_of(plan: Plan) -> tuple[Rows, list[Pick]]:
    """Rows of hidden states to be projected, with their adapters, and what is to be sampled from them."""
    rows: list[tuple[int, str | None]] = []
    picks: list[Pick] = []
    at = 0
    for s, n in plan:
        at += n
        if n < s.need or s.request.pooling:
            continue
        for i in range(1 + len(s.draft)):
            ahead = (NO_TOKEN,) * s.flying + tuple(s.draft[:i])
            picks += [Pick(each, len(rows), ahead) for each in s.drawn]
            rows.append((at - 1 - len(s.draft) + i, s.request.adapter))
    return rows, picks


def row_of(pick: Pick, masks: Sequence[np.ndarray] | None) -> Row:
    """How a pick's token is chosen."""
    row = pick.sequence.completion.row(pick.ahead)
    if masks is None:
        return row
    place = min(len(pick.ahead), len(masks) - 1)  # past a forbidden guess all is in vain
    return replace(row, allowed=masks[place])
