"""Scores of given tokens on the engine: log p(continuation | context), with shared prefixes.

    requests   A+x  B+u  A+y  B+v  A+z        contexts A, B and their continuations
    first      A+x  B+u                       one of each context; its pages enter the prefix cache
    then       A+y  A+z  B+v                  the others compute the end of the context and their own tokens

A score depends on its context and continuation alone, to the last bit: neither on the batch size nor on the order
of the requests. Where rows of a step do not influence each other (int8, int4, bfloat16 on a CPU: docs/engine.md),
steps hold many requests. On a CPU in other types, each step computes one request, in chunks that begin and end at
multiples of CHUNK, with or without a cached prefix: equal tokens are computed in equal shapes. On a GPU scores
agree up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from ..engine.config import EngineConfig
from ..engine.inputs import InputProcessor, RequestOptions
from ..engine.llm import open_engine, run
from ..errors import EngineError
from ..model import Mistral7B
from ..sampling.logprobs import Score
from ..text.tokenizer import Tokenizer

CHUNK = 32  # tokens of a step where its shape changes the last bits: few rows cost as much time as one
STEP = 512  # tokens of a step elsewhere
USUAL = 2048  # tokens of a usual request, of which the KV pages hold a batch

Ids = Sequence[int]


def scoring_engine(model: Mistral7B, tokenizer: Tokenizer | None, batch_size: int = 8) -> InputProcessor:
    """An engine whose scores do not depend on the batch, computing up to `batch_size` requests together."""
    most = max(STEP, batch_size + EngineConfig.page_size)
    exact = EngineConfig(max_sequences=batch_size, max_batch_tokens=most, deterministic=True)
    lengths = [model.args.max_seq_len, *[min(USUAL, model.args.max_seq_len)] * (batch_size - 1)]
    try:
        return open_engine(model, exact, tokenizer, None, lengths)
    except EngineError as e:
        if e.field != "deterministic":
            raise
    alone = EngineConfig(max_sequences=1, max_batch_tokens=CHUNK, page_size=CHUNK)
    together = EngineConfig(max_sequences=batch_size, max_batch_tokens=most)
    config = alone if model.norm.weight.device.type == "cpu" else together
    return open_engine(model, config, tokenizer, None, lengths)


def score(
    inputs: InputProcessor, pairs: Sequence[tuple[Ids, Ids]], advance: Callable[[int], object] = lambda n: None
) -> list[list[Score]]:
    """The scores of each continuation's tokens after its context; both are token ids, neither is empty.

    `advance` is called with the number of pairs that are finished. GenerationError for a pair that does not fit
    the context; the first error of a request that fails.
    """
    requests = [
        inputs.scoring([*context, *continuation], len(context), RequestOptions(), f"request {i}")
        for i, (context, continuation) in enumerate(pairs)
    ]
    order = sorted(range(len(pairs)), key=lambda i: (tuple(pairs[i][0]), tuple(pairs[i][1])))
    groups = [list(same) for _, same in groupby(order, key=lambda i: tuple(pairs[i][0]))]
    size = inputs.engine.config.max_sequences
    for wave in (groups[at : at + size] for at in range(0, len(groups), size)):
        for part in ([g[0] for g in wave], [i for g in wave for i in g[1:]]):
            chosen = [requests[i] for i in part]
            run(inputs.engine, chosen, advance)
            if error := next((r.error for r in chosen if r.error is not None), None):
                raise error
    return [request.scores for request in requests]
