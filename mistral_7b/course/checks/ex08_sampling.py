"""Integer weights, the three filters, and the choice of a token by a random number."""

from __future__ import annotations

from typing import Any

import torch

from mistral_7b.course.compare import same
from mistral_7b.course.setting import numbers
from mistral_7b.sampling import choice
from mistral_7b.sampling.params import SamplingParams


def check(ex: Any) -> str:
    logits = 3 * numbers(4, 50)
    best = logits.amax(-1)
    modes = choice.modes_of([SamplingParams(temperature=0.7)] * 4, 50, logits.device)

    def weights(temperature: float, shift: torch.Tensor, most: float = 2.0**56) -> torch.Tensor:
        return (((logits / temperature).double() - (shift / temperature).double()[:, None]).exp() * most).long()

    right = choice.integer_weights(logits, best, modes)
    guesses = {
        "the logits are multiplied by the temperature; divide": weights(1 / 0.7, best),
        "the temperature is not used": weights(1.0, best),
        "the highest logit is not subtracted: the weights can overflow": weights(0.7, torch.zeros(4)),
        "the weights are not whole numbers": (logits / 0.7 - best[:, None] / 0.7).exp(),
        "the highest weight is 2^(62 - b), where b = (V - 1).bit_length() is 6 for V = 50": weights(
            0.7, best, 2.0**62
        ),
    }
    same(ex.integer_weights(logits, best, modes), right, "integer_weights, temperature 0.7", guesses)
    _check_cutoff(ex)
    filtered = choice.modes_of([SamplingParams(temperature=0.7, top_k=3)] * 4, 50, logits.device)
    same(
        ex.integer_weights(logits, best, filtered),
        choice.integer_weights(logits, best, filtered),
        "integer_weights with top_k=3",
        {"weights below the cutoff are set to 0 in the rows modes.filtered": right},
    )
    _check_choose(ex)
    many = choice.modes_of([SamplingParams(temperature=0.9, top_p=0.8, seed=1)] * 400, 50, logits.device)
    rows, u = logits[:1].expand(400, 50), torch.from_numpy(choice.uniforms(1, 0, 0, 400))
    tokens = ex.select_tokens(rows, many, u)
    same(tokens, choice.select_tokens(rows, many, u), "400 sampled tokens")
    share = float((tokens == logits[0].argmax()).double().mean())
    return f"400 samples by a seed: {len(tokens.unique())} different tokens, the most probable in {share:.0%}"


def _check_cutoff(ex: Any) -> None:
    one = 2.0**59  # the highest weight for V = 5
    weights = (torch.tensor([[1.0, 0.75, 0.5, 0.25, 0.0]]) * one).long()[:, torch.tensor([3, 0, 4, 2, 1])]
    highest = {1: 1.0, 2: 0.75, 3: 0.5, 4: 0.25}
    column = torch.tensor([[0.0]], dtype=torch.float64)
    cases = (
        ("top_k=2", (0.0, 2, 1.0), 2, {3: "top_k keeps one too many", 1: "top_k keeps one too few"}),
        (
            "top_p=0.6",
            (0.0, 0, 0.6),
            2,
            {
                1: "the token that reaches p is kept too: top_p keeps the fewest tokens whose weights sum "
                "to at least p"
            },
        ),
        ("top_p=0.3", (0.0, 0, 0.3), 1, {2: "the most probable token reaches p = 0.3 alone: its share is 0.4"}),
        ("min_p=0.5", (0.5, 0, 1.0), 3, {2: "a token exactly min_p times as probable as the highest is kept"}),
        (
            "top_k=3, top_p=0.5",
            (0.0, 3, 0.5),
            2,
            {1: "top_p counts shares of the weights that top_k keeps: 1 / 2.25 is below 0.5"},
        ),
        ("top_k=2, min_p=0.9", (0.9, 2, 1.0), 1, {2: "the stricter of top_k and min_p applies"}),
    )
    for name, (min_p, top_k, top_p), keeps, mistakes in cases:
        got = ex._cutoff(weights, column + min_p, torch.tensor([[top_k]]), column + top_p)
        guesses = {why: torch.tensor([[int(highest[n] * one)]]) for n, why in mistakes.items()}
        what = f"weights 1, 0.75, 0.5, 0.25, 0 (times 2^59), {name} keeps {keeps}: the cutoff"
        same(got, torch.tensor([[int(highest[keeps] * one)]]), what, guesses, 0)


def _check_choose(ex: Any) -> None:
    weights = torch.tensor([[0, 3, 0, 2, 5]])
    for u, token, mistakes in (
        (0.0, 1, {0: "a token of weight 0 is chosen: take the first whose cumulative sum exceeds u * total"}),
        (0.29, 1, {}),
        (
            0.3,
            3,
            {
                1: "at u = 0.3 the sum 3 of the first two does not exceed 3: the next token is chosen",
                2: "a token of weight 0 is chosen",
            },
        ),
        (0.5, 4, {3: "at u = 0.5 the sum 5 does not exceed 5: the next token is chosen"}),
        (1 - 2.0**-53, 4, {5: "u * total rounds up to the total: the index is beyond the vocabulary"}),
    ):
        guesses = {why: torch.tensor([wrong]) for wrong, why in mistakes.items()}
        got = ex.choose(weights, torch.tensor([u], dtype=torch.float64))
        same(got, torch.tensor([token]), f"weights 0 3 0 2 5: choose(weights, u={u:.2f})", guesses, 0)
