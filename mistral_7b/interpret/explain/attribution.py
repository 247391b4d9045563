"""How much each token of a prompt contributes to the log-probability of a target token, by two methods.

    gradient x input     a_i = x_i . df/dx_i      x_i: embedding of token i;  f: log p(target | prompt)
    leave one out        b_i = f(prompt) - f(prompt without token i)

Sum_i a_i is the derivative of f along the scale of all embeddings, d f(s x) / ds at s = 1, which a central
difference checks. It is not f itself: gradient x input is local, and norms make f nearly blind to the scale. The
b_i have no sum: what two tokens say alike, neither misses. Positions after a token that is left out are one less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...cache import Stateless
from ...errors import InterpretError
from ...model import Mistral7B
from ...text.tokenizer import Tokenizer
from ..contexts import patch
from .page import Picture, plotted
from .prompts import Prompt, encode, one_token, pieces

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 128  # tokens left out by default, from the end
ROWS = 4096  # tokens of all shortened prompts that are computed at once
STEP, COARSE_STEP = 0.01, 0.1  # of the scale, in the central difference; where activations are rounded


@dataclass(frozen=True)
class Gradients:
    """Gradient x input of every token, and the derivative along the scale by a central difference.

    `rounded`: the model rounds its activations, which the gradient ignores and the difference does not.
    """

    values: Sequence[float]
    difference: float
    rounded: bool


@dataclass(frozen=True)
class Attributions(Picture):
    """What each token contributes to the log-probability of `target`, in nats.

    `gradients` is None for a model without a backward pass; `left_out` has the positions that were left out.
    """

    view = "attribution"
    title = "Attribution"

    tokens: Sequence[str]
    target: str
    log_probability: float
    gradients: Gradients | None
    left_out: dict[int, float]

    @property
    def agreement(self) -> float | None:
        """Spearman's rank correlation of both methods over the tokens left out; None without both."""
        if self.gradients is None or len(self.left_out) < 2:
            return None
        pairs = torch.tensor(
            [[self.gradients.values[i], b] for i, b in self.left_out.items()], dtype=torch.float64
        )
        return float(torch.corrcoef(pairs.argsort(0).argsort(0).double().T)[0, 1])

    def data(self) -> dict[str, Any]:
        g, rank = self.gradients, self.agreement
        if g is None:
            notes = ["This model's kernels have no backward pass: only leave-one-out is shown."]
        else:
            rough = (
                " The model rounds its activations, which the gradient ignores, so the two agree roughly at best."
                if g.rounded
                else ""
            )
            notes = [
                f"The sum of gradient x input is {sum(g.values):.4g}; the derivative along the scale of all "
                f"embeddings, which it should equal, is {g.difference:.4g} by a central difference.{rough}"
            ]
        if rank is not None:
            notes.append(f"Rank correlation of the two methods over {len(self.left_out)} tokens: {rank:.2f}.")
        return {
            "about": "What each token contributes to the log-probability of the target token, in nats: "
            "positive ones make it more likely.",
            "tokens": list(self.tokens),
            "target": self.target,
            "log_probability": self.log_probability,
            "gradients": None if g is None else list(g.values),
            "left_out": [[i, b] for i, b in self.left_out.items()],
            "notes": notes,
        }

    def draw(self, figure: Figure) -> None:
        """Bars of the last 40 tokens by each method."""
        first = max(0, len(self.tokens) - 40)
        shown = range(first, len(self.tokens))
        methods = [("leave one out", self.left_out)]
        if self.gradients is not None:
            methods.insert(0, ("gradient x input", dict(enumerate(self.gradients.values))))
        for ax, (name, values) in zip(
            figure.subplots(len(methods), squeeze=False, sharex=True).flat, methods, strict=True
        ):
            heights = [values.get(i, 0.0) for i in shown]
            ax.bar(range(len(shown)), heights, color=["#d55e00" if h > 0 else "#0072b2" for h in heights])
            ax.axhline(0, color="0.3", lw=0.8)
            ax.set_ylabel(f"{name}, nats", fontsize=9)
            ax.set_xticks(range(len(shown)), [plotted(self.tokens[i], 12) for i in shown], rotation=90, fontsize=8)
        figure.suptitle(
            f"Contributions to log p({plotted(self.target)}) = {self.log_probability:.3f}", fontsize=11
        )


def attributions(
    model: Mistral7B,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    target: str | int | None = None,
    leave_out: Sequence[int] | None = None,
) -> Attributions:
    """Attribute the log-probability of `target` (None: the most probable next token) to a prompt's tokens.

    `leave_out` are positions to leave out, None being the last MOST. InterpretError for an empty prompt, a target
    that is not one token, and a position that is not in the prompt.
    """
    ids = encode(model, tokenizer, prompt)
    T = len(ids)
    chosen = range(max(0, T - MOST), T) if leave_out is None else leave_out
    if wrong := [i for i in chosen if not 0 <= i < T]:
        raise InterpretError(f"there is no token {wrong[0]}: the prompt has 0 to {T - 1}", field="leave_out")
    tokens = torch.tensor(ids, device=model.norm.weight.device)
    with torch.inference_mode():
        following = _log_probabilities(model, tokens[None])[0]
    token = following.argmax().item() if target is None else target
    if isinstance(token, str):
        token = one_token(tokenizer, token, prompt)
    if not 0 <= token < model.args.vocab_size:
        raise InterpretError(f"there is no token {token} in the vocabulary", field="target")
    score = float(following[int(token)])
    gradients = gradient_x_input(model, tokens, int(token))
    left_out = leave_one_out(model, tokens, int(token), list(chosen), score) if T > 1 else {}
    return Attributions(pieces(tokenizer, ids), tokenizer.piece(int(token)), score, gradients, left_out)


def gradient_x_input(model: Mistral7B, tokens: Tensor, target: int) -> Gradients | None:
    """Gradient x input of tokens (T,) for the log-probability of `target` after them.

    None if the model's kernels have no backward pass.
    """
    with torch.inference_mode(False), torch.enable_grad():
        tokens = tokens.clone()
        x = model.tok_embeddings(tokens)[None].detach().clone().requires_grad_()
        score = _score(model, tokens, x, target)
        if not score.requires_grad:
            return None
        (gradient,) = torch.autograd.grad(score, x)
    values = (gradient.double() * x.detach().double()).sum(-1)[0]
    rounds = is_rounded(model)
    step = COARSE_STEP if rounds else STEP
    with torch.inference_mode():
        up, down = (_score(model, tokens, x.detach() * (1 + s), target).item() for s in (step, -step))
    return Gradients(values.tolist(), (up - down) / (2 * step), rounds)


def is_rounded(model: Mistral7B) -> bool:
    """Whether activations are rounded on the way: to a type below float32, or by quantized projections."""
    plain = all(type(m) is nn.Linear for m in (model.output, model.get_submodule("layers.0.feed_forward.w2")))
    return not plain or model.norm.weight.dtype.itemsize < 4


def _score(model: Mistral7B, tokens: Tensor, embeddings: Tensor, target: int) -> Tensor:
    """The log-probability of `target` after tokens (T,) with these embeddings (1, T, D)."""
    with patch(model, {("embedding", None): embeddings}):
        return _log_probabilities(model, tokens[None])[0, target]


@torch.inference_mode()
def leave_one_out(
    model: Mistral7B, tokens: Tensor, target: int, positions: Sequence[int], score: float
) -> dict[int, float]:
    """By how much the log-probability of `target` falls from `score` without each of these positions, in nats."""
    T = len(tokens)
    keep = torch.arange(T - 1, device=tokens.device)
    out: dict[int, float] = {}
    for some in torch.tensor(list(positions), device=tokens.device).split(max(1, ROWS // T)):
        rows = tokens[keep + (keep >= some[:, None])]  # (B, T - 1)
        found = score - _log_probabilities(model, rows)[:, target].double()
        out |= dict(zip(some.tolist(), found.tolist(), strict=True))
    return out


def _log_probabilities(model: Mistral7B, tokens: Tensor) -> Tensor:
    """Log-probabilities (B, V) of the token after tokens (B, T)."""
    hidden = model.hidden(tokens, Stateless(model.args.sliding_window))
    return model.logits(hidden[:, -1]).log_softmax(-1)
