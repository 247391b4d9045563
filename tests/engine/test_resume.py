"""A request cut at any token and continued on another engine ends as the undisturbed one, bit for bit."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Sequence

import pytest
import torch
from tiny import tiny_args, tiny_model

from mistral_7b.engine.completion import TextPiece
from mistral_7b.engine.config import EngineConfig
from mistral_7b.engine.inputs import InputProcessor, RequestOptions
from mistral_7b.engine.llm import follow, open_engine
from mistral_7b.engine.request import Request
from mistral_7b.engine.resume import job_of, resume
from mistral_7b.quantization.schemes import Scheme, quantize
from mistral_7b.sampling.params import SamplingParams, StructuredOutputs
from mistral_7b.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.v3()
CONFIG = EngineConfig(max_sequences=8, max_batch_tokens=24, page_size=4, kv_cache_bytes=1 << 22)
TOOL = {"type": "function", "function": {"name": "go", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def engines() -> list[InputProcessor]:
    """Two engines with equal weights."""
    args = tiny_args(vocab_size=32768, sliding_window=16, max_seq_len=128, dim=64, hidden_dim=96, head_dim=32)
    model = quantize(tiny_model(args, torch.bfloat16), Scheme("int8"))
    return [open_engine(copy.deepcopy(model), CONFIG, TOKENIZER, {}) for _ in range(2)]


def told(pieces: Sequence[TextPiece], n: int) -> list[object]:
    """What a client is told of each completion."""
    out: list[object] = []
    for i in range(n):
        own = [p for p in pieces if p.index == i]
        out.append((
            "".join(p.text for p in own), [t for p in own for t in p.token_ids], own[-1].finish_reason,
            own[-1].stop_reason, [x for p in own for x in p.logprobs],
            [(d.index, d.id, d.name, d.arguments) for p in own for d in p.tool_calls],
        ))  # fmt: skip
    return out


def cut(inputs: InputProcessor, request: Request, after: int) -> list[TextPiece]:
    """Compute a request until it has `after` tokens, then drop it; return its pieces."""
    pieces: list[TextPiece] = []
    stream = follow(inputs.engine, request)
    for piece in stream:
        pieces.append(piece)
        if sum(len(p.token_ids) for p in pieces) >= after and not inputs.engine.idle:
            break
    stream.close()
    return pieces


STOP = SamplingParams(temperature=1, seed=5, max_tokens=24, logprobs=2, presence_penalty=0.6, min_tokens=2)
CASES = {
    "sampled, penalized, with log-probabilities": STOP,
    "without a seed": SamplingParams(temperature=1, max_tokens=20),
    "three completions": SamplingParams(temperature=1, seed=2, max_tokens=14, n=3, repetition_penalty=1.2),
    "a grammar": SamplingParams(
        temperature=1, seed=3, max_tokens=40, structured_outputs=StructuredOutputs(regex="(ab|ba|c d){3,9}")
    ),
    "tools": SamplingParams(temperature=1, seed=4, max_tokens=40),
}


@pytest.mark.parametrize("case", CASES)
def test_a_request_continues_on_another_engine(engines: list[InputProcessor], case: str) -> None:
    params, here, there = CASES[case], engines[0], engines[1]

    def fresh(seed: int | None) -> Request:
        own = SamplingParams(**{**vars(params), "seed": params.seed or seed})
        if case == "tools":
            messages = [{"role": "user", "content": "hello"}]
            return here.chat(messages, own, RequestOptions(), tools=[TOOL], tool_choice="required")
        return here.text("one two three four five six", own, RequestOptions())

    whole = fresh(7)
    undisturbed = list(follow(here.engine, whole))
    n, total = params.n, sum(len(p.token_ids) for p in undisturbed)
    draw = random.Random(1)
    for after in {0, 1, total - 1, *(draw.randrange(total) for _ in range(4))}:
        begun = fresh(7)
        before = cut(here, begun, after) if after else []
        for c in begun.completions:  # what the holder of the stream knows
            own = [p for p in before if p.index == c.index]
            c.token_ids = [t for p in own for t in p.token_ids]
            c.finish_reason = own[-1].finish_reason if own else None
        job = pickle.loads(pickle.dumps(job_of(begun, f"again {after}")))
        request, ends = resume(there, job)
        after_cut = [*ends, *(follow(there.engine, request) if request.pending else ())]
        assert told([*before, *after_cut], n) == told(undisturbed, n), after
    assert there.engine.idle
    there.engine.check()


def test_a_stop_string_that_the_cut_divides_is_found(engines: list[InputProcessor]) -> None:
    here, there = engines
    plain = here.text("one two", SamplingParams(temperature=1, seed=5, max_tokens=24), RequestOptions())
    text = str(TextPiece.joined(list(follow(here.engine, plain))))
    stop = text[len(text) // 3 : len(text) // 3 + 12]
    params = SamplingParams(temperature=1, seed=5, max_tokens=24, stop=[stop])
    undisturbed = list(follow(here.engine, here.text("one two", params, RequestOptions())))
    assert undisturbed[-1].stop_reason == stop
    for after in range(1, sum(len(p.token_ids) for p in undisturbed)):
        begun = here.text("one two", params, RequestOptions())
        before = cut(here, begun, after)
        begun.completions[0].token_ids = [t for p in before for t in p.token_ids]
        begun.completions[0].finish_reason = None
        request, _ = resume(there, job_of(begun, f"stop {after}"))
        assert told([*before, *follow(there.engine, request)], 1) == told(undisturbed, 1), after
