"""The method of supervised fine-tuning: cross-entropy of the trained tokens of packed documents.

document   BOS  u1  u2  a1  a2  EOS        u: the user's, not trained; a: the assistant's
trained     -   -   -   x   x   x
inputs     BOS  u1  u2  a1  a2             T places
targets     -   -   a1  a2  EOS            -: IGNORE
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache import Stateless
from ..model import Mistral7B
from .data import IGNORE
from .loss import chunk_rows, loss_backward
from .packing import PackedRows, best_fit

if TYPE_CHECKING:
    from .finetuning import Setting


class Document(Protocol):
    """Token ids (T,), and for each whether predicting it from those before has a loss."""

    @property
    def ids(self) -> np.ndarray: ...

    @property
    def trained(self) -> np.ndarray: ...


class Packed(NamedTuple):
    """Documents one after another, without padding: each (T,)."""

    tokens: Tensor
    targets: Tensor  # next token or IGNORE
    sequence_ids: Tensor

    def to(self, device: torch.device | str) -> Packed:
        return Packed(*(t.to(device) for t in self))


def pack(documents: Sequence[Document]) -> Packed:
    """Return documents as one packed batch of all their tokens but the last of each."""
    tokens = [d.ids[:-1] for d in documents]
    targets = [np.where(d.trained[1:], d.ids[1:], IGNORE) for d in documents]
    ids = np.repeat(np.arange(len(documents)), [len(t) for t in tokens])
    parts = (np.concatenate(tokens), np.concatenate(targets), ids)
    return Packed(*(torch.from_numpy(part.astype(np.int64)) for part in parts))


def trained_states(model: Mistral7B, batch: Packed) -> tuple[Tensor, Tensor]:
    """Return the hidden states (N, D) from which trained tokens are predicted, and these tokens (N,)."""
    hidden = model.hidden(batch.tokens, Stateless(model.args.sliding_window), batch.sequence_ids)
    predicts = batch.targets != IGNORE
    return hidden[predicts], batch.targets[predicts]


class Supervised:
    """Every trained token of an update weighs the same, however it is packed or split into parts."""

    def __init__(
        self, model: Mistral7B, documents: Sequence[Document], packed: PackedRows, rows: int, accumulate: int
    ) -> None:
        """Take `rows` rows in an update, in `accumulate` parts of equally many."""
        self.model, self.documents, self.packed = model, documents, packed
        self.rows, self.parts = rows, accumulate
        self.n_targets = 0  # of the whole update

    def micro_batches(self, step: int) -> Sequence[Packed]:
        device = self.model.norm.weight.device
        numbers = self.packed.parts(step, self.rows, self.parts)
        parts = [pack([self.documents[i] for i in part]) for part in numbers]
        self.n_targets = sum(int((part.targets != IGNORE).sum()) for part in parts)
        return [part.to(device) for part in parts]

    def backward(self, batch: Packed) -> dict[str, float]:
        hidden, targets = trained_states(self.model, batch)
        loss = loss_backward(self.model, hidden, targets, self.n_targets)
        return {"loss": float(loss), "tokens": len(batch.tokens)}

    def updates(self, epochs: int) -> int:
        return -(-self.packed.rows_of(epochs) // self.rows)

    def evaluate(self, items: Sequence[Document]) -> dict[str, float]:
        return evaluated(self.model, items, self.packed.seq_len)


@torch.no_grad()
def evaluated(model: Mistral7B, documents: Sequence[Document], seq_len: int) -> dict[str, float]:
    """Return the loss of the trained tokens of held-out documents, and the share that is the most likely token."""
    rows = best_fit([len(d.ids) - 1 for d in documents], seq_len)
    loss = right = count = 0.0
    size = chunk_rows(model)
    for row in rows:
        batch = pack([documents[i] for i in row]).to(model.norm.weight.device)
        hidden, targets = trained_states(model, batch)
        for states, wanted in zip(hidden.split(size), targets.split(size), strict=True):
            logits = model.logits(states)
            loss += float(F.cross_entropy(logits, wanted, reduction="sum"))
            right += int((logits.argmax(-1) == wanted).sum())
        count += len(targets)
    return {"eval_loss": loss / count, "eval_accuracy": right / count}


def method_of(setting: Setting) -> Supervised:
    """Return supervised fine-tuning on `Encoded` items."""
    args, lengths = setting.args, [len(d.ids) - 1 for d in setting.items]
    packed = PackedRows(lengths, args.seq_len, args.seed, setting.copies)
    return Supervised(setting.model, setting.items, packed, args.rows, args.accumulate)
