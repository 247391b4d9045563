"""What a step does for many requests at once, so that an error ends the request that it belongs to and no other.

Each call is made for all together. If it fails it is made again for each alone: rows do not depend on those beside
them, so that the others get the same results, and the one that fails again is to blame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import EngineError, Mistral7BError
from ..sampling.params import SamplingParams
from ..sampling.sampler import Row, sample_rows
from .extras import Entry, read_hidden_of, top_logprobs_of
from .forward import Forward
from .in_flight import InFlightStep, Pick, Plan, Rows, row_of
from .request import Request, SequenceState

Blame = Callable[[Request, str, Exception], None]  # ends a request, for what failed and why
NO_ROW = Row(SamplingParams(temperature=0))  # of a request that has ended


def because(request: Request, what: str, cause: Exception) -> Mistral7BError:
    """The error of a request for which something failed."""
    if isinstance(cause, Mistral7BError):
        return cause
    error = EngineError(f"request {request.id}: {what} failed: {cause!r}")
    error.__cause__ = cause
    return error


def hidden_of(forward: Forward, plan: Plan, tokens: Tensor, blame: Blame) -> Tensor:
    """Final states (N, D) of a plan's tokens; zeros for an adapter that fails. Raises what the model fails with.

    Keys and values that were written before the failure are written again, the same.
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
                blame(request, "the model's step", e)
        else:
            found.update(zip((s for s, _ in some), rows.split([n for _, n in some]), strict=True))
    if not found:
        raise first
    like = next(iter(found.values()))
    return torch.cat([found.get(s, like.new_zeros(n, like.shape[1])) for s, n in plan])


def logits_of(forward: Forward, hidden: Tensor, rows: Rows, picks: Sequence[Pick], blame: Blame) -> Tensor:
    """Logits (R, V) of these rows of hidden (N, D), from which picks are drawn; as `hidden_of` for adapters."""
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
                blame(request, "the model's step", e)
        else:
            out = some.new_zeros(len(rows), some.shape[1]) if out is None else out
            out[places] = some
    if out is None:
        raise first
    return out


def read_hidden(plan: Plan, hidden: Tensor, forward: Forward, blame: Blame) -> None:
    """What requests want of their prompts' own hidden states (N, D)."""
    at = 0
    for s, n in plan:
        if not s.ended:
            try:
                read_hidden_of(s, hidden[at : at + n], forward)
            except Exception as e:
                blame(s.request, "its prompt's log-probabilities or embedding", e)
        at += n


def sample(
    logits: Tensor, picks: Sequence[Pick], masks: dict[SequenceState, list[np.ndarray]], blame: Blame
) -> Tensor:
    """A token for each pick from its row of logits (R, V): (R,), -1 for requests that end here."""

    def row(pick: Pick) -> Row:
        try:
            return NO_ROW if pick.sequence.ended else row_of(pick, masks.get(pick.sequence))
        except Exception as e:
            blame(pick.sequence.request, "sampling", e)
            return NO_ROW

    rows = [row(pick) for pick in picks]
    try:
        return sample_rows(logits, rows)
    except Exception:
        tokens = [_alone(logits[i : i + 1], rows[i], pick, blame) for i, pick in enumerate(picks)]
        return torch.cat(tokens)


def _alone(logits: Tensor, row: Row, pick: Pick, blame: Blame) -> Tensor:
    """The token (1,) of one row."""
    try:
        return sample_rows(logits, [row])
    except Exception as e:
        blame(pick.sequence.request, "sampling", e)
        return torch.full((1,), -1, device=logits.device)


def logprobs_of(flight: InFlightStep, blame: Blame) -> list[Entry]:
    """Log-probabilities for each pick that asks for them."""
    places = range(len(flight.picks))
    entries: list[Entry] = [None] * len(flight.picks)
    try:
        return top_logprobs_of(flight, places)
    except Exception:
        for place in places:
            pick = flight.picks[place]
            if pick.sequence.ended:
                continue
            try:
                entries[place] = top_logprobs_of(flight, [place])[0]
            except Exception as e:
                blame(pick.sequence.request, "its log-probabilities", e)
    return entries
