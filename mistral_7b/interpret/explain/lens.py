"""The logit lens: what each layer's residual stream would predict, if the layers after it were left out.

    logits of layer n = W norm(residual_n)          N layers · T tokens · D width · V vocabulary

https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens. The last layer's row is the
model's own output, bit for bit: the same norm and projection of the same numbers, ROWS tokens at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...cache import Stateless
from ...model import Mistral7B
from ...text.tokenizer import Tokenizer
from ..contexts import record
from .page import Picture, plotted
from .prompts import Prompt, encode, layers_of, pieces

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = 512  # tokens projected at once: 100 MB of logits for 49,152 tokens
EMBEDDING = "embedding"


@dataclass(frozen=True)
class Row:
    """A layer's predictions at each position shown (P): top-k ids and probabilities, entropy in bits."""

    name: str
    ids: Sequence[Sequence[int]]  # (P, k)
    probabilities: Sequence[Sequence[float]]  # (P, k)
    entropy: Sequence[float]  # (P,)


@dataclass(frozen=True)
class LogitLens(Picture):
    """Predictions of every layer at the positions from `start` on; the last row is the model's output."""

    view = "lens"
    title = "Logit lens"
    figsize = (11.0, 8.0)

    tokens: Sequence[str]
    start: int
    rows: Sequence[Row] = field(repr=False)
    words: Mapping[int, str] = field(repr=False)  # ids of the rows, as they are displayed

    def data(self) -> dict[str, Any]:
        T = len(self.tokens)
        which = f"{T} positions" if not self.start else f"the last {T - self.start} of {T} positions"
        return {
            "about": f"What each layer's residual stream would predict next, at {which}: the final norm and "
            "output projection applied to it. The last row is the model's output. Underlined: its final choice.",
            "tokens": list(self.tokens),
            "start": self.start,
            "rows": [
                {
                    "name": row.name,
                    "ids": row.ids,
                    "p": [[round(p, 5) for p in ps] for ps in row.probabilities],
                    "entropy": [round(x, 3) for x in row.entropy],
                }
                for row in self.rows
            ],
            "words": {str(i): word for i, word in self.words.items()},
        }

    def draw(self, figure: Figure) -> None:
        """The last 12 positions: the top token in each cell, tinted by its probability."""
        ax = figure.subplots()
        P = len(self.rows[0].entropy)
        last = range(max(0, P - 12), P)
        image = ax.imshow(
            [[row.probabilities[i][0] for i in last] for row in self.rows],
            cmap="Blues",
            vmin=0,
            vmax=1,
            aspect="auto",
        )
        size = 8 if len(self.rows) < 20 else 6.5
        for y, row in enumerate(self.rows):
            for x, i in enumerate(last):
                ink = "white" if row.probabilities[i][0] > 0.6 else "black"
                ax.text(
                    x,
                    y,
                    plotted(self.words[row.ids[i][0]], 10),
                    ha="center",
                    va="center",
                    fontsize=size,
                    color=ink,
                )
        ax.set_xticks(
            range(len(last)), [plotted(self.tokens[self.start + i], 10) for i in last], rotation=45, fontsize=8
        )
        ax.set_yticks(range(len(self.rows)), [row.name for row in self.rows], fontsize=size)
        some = f" (the last {len(last)} of {self.start + P} positions)" if len(last) < self.start + P else ""
        ax.set_title(f"Logit lens: the most probable next token after each layer{some}", fontsize=11)
        ax.set_xlabel("after the token")
        figure.colorbar(image, ax=ax, shrink=0.6, label="probability of the token shown")


@torch.inference_mode()
def logit_lens(
    model: Mistral7B,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    layers: Sequence[int] | None = None,
    top: int = 5,
    last: int = 256,
) -> LogitLens:
    """The logit lens of a prompt's `last` positions, in these layers (None: all), and the last layer.

    `top` tokens are kept of each. InterpretError for an empty prompt, or a layer that is not there.
    """
    ids = encode(model, tokenizer, prompt)
    chosen = layers_of(model, layers)
    final = model.args.n_layers - 1
    start = max(0, len(ids) - last)
    tokens = torch.tensor(ids, device=model.norm.weight.device)
    with record(model, "embedding", "residual", layers=sorted({*chosen, final})) as tape:
        model.hidden(tokens[None], Stateless(model.args.sliding_window))
    streams = {EMBEDDING: tape["embedding"]} if layers is None else {}
    streams |= {f"layer {n}": tape["residual", n] for n in sorted({*chosen, final})}
    rows = [_row(name, lens_logits(model, x), start, top) for name, x in streams.items()]
    used = {i for row in rows for ids_at in row.ids for i in ids_at}
    words = dict(zip(sorted(used), pieces(tokenizer, sorted(used)), strict=True))
    return LogitLens(pieces(tokenizer, ids), start, rows, words)


def lens_logits(model: Mistral7B, residual: Tensor) -> list[Tensor]:
    """Logits of a residual stream (1, T, D), in pieces (1, ROWS, V) in float32."""
    return [model.logits(h) for h in model.norm(residual).split(ROWS, 1)]


def _row(name: str, logits: list[Tensor], start: int, top: int) -> Row:
    ids: list[list[int]] = []
    probabilities: list[list[float]] = []
    entropy: list[float] = []
    for part in logits:
        logs = part[0].log_softmax(-1)
        best = logs.topk(min(top, logs.shape[-1]))
        ids += best.indices.tolist()
        probabilities += best.values.exp().tolist()
        entropy += (-(logs.exp() * logs).sum(-1) / math.log(2)).tolist()
    return Row(name, ids[start:], probabilities[start:], entropy[start:])
