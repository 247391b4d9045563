"""What requests want of a step beside its tokens: log-probabilities, and pooled hidden states."""

from __future__ import annotations

from itertools import groupby

from torch import Tensor

from ..sampling import Logprob, following_logprobs, logprobs, put
from .flight import Flight, Pick, Plan
from .forward import Forward
from .request import SequenceState

Entry = dict[int, Logprob] | None


def entries_of(flight: Flight) -> list[Entry]:
    """Log-probabilities for each pick that asks for them."""
    picks = flight.picks
    entries: list[Entry] = [None] * len(picks)
    asked = [i for i, pick in enumerate(picks) if pick.sequence.request.params.logprobs is not None]
    for k, group in groupby(sorted(asked, key=lambda i: _k(picks[i])), key=lambda i: _k(picks[i])):
        places = list(group)
        part, chosen = flight.logits[places], flight.tokens[places].clamp(min=0)
        found = logprobs(part, chosen, k, picks[places[0]].sequence.completion.piece)
        for place, entry in zip(places, found, strict=True):
            entries[place] = entry
    return entries


def _k(pick: Pick) -> int:
    """How many log-probabilities are asked for."""
    return pick.sequence.request.params.logprobs or 0


def look(plan: Plan, hidden: Tensor, forward: Forward) -> None:
    """What requests want of their prompts' own hidden states (N, D)."""
    at = 0
    for s, n in plan:
        if s.request.pooling:
            s.request.pool(s.computed, hidden[at : at + n])
        elif s.request.params.prompt_logprobs is not None:
            _prompt_logprobs(s, hidden[at : at + n], forward)
        at += n


def _prompt_logprobs(s: SequenceState, hidden: Tensor, forward: Forward) -> None:
    """Log-probabilities of the tokens that follow those of hidden (T, D), if they are still wanted."""
    request, done = s.request, s.request.prompt_logprobs
    begin, end = len(done) - 1, min(s.computed + len(hidden), len(request.ids) - 1)
    k = request.params.prompt_logprobs
    if begin >= end or k is None:
        return

    def project(part: Tensor) -> Tensor:
        return forward.logits(part, [(i, request.adapter) for i in range(len(part))])

    following = put(request.ids[begin + 1 : end + 1], hidden.device)
    rows = hidden[begin - s.computed : end - s.computed]
    done += following_logprobs(project, rows, following, k, s.completion.piece)
