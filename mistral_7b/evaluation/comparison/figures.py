"""The figures of llama.cpp's perplexity tool, under its names, from the logits of both models.

    KLD    sum over tokens of p_A log(p_A / p_B), nats, at each position
    Δp     p_B - p_A of the text's next token, in percent

"base" is A and "Q" is B. Only numbers of each position are kept, never logits: a long text can be added piece by
piece. Unlike llama.cpp's, the figures count every position, not only the second half of each row.

T positions · V vocabulary
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

KLD_PERCENTILES = (99.9, 99.0, 95.0, 90.0, 50.0, 10.0, 5.0, 1.0, 0.1)
DELTA_PERCENTILES = (99.9, 99.0, 95.0, 90.0, 75.0, 50.0, 25.0, 10.0, 5.0, 1.0, 0.1)


class Figures:
    """Accumulates positions."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []  # (T, 7) each, in float64

    def add(self, a: Tensor, b: Tensor, targets: Tensor) -> None:
        """Add logits (T, V) of A and (T, V or more) of B, and the next token ids (T,).

        Tokens that only B has count in B's probabilities.
        """
        log_p, log_q = (t.double().log_softmax(-1) for t in (a, b))
        shared = log_q[:, : log_p.shape[1]]
        kld = (log_p.exp() * (log_p - shared)).sum(-1).clamp_min(0)  # rounding can make it slightly negative
        five = (a.topk(min(5, a.shape[1]), -1).indices, b.topk(min(5, b.shape[1]), -1).indices)
        common = (five[0][:, :, None] == five[1][:, None, :]).any(-1).double().mean(-1)
        same = (five[0][:, 0] == five[1][:, 0]).double()
        own = [t.gather(-1, targets[:, None])[:, 0] for t in (log_p, log_q)]
        delta = own[1].exp() - own[0].exp()
        extra = 1 - shared.exp().sum(-1) if shared.shape != log_q.shape else torch.zeros_like(kld)
        self._parts.append(torch.stack([kld, -own[0], -own[1], delta, same, common, extra], -1))

    @property
    def tokens(self) -> int:
        """The number of positions."""
        return sum(map(len, self._parts))

    @property
    def kld(self) -> float:
        """The mean KLD."""
        return torch.cat(self._parts)[:, 0].mean().item()

    @property
    def extra(self) -> float:
        """The mean probability that B gives to tokens that A does not have."""
        return torch.cat(self._parts)[:, 6].mean().item()

    def result(self) -> dict[str, Any]:
        """Return the figures by their names; with "±", a standard error of the mean beside it."""
        kld, nats_a, nats_b, delta, same, common, _ = torch.cat(self._parts).unbind(-1)
        percent = 100 * delta
        out: dict[str, Any] = {"tokens": self.tokens}
        ppl_a, ppl_b = (math.exp(min(t.mean().item(), 700.0)) for t in (nats_a, nats_b))
        out |= {"Mean PPL(Q)": ppl_b, "Mean PPL(Q) ±": ppl_b * _error(nats_b)}
        out |= {"Mean PPL(base)": ppl_a, "Mean PPL(base) ±": ppl_a * _error(nats_a)}
        out["Cor(ln(PPL(Q)), ln(PPL(base)))"] = 100 * _correlation(nats_a, nats_b)
        out |= _mean("Mean ln(PPL(Q)/PPL(base))", nats_b - nats_a)
        out["Mean PPL(Q)/PPL(base)"] = math.exp(min((nats_b - nats_a).mean().item(), 700.0))
        out["Mean PPL(Q)-PPL(base)"] = ppl_b - ppl_a
        out |= _mean("Mean KLD", kld) | _percentiles("KLD", kld, KLD_PERCENTILES)
        out |= _mean("Mean Δp", percent) | _percentiles("Δp", percent, DELTA_PERCENTILES)
        rms = percent.square().mean().sqrt().item()
        out |= {"RMS Δp": rms, "RMS Δp ±": _error(percent.square()) / (2 * rms) if rms else 0.0}
        return out | _mean("Same top p", 100 * same) | _mean("Same top 5", 100 * common)


def _mean(name: str, values: Tensor) -> dict[str, float]:
    return {name: values.mean().item(), f"{name} ±": _error(values)}


def _error(values: Tensor) -> float:
    """The standard error of the mean."""
    return (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else 0.0


def _correlation(a: Tensor, b: Tensor) -> float:
    if len(a) < 2 or not a.std() or not b.std():
        return 1.0
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def _percentiles(name: str, values: Tensor, at: tuple[float, ...]) -> dict[str, float]:
    found = torch.quantile(values, torch.tensor(at, dtype=values.dtype) / 100).tolist()
    inner = {"Median " + name if p == 50 else f"{p}% {name}": value for p, value in zip(at, found, strict=True)}
    return {f"Maximum {name}": values.max().item(), **inner, f"Minimum {name}": values.min().item()}
