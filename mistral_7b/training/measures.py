"""What is measured while a model is fine-tuned: held-out rows, what it forgot, and its answers to samples.

forgotten = 1/T sum_t KL(p_t || q_t)      p: the model before training, q: now; on T tokens of neutral text
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache import Stateless
from ..engine.config import EngineConfig
from ..engine.inputs import RequestOptions
from ..engine.llm import open_engine, run
from ..model import Mistral7B
from ..sampling.params import SamplingParams
from ..text.default_text import default_text
from ..text.tokenizer import Tokenizer

NEUTRAL = 256  # tokens of text: their log-probabilities are 33 MB with a vocabulary of 32000
OPENING = 16  # tokens of a plain text that are given as a prompt


@contextlib.contextmanager
def evaluating(model: Mistral7B) -> Iterator[None]:
    """Without dropout and gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


class Forgetting:
    """The distance of a model in training from what it was when this object was made."""

    def __init__(self, model: Mistral7B, tokenizer: Tokenizer) -> None:
        _, text = default_text()
        ids = [tokenizer.start_id, *tokenizer.encode(text[: 8 * NEUTRAL], bos=False)][:NEUTRAL]
        self.model, self.tokens = model, torch.tensor(ids, device=model.norm.weight.device)
        self.before = self._log_probabilities()

    def _log_probabilities(self) -> Tensor:
        with evaluating(self.model):
            hidden = self.model.hidden(self.tokens, Stateless(self.model.args.sliding_window))
            return self.model.logits(hidden).log_softmax(-1)  # (T, V)

    def kl(self) -> float:
        """Return KL(before || now) in nats per token."""
        now = self._log_probabilities()
        return float(F.kl_div(now, self.before, reduction="batchmean", log_target=True).clamp(min=0))


class Measures:
    """An evaluation: of held-out items by the method, and of what the model forgot."""

    def __init__(
        self,
        evaluate: Callable[[Sequence[Any]], dict[str, float]],
        held_out: Sequence[Any],
        forgetting: Forgetting,
    ) -> None:
        self.evaluate, self.held_out, self.forgetting = evaluate, held_out, forgetting

    def __call__(self) -> dict[str, float]:
        found: dict[str, float] = {}
        if self.held_out:
            with evaluating(self.forgetting.model):
                found = self.evaluate(self.held_out)
        return {**found, "kl_from_base": self.forgetting.kl()}


def prompt_of(item: Any) -> list[int]:
    """Return the tokens of an item before those that are trained: the prompt of its (chosen) answer.

    Of a plain text, which is trained from its beginning, it is the opening.
    """
    document = getattr(item, "chosen", getattr(item, "answer", item))
    trained = getattr(document, "trained", None)
    if trained is None:  # a prompt to answer
        return [int(i) for i in document.ids]
    first = int(np.argmax(trained))
    return [int(i) for i in document.ids[: first if first > 1 else OPENING]]


def answers(model: Mistral7B, prompts: Sequence[list[int]], tokenizer: Tokenizer, max_tokens: int) -> list[str]:
    """Return what the model answers to prompts of token ids, always taking the most likely token."""
    if not prompts:
        return []
    longest = max(map(len, prompts))
    config = EngineConfig(max_sequences=len(prompts), prefix_caching=False)
    params = SamplingParams(temperature=0, max_tokens=max(1, min(max_tokens, model.args.max_seq_len - longest)))
    with evaluating(model):
        inputs = open_engine(model, config, tokenizer, None, [len(p) + max_tokens for p in prompts])
        requests = [inputs.text(p, params, RequestOptions(), name=f"sample {i}") for i, p in enumerate(prompts)]
        run(inputs.engine, requests)
        return [request.output().outputs[0].text for request in requests]
