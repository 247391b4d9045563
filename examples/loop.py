"""The loop that generates text, in 30 lines: prefill, sample, decode, on `Mistral7B` and a rolling cache alone.

    prompt --- model, a chunk at a time ---> logits --- sample ---> token ---+
                                               ^                            |
                                               +--------- model <-----------+

    python examples/loop.py [TEXT]

The engine (mistral_7b/engine/) does the same for many requests at once, over pages in place of a ring, and gives
the same tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import torch

from mistral_7b import Mistral7B, SamplingParams, Tokenizer
from mistral_7b.sampling.choice import uniforms
from mistral_7b.sampling.sampler import Row, sample_rows

CHUNK = 512  # prompt tokens per forward


@torch.inference_mode()
def loop(model: Mistral7B, prompt: Sequence[int], params: SamplingParams, eos: int = 2) -> Iterator[int]:
    """The tokens that follow a prompt, the one that ends it included."""
    most = params.max_tokens or model.args.max_seq_len - len(prompt)
    cache = model.rolling_cache(1, len(prompt) + most)  # W slots at most: position p lies in slot p mod W
    ids = torch.tensor([list(prompt)], device=cache.positions.device)
    for part in ids.split(CHUNK, dim=1):  # prefill
        hidden = model.hidden(part, cache)  # (1, T, D)
    for n in range(most):
        logits = model.logits(hidden[:, -1])  # (1, V)
        u = uniforms(params.seed or 0, 0, n, 1)[0]  # the random number for (seed, completion 0, position n)
        token = sample_rows(logits, [Row(params, u)])  # (1,): temperature, top-k, top-p, min-p, then by u
        yield int(token)
        if int(token) == eos:
            return
        hidden = model.hidden(token[None], cache)  # decode: prefill of length one


if __name__ == "__main__":
    text = sys.argv[1] if len(sys.argv) > 1 else "def main("
    model, tokenizer = Mistral7B.from_pretrained("demo"), Tokenizer.from_pretrained("demo")
    prompt = tokenizer.encode(text)
    decoder = tokenizer.stream(after=prompt[-1:])
    print(text, end="")
    for token in loop(model, prompt, SamplingParams(temperature=0.7, seed=0, max_tokens=64)):
        print(decoder.push(token), end="", flush=True)
    print(decoder.flush())
