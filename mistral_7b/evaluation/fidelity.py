"""How far a quantised, adapted or merged model is from what it came from.

    KL = 1/T sum_t sum_v p_t(v) log(p_t(v) / q_t(v))          p: the original, q: the other; nats a token

Perplexity alone hides errors that happen to help; the divergence does not. V vocabulary · t tokens
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import EvaluationError
from ..model import Mistral7B
from ..tokenizer import Tokenizer
from .perplexity import encode, pieces, scored


@dataclass(frozen=True)
class Distance:
    """Of a model from its original on a text, over `tokens` predictions."""

    tokens: int
    kl: float  # mean KL(original || model), nats a token
    top1: float  # share of the predictions whose likeliest token is the same
    perplexity_original: float
    perplexity: float

    @property
    def ratio(self) -> float:
        """Perplexity over the original's: 1.01 is a loss of 1%."""
        return self.perplexity / self.perplexity_original

    def to_dict(self) -> dict[str, Any]:
        """The fields and the ratio, for a file."""
        return asdict(self) | {"ratio": self.ratio}


class Comparison:
    """Sums up a distance from logits as they come: what streams a model through layer by layer has no model."""

    def __init__(self) -> None:
        self.tokens = 0
        self.kl = self.agree = self.nats_original = self.nats = 0.0

    def add(self, original: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Both models' logits (t, V) and the tokens (t,) that follow."""
        log_p, log_q = (t.double().log_softmax(-1) for t in (original, logits))
        self.tokens += len(targets)
        self.kl += F.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
        self.agree += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
        self.nats_original += F.nll_loss(log_p, targets, reduction="sum").item()
        self.nats += F.nll_loss(log_q, targets, reduction="sum").item()

    def distance(self) -> Distance:
        """What has been added up. EvaluationError if that is nothing."""
        if not self.tokens:
            raise EvaluationError("there is nothing to predict in these documents: each is empty but for BOS")
        n = self.tokens
        kl = max(0.0, self.kl / n)  # rounding may leave equal models a hair below
        return Distance(n, kl, self.agree / n, math.exp(self.nats_original / n), math.exp(self.nats / n))


@torch.inference_mode()
def distance(
    original: Mistral7B,
    model: Mistral7B,
    documents: Iterable[str | Sequence[int]],
    tokenizer: Tokenizer | None = None,
) -> Distance:
    """The distance of `model` from `original` on documents, texts or token ids, as `perplexity` takes them."""
    comparison = Comparison()
    for document in documents:
        for ids in pieces(encode(document, tokenizer), original):
            for (h, targets), (g, _) in zip(scored(original, ids), scored(model, ids), strict=True):
                comparison.add(original.logits(h), model.logits(g), targets)
    return comparison.distance()
