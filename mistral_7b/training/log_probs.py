"""Log-probabilities of the trained tokens of packed documents, and gradients of any function of them.

    l_t = log p(target t | the tokens before it in its document)       (R,): never (T, V) numbers at once

T tokens · R trained tokens · D width · V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..cache import Stateless
from ..model import Mistral7B
from .data import IGNORE
from .loss import chunk_rows
from .supervised import Packed


class Policy(Protocol):
    """What gives the next token's logits: a model, or one whose values are the engine's (exact.py)."""

    model: Mistral7B

    @property
    def device(self) -> torch.device: ...

    def hidden(self, batch: Packed) -> Tensor:
        """Final states (T, D) of packed documents, isolated from each other."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (R, V) of states (R, D), in float32 at least."""
        ...


class ModelPolicy:
    """A model as it is."""

    def __init__(self, model: Mistral7B) -> None:
        self.model = model

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    def hidden(self, batch: Packed) -> Tensor:
        return self.model.hidden(batch.tokens, Stateless(self.model.args.sliding_window), batch.sequence_ids)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)


def document_sums(values: Tensor, batch: Packed, documents: int) -> Tensor:
    """Sums of values (R,), one for each trained token, over each of the batch's documents: (documents,)."""
    own = batch.sequence_ids[batch.targets != IGNORE]
    return values.new_zeros(documents).index_add(0, own, values)


@torch.no_grad()
def log_probs(policy: Policy, batch: Packed) -> Tensor:
    """The log-probability of each trained token, in their order: (R,)."""
    trained = batch.targets != IGNORE
    return _projected(policy, policy.hidden(batch)[trained], batch.targets[trained])


def backward(policy: Policy, batch: Packed, objective: Callable[[Tensor], Tensor]) -> Tensor:
    """Add the gradients of objective(l), a scalar of the log-probabilities l (R,), and return it.

    The vocabulary is projected twice, a chunk of rows at a time: for the values, which give dL/dl, and for the
    gradient of the states, dL/dl * dl/dh. Where dL/dl is zero everywhere, no gradient is computed.
    """
    trained = batch.targets != IGNORE
    states, targets = policy.hidden(batch)[trained], batch.targets[trained]  # (R, D), (R,)
    rows = states.detach()
    values = _projected(policy, rows, targets).requires_grad_()
    loss = objective(values)
    (weights,) = torch.autograd.grad(loss, values)
    if weights.any():
        rows.requires_grad_()
        size = chunk_rows(policy.model)
        for chunk, target, weight in zip(*(t.split(size) for t in (rows, targets, weights)), strict=True):
            (_chosen(policy.logits(chunk), target) * weight).sum().backward()
        states.backward(rows.grad)
    return loss.detach()


@torch.no_grad()
def _projected(policy: Policy, states: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities (R,) of targets (R,) after states (R, D), a chunk of rows at a time."""
    size = chunk_rows(policy.model)
    parts = zip(states.split(size), targets.split(size), strict=True)
    return torch.cat([_chosen(policy.logits(rows), target) for rows, target in parts])


def _chosen(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities (R,) of targets (R,), by the operations of sampling/logprobs.py."""
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def consecutive(lengths: Sequence[int], limit: int) -> Iterator[slice]:
    """Cut a sequence of documents into runs of at most `limit` tokens; a longer one is a run of its own."""
    first, tokens = 0, 0
    for i, n in enumerate(lengths):
        if i > first and tokens + n > limit:
            yield slice(first, i)
            first, tokens = i, 0
        tokens += n
    if lengths:
        yield slice(first, len(lengths))
