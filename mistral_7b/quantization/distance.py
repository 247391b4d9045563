"""How far a quantized model is from its original, from the logits of both for the same tokens."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor


class Comparison:
    """Sums over tokens, so that the logits of a long text need not be held at once."""

    def __init__(self) -> None:
        self.tokens = 0
        self._kl = self._same = self._nats_original = self._nats = 0.0

    def add(self, original: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Logits (T, V) of both for the same places, and the ids (T,) that came next."""
        log_p, log_q = (t.double().log_softmax(-1) for t in (original, logits))
        self.tokens += len(targets)
        self._kl += F.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
        self._same += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
        self._nats_original += F.nll_loss(log_p, targets, reduction="sum").item()
        self._nats += F.nll_loss(log_q, targets, reduction="sum").item()

    def result(self, text: str) -> dict[str, Any]:
        """What a quantized checkpoint records: KL(original || quantized) in nats a token, the share of places
        where both find the same token the likeliest, both perplexities; `text` names what was read."""
        n = max(self.tokens, 1)
        return {
            "kl": max(0.0, self._kl / n),  # rounding may leave equal models a hair below
            "top1_agreement": self._same / n,
            "perplexity_original": _exp(self._nats_original / n),
            "perplexity": _exp(self._nats / n),
            "tokens": self.tokens,
            "text": text,
        }


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))  # beyond, a float has no value, and a model has no meaning
