"""The loop: sizes of the forwards, one BOS, and the engine's own tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mistral_7b.course.compare import equal, same
from mistral_7b.course.setting import small_model, tokens
from mistral_7b.generate import generate
from mistral_7b.model import Mistral7B
from mistral_7b.sampling.params import SamplingParams
from mistral_7b.text.tokenizer import Tokenizer


class Watched:
    """A model that notes how many tokens each forward has, and how many rows are projected."""

    def __init__(self, model: Mistral7B) -> None:
        self.model, self.args = model, model.args
        self.forwards: list[int] = []
        self.projected: list[int] = []

    def hidden(self, tokens: Tensor, cache: Any) -> Tensor:
        self.forwards.append(tokens.shape[-1])
        return self.model.hidden(tokens, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        self.projected.append(hidden[..., 0].numel())
        return self.model.logits(hidden)

    def __call__(self, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        return self.logits(self.hidden(tokens, cache)), cache


def check(ex: Any) -> None:
    _check_encode(ex)
    model = small_model()
    prompt = tokens(30)[0].tolist()
    watched = Watched(model)
    got = ex.prefill(watched, prompt, model.rolling_cache(), 8)
    same(
        got,
        model(torch.tensor([prompt]))[0][:, -1],
        "prefill(model, 30 tokens, cache, chunk=8)",
        {"these are the logits of the last chunk's first token": model(torch.tensor([prompt]))[0][:, 24]},
        1e-4,
    )
    equal(
        watched.forwards,
        [8, 8, 8, 6],
        "the tokens of each forward, for a prompt of 30 and chunks of 8",
        {(30,): "the prompt is not cut"},
    )
    equal(
        sum(watched.projected),
        1,
        "the number of rows that are projected onto the vocabulary",
        {
            6: "all rows of the last chunk are projected; only the last one is needed",
            30: "all rows are projected: the logits of a long prompt take gigabytes; use `hidden`, then "
            "`logits` of the last row",
            4: "each chunk's last row is projected; only the prompt's is needed",
        },
    )
    for params in (
        SamplingParams(temperature=0, max_tokens=12),
        SamplingParams(temperature=1.0, seed=3, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=1.3, top_k=9, top_p=0.8, min_p=0.02, seed=4, max_tokens=12, ignore_eos=True),
    ):
        _check_loop(ex, model, prompt, params)


def _check_encode(ex: Any) -> None:
    tokenizer = Tokenizer.from_pretrained("demo")
    words = [tokenizer.encode(text, bos=False) for text in ("import os\n", "def main(")]
    none, bos = words[0] + words[1], tokenizer.bos_id
    each = "each piece begins with BOS; only the first token of the prompt is BOS"
    mistakes = {
        tuple(none): "BOS is missing: the model has never seen a text without it",
        (bos, bos, *none): "BOS twice: `encode` has put it there already",
        (bos, *words[0], bos, *words[1]): each,
        (bos, bos, *words[0], bos, *words[1]): each,
    }
    got = list(ex.encode_pieces(tokenizer, ["import os\n", "def main("]))
    equal(got, [bos, *none], "encode_pieces(tokenizer, ['import os\\n', 'def main('])", mistakes)


def _check_loop(ex: Any, model: Mistral7B, prompt: list[int], params: SamplingParams) -> None:
    right = generate(model, prompt, params)[0].outputs[0].token_ids
    watched = Watched(model)
    eos = -1 if params.ignore_eos else 2
    got = list(ex.loop(watched, prompt, model.rolling_cache(), params, chunk=8, eos=eos))
    mistakes: dict[object, str] = {
        tuple(right[:-1]): "one token too few: max_tokens counts every token that is yielded",
        (*right, right[-1]): "the last token is yielded twice",
    }
    equal(got, right, f"temperature {params.temperature}, seed {params.seed}: the tokens of loop()", mistakes)
    equal(
        watched.forwards,
        [8, 8, 8, 6] + [1] * (len(right) - 1),
        "the tokens of each forward",
        {(8, 8, 8, 6) + (1,) * len(right): "the last token is fed to the model, and nothing follows it"},
    )
    stop = right[4]
    first = right.index(stop)
    got = list(ex.loop(watched, prompt, model.rolling_cache(), params, chunk=8, eos=stop))
    equal(
        got,
        right[: first + 1],
        f"with eos={stop}, the tokens of loop()",
        {
            tuple(right[:first]): "EOS itself is yielded, and ends the text",
            tuple(right): "the loop does not end at EOS",
        },
    )
