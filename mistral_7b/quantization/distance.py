"""The distance of a quantized model from the original, from the logits of both for the same tokens."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor


class Comparison:
    """Accumulates over tokens, so that a long text can be compared piece by piece."""

    def __init__(self) -> None:
        self.tokens = 0
        self._kl = self._agreements = self._nats_original = self._nats = 0.0

    def add(self, original: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Add logits (T, V) of both models for the same positions, and the next token ids (T,)."""
        log_p, log_q = (t.double().log_softmax(-1) for t in (original, logits))
        self.tokens += len(targets)
        self._kl += F.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
        self._agreements += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
        self._nats_original += F.nll_loss(log_p, targets, reduction="sum").item()
        self._nats += F.nll_loss(log_q, targets, reduction="sum").item()

    def result(self, text: str) -> dict[str, Any]:
        """The record of a quantized checkpoint: KL(original || quantized) in nats per token, top-1 agreement, both
        perplexities; `text` names the evaluated text."""
        n = max(self.tokens, 1)
        return {
            "kl": max(0.0, self._kl / n),  # rounding can make it slightly negative
            "top1_agreement": self._agreements / n,
            "perplexity_original": _exp(self._nats_original / n),
            "perplexity": _exp(self._nats / n),
            "tokens": self.tokens,
            "text": text,
        }


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))  # above, exp overflows
