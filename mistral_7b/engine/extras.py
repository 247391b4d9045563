"""What requests want of a step beside its tokens: log-probabilities, and pooled hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from torch import Tensor

from ..sampling.choice import to_device
from ..sampling.logprobs import Logprob, following_logprobs, logprobs
from .forward import Forward
from .in_flight import InFlightStep, Pick
from .request import SequenceState

Entry = dict[int, Logprob] | None


def top_logprobs_of(flight: InFlightStep, places: Sequence[int]) -> list[Entry]:
    """Log-probabilities for each pick at these places that asks for them."""
    picks = flight.picks
    found: dict[int, Entry] = {}
    asked = [i for i in places if picks[i].sequence.request.params.logprobs is not None]
    for k, group in groupby(sorted(asked, key=lambda i: _k(picks[i])), key=lambda i: _k(picks[i])):
        some = list(group)
        part, chosen = flight.logits[some], flight.tokens[some].clamp(min=0)
        made = logprobs(part, chosen, k, picks[some[0]].sequence.completion.piece)
        found.update(zip(some, made, strict=True))
    return [found.get(i) for i in places]


def _k(pick: Pick) -> int:
    """How many log-probabilities are asked for."""
    return pick.sequence.request.params.logprobs or 0


def read_hidden_of(s: SequenceState, hidden: Tensor, forward: Forward) -> None:
    """What a request wants of the hidden states (T, D) of its next tokens."""
    if s.request.pooling:
        s.request.pool(s.computed, hidden)
    elif s.request.params.prompt_logprobs is not None:
        _prompt_logprobs(s, hidden, forward)


def _prompt_logprobs(s: SequenceState, hidden: Tensor, forward: Forward) -> None:
    """Log-probabilities of the tokens that follow those of hidden (T, D), if they are still wanted."""
    request, done = s.request, s.request.prompt_logprobs
    begin, end = len(done) - 1, min(s.computed + len(hidden), len(request.ids) - 1)
    k = request.params.prompt_logprobs
    if begin >= end or k is None:
        return

    def project(part: Tensor) -> Tensor:
        return forward.logits(part, [(i, request.adapter) for i in range(len(part))])

    following = to_device(request.ids[begin + 1 : end + 1], hidden.device)
    rows = hidden[begin - s.computed : end - s.computed]
    done += following_logprobs(project, rows, following, k, s.completion.piece)
