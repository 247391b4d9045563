"""How far a quantised, adapted or merged model is from what it came from.

    KL = 1/T sum_t sum_v p_t(v) log(p_t(v) / q_t(v))          p: the original, q: the other; nats a token

Perplexity alone hides errors that happen to help; the divergence does not. T tokens · V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from ..errors import EvaluationError
from ..model import Mistral7B
from ..quantization.distance import Comparison
from ..tokenizer import Tokenizer
from .perplexity import encode, pieces, scored


@dataclass(frozen=True)
class Distance:
    """Of a model from its original on a text, over `tokens` predictions."""

    tokens: int
    kl: float  # mean KL(original || model), nats a token
    top1_agreement: float  # share of the predictions whose likeliest token is the same
    perplexity_original: float
    perplexity: float

    @classmethod
    def of(cls, comparison: Comparison) -> Distance:
        """What has been summed up. EvaluationError if that is nothing."""
        if not comparison.tokens:
            raise EvaluationError(
                "there is nothing to predict in these documents: each is empty but for BOS", field="documents"
            )
        found = comparison.result("")
        return cls(**{field.name: found[field.name] for field in fields(cls)})

    @property
    def ratio(self) -> float:
        """Perplexity over the original's: 1.01 is a loss of 1%."""
        return self.perplexity / self.perplexity_original

    def to_dict(self) -> dict[str, Any]:
        """The fields and the ratio, for a file."""
        return asdict(self) | {"ratio": self.ratio}


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
    return Distance.of(comparison)
