"""Results of a step other than tokens: log-probabilities, scores of given tokens, and pooled hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from torch import Tensor

from ..sampling.choice import to_device
from ..sampling.logprobs import LOGPROB_ROWS, Logprob, Score, following_logprobs, logprobs, scores
from .forward import Forward
from .in_flight import InFlightStep, Pick
from .request import Request, SequenceState

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
    """Pool the hidden states (T, D) of a sequence's next tokens, or compute their log-probabilities.

    Raises the error of the request's own recording or steering in this step.
    """
    if s.request.watching is not None:
        s.request.watching.check()
    if s.request.pooling and not s.request.targets:
        s.request.pool(s.computed, hidden)
    elif s.request.params.prompt_logprobs is not None:
        _prompt_logprobs(s, hidden, forward)


def score(parts: Sequence[tuple[SequenceState, int, int]], hidden: Tensor, forward: Forward) -> None:
    """Append the scores of the targets that follow tokens of hidden (N, D), which are projected together.

    A part is a sequence, the row of the first of its tokens, and their number.
    """
    rows: list[tuple[int, str | None]] = []
    following: list[int] = []
    owners: list[Request] = []
    for s, start, n in parts:
        request = s.request
        first = len(request.ids) - len(request.targets)  # position of the first row that is needed
        for p in range(first + len(request.scores), s.computed + n):  # once for each
            others = request.alternatives if p == len(request.ids) - 1 else ()
            for target in (request.targets[p - first], *others):
                rows.append((start + p - s.computed, request.adapter))
                following.append(target)
                owners.append(request)
    found: list[Score] = []
    for i in range(0, len(rows), LOGPROB_ROWS):
        some = slice(i, i + LOGPROB_ROWS)
        found += scores(forward.logits(hidden, rows[some]), to_device(following[some], hidden.device))
    for request, one in zip(owners, found, strict=True):
        request.scores.append(one)


def _projection(request: Request, forward: Forward) -> Callable[[Tensor], Tensor]:
    """The function from hidden states (R, D) of a request to logits (R, V)."""
    return lambda rows: forward.logits(rows, [(i, request.adapter) for i in range(len(rows))])


def _prompt_logprobs(s: SequenceState, hidden: Tensor, forward: Forward) -> None:
    """Append log-probabilities of the prompt tokens that follow those of hidden (T, D), once for each."""
    request, done = s.request, s.request.prompt_logprobs
    begin, end = len(done) - 1, min(s.computed + len(hidden), len(request.ids) - 1)
    k = request.params.prompt_logprobs
    if begin >= end or k is None:
        return

    following = to_device(request.ids[begin + 1 : end + 1], hidden.device)
    rows = hidden[begin - s.computed : end - s.computed]
    done += following_logprobs(_projection(request, forward), rows, following, k, s.completion.piece)
