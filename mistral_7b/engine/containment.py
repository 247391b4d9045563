"""Isolates errors: a batched call that fails is repeated for each request, and those that fail again are ended.

Rows of a deterministic engine (`deterministic` in config.py; int8 or int4 weights on a CPU) do not depend on the
other rows of a batch, so the other requests get bit-identical results with and without the error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import EngineError, Mistral7BError
from ..sampling.params import SamplingParams
from ..sampling.sampler import Row, sample_rows
from .extras import TopLogprobs, score, top_logprobs, use_hidden_of
from .forward import Forward
from .in_flight import InFlightStep, Pick, Plan, Rows, row_of
from .request import Request, SequenceState

FailRequest = Callable[[Request, str, Exception], None]  # (request, what failed, cause): ends the request
UNUSED_ROW = Row(SamplingParams(temperature=0))  # for a request that has ended; its token is dropped


def request_error(request: Request, what: str, cause: Exception) -> Mistral7BError:
    """The error of a request for which `what` failed: `cause` itself, or an EngineError with it as cause."""
    if isinstance(cause, Mistral7BError):
        return cause
    error = EngineError(f"request {request.id}: {what} failed: {cause!r}")
    error.__cause__ = cause
    return error


def hidden_of(forward: Forward, plan: Plan, tokens: Tensor, fail_request: FailRequest) -> Tensor:
    """Final hidden states (N, D) of a plan's tokens, zeros for adapters that fail. Raises the model's own error.

    After a failure each adapter's tokens are computed alone; keys and values are overwritten with equal ones.
    """
    try:
        return forward.hidden(plan, tokens)
    except Exception as e:
        adapters = dict.fromkeys(s.request.adapter for s, _ in plan)
        if len(adapters) == 1:
            raise
        first = e
    parts = list(zip(plan, tokens.split([n for _, n in plan]), strict=True))
    found: dict[SequenceState, Tensor] = {}
    for adapter in adapters:
        own = [(item, part) for item, part in parts if item[0].request.adapter == adapter]
        some = [item for item, _ in own]
        try:
            rows = forward.hidden(some, torch.cat([part for _, part in own])).clone()
        except Exception as e:
            for request in dict.fromkeys(s.request for s, _ in some):
                fail_request(request, "the model's step", e)
        else:
            found.update(zip((s for s, _ in some), rows.split([n for _, n in some]), strict=True))
    if not found:
        raise first
    like = next(iter(found.values()))
    return torch.cat([found.get(s, like.new_zeros(n, like.shape[1])) for s, n in plan])


def logits_of(
    forward: Forward, hidden: Tensor, rows: Rows, picks: Sequence[Pick], fail_request: FailRequest
) -> Tensor:
    """Logits (R, V) of these rows of hidden (N, D), zeros for adapters that fail, as `hidden_of`."""
    try:
        return forward.logits(hidden, rows)
    except Exception as e:
        adapters = dict.fromkeys(adapter for _, adapter in rows)
        if len(adapters) == 1:
            raise
        first = e
    out: Tensor | None = None
    for adapter in adapters:
        places = [i for i, row in enumerate(rows) if row[1] == adapter]
        try:
            some = forward.logits(hidden, [rows[i] for i in places])
        except Exception as e:
            for request in dict.fromkeys(p.sequence.request for p in picks if rows[p.row][1] == adapter):
                fail_request(request, "the model's step", e)
        else:
            out = some.new_zeros(len(rows), some.shape[1]) if out is None else out
            out[places] = some
    if out is None:
        raise first
    return out


def use_hidden(plan: Plan, hidden: Tensor, forward: Forward, fail_request: FailRequest) -> None:
    """Compute embeddings, scores and the prompts' log-probabilities from the hidden states (N, D) of a plan."""
    start = 0
    scored: list[tuple[SequenceState, int, int]] = []
    for s, n in plan:
        if not s.ended:
            try:
                use_hidden_of(s, hidden[start : start + n], forward)
            except Exception as e:
                fail_request(s.request, "its recording, embedding or prompt's log-probabilities", e)
            else:
                scored += [(s, start, n)] if s.request.targets else []
        start += n
    try:
        score(scored, hidden, forward)
    except Exception:
        for part in scored:
            try:
                score([part], hidden, forward)
            except Exception as e:
                fail_request(part[0].request, "its scores", e)


def sample(
    logits: Tensor, picks: Sequence[Pick], masks: dict[SequenceState, list[np.ndarray]], fail_request: FailRequest
) -> Tensor:
    """A token for each pick from its row of logits (R, V): (R,), -1 where sampling fails and ends the request."""

    def row(pick: Pick) -> Row:
        try:
            return UNUSED_ROW if pick.sequence.ended else row_of(pick, masks.get(pick.sequence))
        except Exception as e:
            fail_request(pick.sequence.request, "sampling", e)
            return UNUSED_ROW

    rows = [row(pick) for pick in picks]
    try:
        return sample_rows(logits, rows)
    except Exception:
        tokens = [_sample_one(logits[i : i + 1], rows[i], pick, fail_request) for i, pick in enumerate(picks)]
        return torch.cat(tokens)


def _sample_one(logits: Tensor, row: Row, pick: Pick, fail_request: FailRequest) -> Tensor:
    """The token (1,) of one row; -1 where it fails."""
    try:
        return sample_rows(logits, [row])
    except Exception as e:
        fail_request(pick.sequence.request, "sampling", e)
        return torch.full((1,), -1, device=logits.device)


def logprobs_of(flight: InFlightStep, fail_request: FailRequest) -> list[TopLogprobs]:
    """The log-probabilities of each pick; None where none were requested, or where computing them fails."""
    places = range(len(flight.picks))
    entries: list[TopLogprobs] = [None] * len(flight.picks)
    try:
        return top_logprobs(flight, places)
    except Exception:
        for place in places:
            pick = flight.picks[place]
            if pick.sequence.ended:
                continue
            try:
                entries[place] = top_logprobs(flight, [place])[0]
            except Exception as e:
                fail_request(pick.sequence.request, "its log-probabilities", e)
    return entries
