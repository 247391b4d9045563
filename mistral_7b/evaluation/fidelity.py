"""The distance of a quantized, adapted or merged model from its original.

    KL = 1/T sum_t sum_v p_t(v) log(p_t(v) / q_t(v))          p: original, q: other model; nats per token

Perplexity alone can hide errors that happen to improve it; KL cannot. T tokens · V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from ..errors import EvaluationError
from ..model import Mistral7B
from ..quantization.distance import Comparison
from ..text.tokenizer import Tokenizer
from .perplexity import encode, pieces, scored


@dataclass(frozen=True)
class Distance:
    """The distance of a model from its original on a text, over `tokens` predictions."""

    tokens: int
    kl: float  # mean KL(original || model), nats per token
    top1_agreement: float  # fraction of predictions with the same most likely token
    perplexity_original: float
    perplexity: float

    @classmethod
    def of(cls, comparison: Comparison) -> Distance:
        """Summarize a comparison. Raises EvaluationError if it holds no prediction."""
        if not comparison.tokens:
            raise EvaluationError(
                "these documents have no tokens to predict: each contains only BOS", field="documents"
            )
        found = comparison.result("")
        return cls(**{field.name: found[field.name] for field in fields(cls)})

    @property
    def ratio(self) -> float:
        """Perplexity relative to the original's: 1.01 is 1% worse."""
        return self.perplexity / self.perplexity_original

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the ratio, for JSON."""
        return asdict(self) | {"ratio": self.ratio}


@torch.inference_mode()
def distance(
    original: Mistral7B,
    model: Mistral7B,
    documents: Iterable[str | Sequence[int]],
    tokenizer: Tokenizer | None = None,
) -> Distance:
    """Measure the distance of `model` from `original` on documents, given as to `perplexity`."""
    comparison = Comparison()
    for document in documents:
        for ids in pieces(encode(document, tokenizer), original):
            for (h, targets), (g, _) in zip(scored(original, ids), scored(model, ids), strict=True):
                comparison.add(original.logits(h), model.logits(g), targets)
    return Distance.of(comparison)
