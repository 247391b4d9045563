"""A request as plain data, from which another engine computes the rest of its completions.

    this engine      prompt, t0 t1 t2 | lost
    the next one     prompt, t0 t1 t2 | t3 t4 ...      as after a preemption: recomputed, then continued

Everything that decides a token is a function of the job: the random number of a token is a hash of seed,
completion and position (sampling/choice.py), and penalties, stop strings, decoder, tool calls and grammar depend
on the tokens alone, which are pushed again. A deterministic engine (config.py) continues with the same bits.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

from ..errors import InterpretError
from ..sampling.params import SamplingParams
from .completion import TextPiece
from .grammar.spec import GrammarSpec
from .inputs import InputProcessor, RequestOptions
from .prompts import tokenize_prompt
from .request import Request
from .speculation import Speculation


@dataclass(frozen=True)
class Job:
    """A request, with the tokens that each of its completions has so far.

    `params` have the seed and the token limit, also where the request gave none. `ended`: the completions that
    are finished. `calls`: whether tool calls are separated from the text. All else as in Request.
    """

    id: str
    ids: list[int]
    params: SamplingParams
    tokens: list[list[int]]
    ended: list[bool]
    calls: bool
    grammar: GrammarSpec | None
    prefix: int
    pooling: str | None
    priority: int
    adapter: str | None
    salt: str | None
    client: str
    speculation: Speculation | None


def job_of(request: Request, id: str) -> Job:
    """The job, under the name `id`, that continues a request after the tokens of its completions.

    InterpretError for a request that records or steers activations.
    """
    salt = request.salt
    if request.watching is not None or isinstance(salt, tuple):
        records = request.watching is not None and request.watching.recording is not None
        raise InterpretError(
            "activations of a request that other engines may continue cannot be recorded or steered",
            field="record" if records else "steer",
            hint="send it to a server without Ray",
        )
    first = request.completions[0]
    return Job(
        id, request.ids, replace(request.params, seed=first.seed, max_tokens=first.max_tokens),
        [list(c.token_ids) for c in request.completions], [c.finished for c in request.completions],
        first.calls is not None, request.grammar, request.prefix, request.pooling, request.priority,
        request.adapter, salt, request.client, request.speculation,
    )  # fmt: skip


def resume(
    inputs: InputProcessor, job: Job, disconnected: threading.Event | None = None
) -> tuple[Request, list[TextPiece]]:
    """The request of a job, and the pieces that end completions whose grammar allows nothing more.

    Raises what `InputProcessor.request` does.
    """
    options = RequestOptions(
        job.id, job.priority, job.adapter, job.salt, job.speculation, job.client, disconnected=disconnected
    )  # fmt: skip
    if job.pooling is not None:
        return inputs.embedding(job.ids, job.pooling, options), []
    args, name = inputs.engine.model.args, "the prompt"
    prompt = tokenize_prompt(
        args, name, job.ids, job.params, inputs.tokenizer, inputs.tokenizer_error, ends=inputs.ends
    )
    request = inputs.request(prompt, options, prefix=job.prefix, grammar=job.grammar)
    if job.calls:
        inputs.parse_calls(request)
    request.forked |= any(job.tokens)
    pieces = [_replay(request, i, job) for i in range(len(job.tokens))]
    return request, [piece for piece in pieces if piece is not None]


def _replay(request: Request, index: int, job: Job) -> TextPiece | None:
    """Give a completion its tokens again; its text is discarded. Returns a piece if they end it."""
    s, c, tokens = request.sequences[index], request.completions[index], job.tokens[index]
    for token in tokens:
        c.push(token)
    c.take_deltas()
    s.append_tokens(tokens)
    s.ended = job.ended[index]
    if s.grammar is None or s.ended or not tokens:
        return None
    s.grammar.take(tokens)
    s.grammar.wait()
    if not s.grammar.over:
        return None
    s.ended, text = True, c.end()
    return TextPiece(text, index, (), c.finish_reason, c.stop_reason, (), c.take_deltas())
