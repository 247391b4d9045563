"""Distances that can be counted by hand, and of models from themselves and from others."""

from __future__ import annotations

import math

import pytest
import torch
from refusals import refused
from tiny import tiny_model, tokens_of

from mistral_7b.errors import EvaluationError
from mistral_7b.evaluation import Distance, distance
from mistral_7b.quantization.distance import Comparison

LONG = [1, *tokens_of((40,)).tolist()]


def test_a_distance_counted_by_hand() -> None:
    """p = (1/2, 1/4, 1/4) and q = (1/8, 3/4, 1/8) where 1 follows, then twice the same where 2 follows."""
    p, q, same = (torch.tensor([row]).log() for row in ([2.0, 1, 1], [1.0, 6, 1], [1.0, 1, 8]))
    comparison = Comparison()
    comparison.add(p, q, torch.tensor([1]))
    comparison.add(same, same + 3, torch.tensor([2]))  # logits may be off by a constant
    found = Distance.of(comparison)
    kl = 0.5 * math.log(4) + 0.25 * math.log(1 / 3) + 0.25 * math.log(2)
    assert found.kl == pytest.approx(kl / 2, abs=1e-7)
    assert (found.tokens, found.top1_agreement) == (2, 0.5)
    assert found.perplexity_original == pytest.approx(math.sqrt(4 * 10 / 8), rel=1e-6)
    assert found.perplexity == pytest.approx(math.sqrt(4 / 3 * 10 / 8), rel=1e-6)
    assert found.ratio == pytest.approx(math.sqrt(1 / 3), rel=1e-6)
    assert found.to_dict()["ratio"] == found.ratio
    other = Comparison()
    other.add(q, p, torch.tensor([1]))
    assert abs(Distance.of(other).kl - kl) > 0.02  # the divergence has a direction


def test_a_model_has_no_distance_from_itself() -> None:
    found = distance(tiny_model(), tiny_model(), [LONG])
    assert (found.kl, found.top1_agreement, found.ratio) == (0.0, 1.0, 1.0)
    assert found.tokens == 40


def test_the_distance_of_two_models_is_that_of_their_logits() -> None:
    first, second = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.float64, seed=5)
    found = distance(first, second, [LONG])
    tokens, follow = torch.tensor(LONG[:-1]), torch.tensor(LONG[1:])
    p, q = (m(tokens[None])[0][0].softmax(-1) for m in (first, second))
    assert found.kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), abs=1e-9)
    assert found.top1_agreement == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    wanted = [(-m[torch.arange(40), follow].log().mean()).exp().item() for m in (p, q)]
    assert [found.perplexity_original, found.perplexity] == pytest.approx(wanted, rel=1e-9)
    assert found.kl > 0.1


def test_nothing_to_compare_is_refused() -> None:
    with refused(EvaluationError, field="documents"):
        distance(tiny_model(), tiny_model(), [[1]])
