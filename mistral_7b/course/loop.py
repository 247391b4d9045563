"""Generation with a model and a cache alone, as examples/loop.py does it, for exercise 11."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..cache import Cache
from ..model import Mistral7B
from ..sampling.choice import modes_of, select_tokens, uniforms
from ..sampling.params import SamplingParams
from ..text.tokenizer import Tokenizer


def encode_pieces(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    """Token ids of a prompt of several texts, each encoded on its own: one BOS, then their tokens."""
    ids = tokenizer.encode("")  # BOS alone
    for text in texts:
        ids += tokenizer.encode(text, bos=False)
    return ids


def prefill(model: Mistral7B, prompt: Sequence[int], cache: Cache, chunk: int) -> Tensor:
    """Write a prompt into the cache, at most `chunk` tokens per forward; logits (1, V) of its last token.

    Only the last token is projected onto the vocabulary: `hidden` and `logits` are separate for this.
    """
    for part in torch.tensor([list(prompt)]).split(chunk, dim=1):
        hidden = model.hidden(part, cache)  # (1, T, D)
    return model.logits(hidden[:, -1])


def loop(
    model: Mistral7B, prompt: Sequence[int], cache: Cache, params: SamplingParams, chunk: int = 64, eos: int = 2
) -> Iterator[int]:
    """Yield the tokens that follow a prompt: at most `params.max_tokens`, and none after `eos`, which is yielded.

    Token n (from 0) is sampled with the random number `uniforms(params.seed, 0, n, 1)`, by `select_tokens` and
    `modes_of([params], V, device)`. The last token is not fed to the model: nothing follows it.
    """
    logits = prefill(model, prompt, cache, chunk)
    modes = modes_of([params], logits.shape[-1], logits.device)
    for n in range(params.max_tokens or 0):
        u = torch.from_numpy(uniforms(params.seed or 0, 0, n, 1))
        token = int(select_tokens(logits, modes, u))
        yield token
        if token == eos or n + 1 == params.max_tokens:
            return
        logits = prefill(model, [token], cache, chunk)  # decode is prefill of length one
