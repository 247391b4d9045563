"""Each token of a text with its probability, its rank, and what the model held more likely."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...cache import Stateless
from ...model import Mistral7B
from ...sampling.logprobs import Logprob, following_logprobs, logprobs
from ...text.tokenizer import Tokenizer
from .page import Picture, plotted
from .prompts import Prompt, encode, pieces

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Alternatives = Sequence[tuple[str, float]]  # text and probability, the most probable first


@dataclass(frozen=True)
class Predicted:
    """A token that follows others: its probability, its rank among all (1: the most probable), and the top-k."""

    probability: float
    rank: int
    alternatives: Alternatives


@dataclass(frozen=True)
class Probabilities(Picture):
    """The tokens of a text with their predictions; the first has none. `following`: the next token's top-k."""

    view = "probabilities"
    title = "Token probabilities"

    tokens: Sequence[str]
    predictions: Sequence[Predicted]
    following: Alternatives

    @property
    def bits(self) -> float:
        """Mean bits per predicted token."""
        total = sum(-math.log2(max(p.probability, 1e-300)) for p in self.predictions)
        return total / max(1, len(self.predictions))

    def data(self) -> dict[str, Any]:
        first = sum(p.rank == 1 for p in self.predictions)
        return {
            "about": f"Each of {len(self.predictions)} tokens is tinted by its probability after those before it: "
            f"the stronger, the less likely. {first} are the model's first choice; the mean is "
            f"{self.bits:.2f} bits a token, a perplexity of {2**self.bits:.2f}.",
            "tokens": list(self.tokens),
            "predictions": [[p.probability, p.rank, p.alternatives] for p in self.predictions],
            "following": self.following,
        }

    def draw(self, figure: Figure) -> None:
        """The text in rows of 8, from token 0: at most 15 rows, tinted as on the page."""
        ax = figure.subplots()
        shown = min(len(self.tokens), 120)
        for i in range(shown):
            p = self.predictions[i - 1].probability if i else 1.0
            x, y = i % 8, i // 8
            ax.add_patch(_rectangle(x, y, surprise(p)))
            ax.text(
                x + 0.5,
                y + 0.42,
                plotted(self.tokens[i]),
                ha="center",
                va="center",
                fontsize=9,
                family="monospace",
            )
            ax.text(x + 0.5, y + 0.8, _percent(p) if i else "", ha="center", va="center", fontsize=7, color="0.25")
        ax.set(xlim=(0, 8), ylim=(-(-shown // 8), 0), xticks=[], yticks=[])
        more = f" (the first {shown} of {len(self.tokens)} tokens)" if shown < len(self.tokens) else ""
        ax.set_title(f"Probability of each token{more}: the stronger, the less likely", fontsize=11)


def _percent(p: float) -> str:
    return f"{p:.1%}" if p >= 0.0005 else "<0.1%"


def surprise(p: float) -> float:
    """How strong a token is tinted: 0 for a certain one, 1 for a probability of 1/1024 or less."""
    return min(1.0, -math.log2(max(p, 1e-300)) / 10)


def _rectangle(x: int, y: int, tint: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), 1, 1, facecolor=(0.835, 0.369, 0.0, 0.6 * tint), edgecolor="0.85")


@torch.inference_mode()
def token_probabilities(model: Mistral7B, tokenizer: Tokenizer, prompt: Prompt, *, top: int = 8) -> Probabilities:
    """The probability of each token of a prompt with `top` alternatives. InterpretError for an empty prompt."""
    ids = encode(model, tokenizer, prompt)
    tokens = torch.tensor(ids, device=model.norm.weight.device)
    hidden = model.hidden(tokens, Stateless(model.args.sliding_window))  # (T, D)
    found = following_logprobs(model.logits, hidden[:-1], tokens[1:], top, tokenizer.piece) if len(ids) > 1 else []
    last = model.logits(hidden[-1:])
    (after,) = logprobs(last, last.argmax(-1), top, tokenizer.piece)
    predictions = []
    for token, entries in zip(ids[1:], found, strict=True):
        own = entries[token]
        predictions.append(Predicted(math.exp(own.logprob), own.rank, _ranked(list(entries.values()), top)))
    return Probabilities(pieces(tokenizer, ids), predictions, _ranked(list(after.values()), top))


def _ranked(entries: list[Logprob], top: int) -> Alternatives:
    """The top-k entries: the token's own stands first in the list, and may rank below them."""
    best = sorted((e for e in entries if e.rank <= top), key=lambda e: -e.logprob)[:top]
    return [(e.decoded_token or "", math.exp(e.logprob)) for e in best]
