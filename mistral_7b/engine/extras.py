"""Results of a step other than tokens: log-probabilities and pooled hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from torch import Tensor

from ..sampling.choice import to_device
from ..sampling.logprobs import Logprob, following_logprobs, logprobs
from .forward import Forward
from .in_flight import InFlightStep, Pick
from .request import SequenceState

TopLogprobs = dict[int, Logprob] | None


def top_logprobs(flight: InFlightStep, places: Sequence[int]) -> list[TopLogprobs]:
    """For each pick at these indices its log-probabilities, or None if they were not requested."""
    picks = flight.picks
    found: dict[int, TopLogprobs] = {}
    requested = [i for i in places if picks[i].sequence.request.params.logprobs is not None]
    for k, group in groupby(sorted(requested, key=lambda i: _k(picks[i])), key=lambda i: _k(picks[i])):
        same_k = list(group)
        logits, tokens = flight.logits[same_k], flight.tokens[same_k].clamp(min=0)
        piece = picks[same_k[0]].sequence.completion.piece
        found.update(zip(same_k, logprobs(logits, tokens, k, piece), strict=True))
    return [found.get(i) for i in places]


def _k(pick: Pick) -> int:
    """The number of alternatives requested."""
    return pick.sequence.request.params.logprobs or 0


def use_hidden_of(s: SequenceState, hidden: Tensor, forward: Forward) -> None:
    """Pool the hidden states (T, D) of a sequence's next tokens, or compute log-probabilities from them.

    Raises the error of the request's own recording or steering in this step.
    """
    if s.request.watching is not None:
        s.request.watching.check()
    if s.request.pooling:
        s.request.pool(s.computed, hidden)
    elif s.request.params.prompt_logprobs is not None:
        _prompt_logprobs(s, hidden, forward)


def _prompt_logprobs(s: SequenceState, hidden: Tensor, forward: Forward) -> None:
    """Append log-probabilities of the prompt tokens that follow those of hidden (T, D), once for each."""
    request, done = s.request, s.request.prompt_logprobs
    begin, end = len(done) - 1, min(s.computed + len(hidden), len(request.ids) - 1)
    k = request.params.prompt_logprobs
    if begin >= end or k is None:
        return

    def project(rows: Tensor) -> Tensor:
        return forward.logits(rows, [(i, request.adapter) for i in range(len(rows))])

    following = to_device(request.ids[begin + 1 : end + 1], hidden.device)
    rows = hidden[begin - s.computed : end - s.computed]
    done += following_logprobs(project, rows, following, k, s.completion.piece)
