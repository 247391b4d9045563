"""How far a quantised model is from its original, from the logits of both for the same tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class Distance:
    """Sums over tokens, so that the logits of a long text need not be held at once."""

    def __init__(self) -> None:
        self.tokens = 0
        self._kl = self._same = self._nll_original = self._nll = 0.0

    def add(self, original: Tensor, quantized: Tensor, targets: Tensor) -> None:
        """Logits (T, V) of both for the same places, and the ids (T,) that came next."""
        p, q = original.float().log_softmax(-1), quantized.float().log_softmax(-1)
        self._kl += torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True).item()
        self._same += (original.argmax(-1) == quantized.argmax(-1)).sum().item()
        self._nll_original -= p.gather(-1, targets[:, None]).sum().item()
        self._nll -= q.gather(-1, targets[:, None]).sum().item()
        self.tokens += len(targets)

    def result(self, text: str) -> dict[str, Any]:
        """What a quantised checkpoint records: KL(original || quantised) in nats a token, the share of places
        where both find the same token the likeliest, both perplexities; `text` names what was read."""
        n = max(self.tokens, 1)
        return {
            "kl": self._kl / n,
            "top1_agreement": self._same / n,
            "perplexity_original": _exp(self._nll_original / n),
            "perplexity": _exp(self._nll / n),
            "tokens": self.tokens,
            "text": text,
        }


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))  # beyond, a float has no value, and a model has no meaning
