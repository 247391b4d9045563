"""Perplexity and bits per byte of texts.

    perplexity = exp(-1/T sum_t log p(x_t | x_<t))          bits per byte = -sum_t log2 p(x_t | x_<t) / bytes

T tokens · D width · V vocabulary. Every document begins with BOS, which is not predicted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import EvaluationError
from ..model import Mistral7B
from ..text.tokenizer import Tokenizer

CHUNK = 512  # tokens per forward pass: bounds the memory of logits
BOS = 1  # in every vocabulary of Mistral; used without a tokenizer


@dataclass(frozen=True)
class Perplexity:
    """The total `nats` of `tokens` tokens, which encode `bytes` bytes (0: unknown)."""

    tokens: int
    nats: float
    bytes: int = 0

    @property
    def perplexity(self) -> float:
        """exp of the mean nats per token."""
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte, which do not depend on the tokenizer; None if the bytes are unknown."""
        return self.nats / math.log(2) / self.bytes if self.bytes else None

    def to_dict(self) -> dict[str, Any]:
        """Return the counts and derived figures, for JSON."""
        return asdict(self) | {"perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}


@torch.inference_mode()
def perplexity(
    model: Mistral7B, documents: Iterable[str | Sequence[int]], tokenizer: Tokenizer | None = None
) -> Perplexity:
    """Measure the perplexity of documents: texts, or token ids (BOS is added if missing).

    Texts need the model's `tokenizer`. With a sliding window, documents may have any length; without one, they are
    split into pieces of `max_seq_len`. Raises EvaluationError if there is nothing to predict.
    """
    tokens, nats, size = 0, 0.0, 0
    known = True
    for document in documents:
        if isinstance(document, str):
            size += len(document.encode())
        else:
            known = False
        for ids in pieces(encode(document, tokenizer), model):
            for hidden, targets in scored(model, ids):
                nats += F.cross_entropy(model.logits(hidden), targets, reduction="sum").item()
                tokens += len(targets)
    if not tokens:
        raise EvaluationError(
            "these documents have no tokens to predict: each contains only BOS", field="documents"
        )
    return Perplexity(tokens, nats, size if known else 0)


def encode(document: str | Sequence[int], tokenizer: Tokenizer | None) -> list[int]:
    """Return token ids with BOS first."""
    if isinstance(document, str):
        if tokenizer is None:
            raise EvaluationError(
                "a text needs the model's tokenizer", field="tokenizer", hint="pass it, or pass token ids"
            )
        return [tokenizer.start_id, *tokenizer.encode(document, bos=False)]
    ids, start = list(document), BOS if tokenizer is None else tokenizer.start_id
    return ids if ids[:1] == [start] else [start, *ids]


def pieces(ids: list[int], model: Mistral7B) -> Iterator[list[int]]:
    """Yield the document, or without a window its pieces of context length, each with BOS."""
    context = model.args.max_seq_len if model.args.sliding_window is None else len(ids)
    body = ids[1:]
    for start in range(0, len(body), max(1, context - 1)):
        yield [ids[0], *body[start : start + context - 1]]


@torch.inference_mode()
def scored(model: Mistral7B, ids: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield hidden states (t, D) and their target tokens (t,), chunk by chunk."""
    tokens = torch.tensor(ids, device=model.norm.weight.device)
    cache = model.rolling_cache(max_seq_len=max(1, len(ids) - 1))
    for part, targets in zip(tokens[:-1].split(CHUNK), tokens[1:].split(CHUNK), strict=True):
        if len(part):
            yield model.hidden(part[None], cache)[0], targets
