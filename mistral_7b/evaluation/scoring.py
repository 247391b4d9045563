"""Scores of given tokens on the engine: log p(continuation | context), with shared prefixes.

    requests, sorted   A+x  A+y  A+z  B+u  B+v    contexts A, B and their continuations
    first round        A+x            B+u         their pages enter the prefix cache
    second round            A+y  A+z       B+v    compute the end of the context and their own tokens

A request is computed in the round after the one that computes its longest prefix. Contexts that begin alike, as
those with examples do, share that prefix in the same way.

A score depends on its context and continuation alone, to the last bit: neither on the batch size nor on the order
of the requests. Where rows of a step do not influence each other (the deterministic engine: docs/engine.md), steps
hold many requests. Without the compiled kernels, each step computes one request, in chunks that begin and end at
multiples of CHUNK, with or without a cached prefix: equal tokens are computed in equal shapes. On a GPU scores
agree up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile

from ..engine.config import EngineConfig
from ..engine.inputs import InputProcessor, RequestOptions
from ..engine.llm import open_engine, run
from ..engine.request import Request
from ..errors import EngineError
from ..model import Mistral7B
from ..sampling.logprobs import Score
from ..text.tokenizer import Tokenizer

CHUNK = 32  # tokens of a step where its shape changes the last bits: few rows cost as much time as one
STEP = 1024  # tokens of a step elsewhere
SHARED = 4  # tokens of a prefix that is worth a round of its own
USUAL = 2048  # tokens of a usual request, of which the KV pages hold a batch
SHORT = 256  # tokens of a short one: more of these are computed together, in the same pages

Ids = Sequence[int]


def scoring_engine(model: Mistral7B, tokenizer: Tokenizer | None, batch_size: int = 8) -> InputProcessor:
    """An engine whose scores do not depend on the batch, for `batch_size` requests together, or more short ones.

    On a CPU, weights in float32 or bfloat16 are packed in place (make_deterministic).
    """
    together = batch_size * USUAL // SHORT
    most = max(STEP, together + EngineConfig.page_size)
    # Pages of one token share whole prefixes.
    exact = EngineConfig(max_sequences=together, max_batch_tokens=most, page_size=1, deterministic=True)
    lengths = [model.args.max_seq_len, *[min(USUAL, model.args.max_seq_len)] * (batch_size - 1)]
    try:
        return open_engine(model, exact, tokenizer, None, lengths)
    except EngineError as e:
        if e.field != "deterministic":
            raise
    alone = EngineConfig(max_sequences=1, max_batch_tokens=CHUNK, page_size=CHUNK)
    rounded = EngineConfig(max_sequences=together, max_batch_tokens=most)
    config = alone if model.norm.weight.device.type == "cpu" else rounded
    return open_engine(model, config, tokenizer, None, lengths)


def score(
    inputs: InputProcessor, pairs: Sequence[tuple[Ids, Ids]], advance: Callable[[int], object] = lambda n: None
) -> list[list[Score]]:
    """The scores of each continuation's tokens after its context; both are token ids, neither is empty.

    `advance` is called with the number of pairs that are finished. GenerationError for a pair that does not fit
    the context; the first error of a request that fails.
    """
    shared: dict[tuple[int, ...], list[int]] = {}  # pairs that differ in the last token at most, in one request
    for i, (context, continuation) in enumerate(pairs):
        shared.setdefault((len(context), *context, *continuation)[:-1], []).append(i)
    groups = list(shared.values())
    requests = [_request(inputs, pairs, group, advance) for group in groups]
    order = sorted(range(len(groups)), key=lambda i: requests[i].ids)
    pool = inputs.engine.pool
    for part in rounds([requests[i].ids for i in order], pool.n_pages * pool.page // 2):
        chosen = [requests[order[i]] for i in part]
        run(inputs.engine, chosen)
        if error := next((r.error for r in chosen if r.error is not None), None):
            raise error
    found: list[list[Score]] = [[] for _ in pairs]
    for group, request in zip(groups, requests, strict=True):
        before = len(request.targets) - 1
        for i, last in zip(group, request.scores[before:], strict=True):
            found[i] = [*request.scores[:before], last]
    return found


def _request(
    inputs: InputProcessor,
    pairs: Sequence[tuple[Ids, Ids]],
    group: Sequence[int],
    advance: Callable[[int], object],
) -> Request:
    """The request of pairs with these numbers, which differ in the last token at most."""
    (context, continuation), *others = (pairs[i] for i in group)
    request = inputs.scoring(
        [*context, *continuation], len(context), RequestOptions(), f"request {group[0]}",
        [other[-1] for _, other in others],
    )  # fmt: skip

    def ended(*_: object) -> None:  # a request for scores has no output before its end
        advance(len(group))

    request.sink = ended
    return request


def rounds(sequences: Sequence[Ids], most: int) -> Iterator[list[int]]:
    """The places of sorted sequences, grouped so that each prefix of SHARED tokens or more is computed once.

    Prefixes are shared among neighbors with up to `most` tokens in all, which the prefix cache must hold; a shared
    prefix counts once.
    """
    found: list[list[int]] = []
    spans: list[tuple[int, int]] = []  # of the sequence before: first position, and the round that computes it
    tokens = 0
    before: list[int] = []
    for i, ids in enumerate(map(list, sequences)):
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, ids, strict=False)))
        first = shared if shared >= SHARED else 0
        if found and tokens + len(ids) - first > most:
            yield from found
            found, spans, tokens, first = [], [], 0, 0
        while spans and spans[-1][0] >= first:
            spans.pop()
        own = spans[-1][1] + 1 if spans else 0
        spans.append((first, own))
        found += [[] for _ in range(own + 1 - len(found))]
        found[own].append(i)
        tokens, before = tokens + len(ids) - first, ids
    yield from found
