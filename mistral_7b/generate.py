"""`generate` and `stream`: prompts in, texts out, with a model that is open, in one call. A face of the engine.

    prompts  --read-->  requests  --engine-->  pieces of text  -->  outputs

The engine is made for the call, with memory for these prompts and no more, and is gone after it; the model is
not changed. For many calls whose prompts share prefixes take an LLM, which keeps what it has computed. What such
a loop does is told in 30 lines by examples/loop.py.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from .cache.entries import check_kv_dtype
from .engine.completion import CompletionOutput, RequestOutput, TextPiece
from .engine.config import EngineConfig
from .engine.engine import Engine
from .engine.inputs import RequestOptions
from .engine.llm import follow, open_engine, run
from .engine.prompts import Prompt, as_prompts, load_tokenizer, params_for, tokenize_prompt
from .engine.request import Request
from .engine.speculation import Speculation
from .errors import GenerationError
from .model import Mistral7B
from .sampling.params import SamplingParams
from .text.tokenizer import Tokenizer

__all__ = ["CompletionOutput", "RequestOutput", "Speculation", "TextPiece", "generate", "stream"]

PREFILL_CHUNK = 512  # prompt tokens per forward


def generate(
    model: Mistral7B,
    prompts: Prompt | Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    batch_size: int = 16,
    speculate: Speculation | None = None,
    kv_dtype: torch.dtype | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> list[RequestOutput]:
    """Continue one or many prompts, texts or token ids, in any mixture of lengths.

    params      for all prompts, or one for each; none is SamplingParams(), which is 16 tokens
    tokenizer   needed for text prompts and text output; none takes the one beside the model's files
    batch_size  completions decoded together; memory grows with it, what comes out does not change
    speculate   guess tokens ahead, which makes steps fewer; what comes out does not change
    kv_dtype    torch.int8 keeps keys and values in about half of bfloat16's bytes, rounded; none: as they are
    adapter     a LoRA adapter's folder or file (PEFT's or mistral-finetune's) to use with the model

    Raises GenerationError, naming the prompt, for one that is empty or does not fit the context, CacheError
    for a kv_dtype that is neither, AdapterError for an adapter of another model.
    """
    engine, requests = _open(model, prompts, params, tokenizer, batch_size, speculate, kv_dtype, adapter)
    run(engine, requests)
    for request in requests:
        if request.error is not None:
            raise request.error
    return [request.output() for request in requests]


def stream(
    model: Mistral7B,
    prompt: Prompt,
    params: SamplingParams | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    speculate: Speculation | None = None,
    kv_dtype: torch.dtype | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> Iterator[TextPiece]:
    """Continue one prompt, giving out text as soon as it is certain; closing the iterator frees everything.

    The pieces of a completion, joined, are the text that `generate` returns. Errors are raised by the
    call itself, before the first piece is asked for.
    """
    engine, requests = _open(model, prompt, params, tokenizer, 1, speculate, kv_dtype, adapter)
    if len(requests) != 1:
        raise GenerationError(
            f"stream takes one prompt, not {len(requests)}", field="prompt", hint="use generate for many"
        )
    return _certain(engine, requests[0])


def _certain(engine: Engine, request: Request) -> Iterator[TextPiece]:
    """Pieces with text, or without a tokenizer with tokens; others wait for the next of their completion."""
    silent = request.completions[0].tokenizer is None
    waiting: dict[int, tuple[int, ...]] = defaultdict(tuple)  # tokens whose text was not certain, per completion
    for piece in follow(engine, request):
        waiting[piece.index] += piece.token_ids
        if piece.text or piece.finish_reason or silent:
            yield replace(piece, token_ids=waiting.pop(piece.index))


def _open(
    model: Mistral7B, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None,
    tokenizer: Tokenizer | None, batch_size: int, speculate: Speculation | None, kv_dtype: torch.dtype | None,
    adapter: str | os.PathLike[str] | None,
) -> tuple[Engine, list[Request]]:  # fmt: skip
    """An engine for these prompts alone, and their requests."""
    int8 = check_kv_dtype(kv_dtype)
    if batch_size < 1:
        raise GenerationError(f"batch_size must be at least 1, not {batch_size}", field="batch_size")
    several = as_prompts(prompts)
    why = ""
    if tokenizer is None:
        tokenizer, why = load_tokenizer(model)
    reads = [
        tokenize_prompt(model.args, f"prompt {i}", prompt, p, tokenizer, why)
        for i, (prompt, p) in enumerate(zip(several, params_for(several, params), strict=True))
    ]
    rows = max([batch_size, *(len(read.completions) for read in reads)])  # a prompt's completions run together
    config = EngineConfig(
        max_sequences=rows, max_batch_tokens=max(PREFILL_CHUNK, rows + EngineConfig.page_size),
        kv_dtype="int8" if int8 else None, prefix_caching=len(reads) > 1, speculation=speculate,
    )  # fmt: skip
    lengths = [len(c.prompt) + c.max_tokens for read in reads for c in read.completions]
    adapters = None if adapter is None else {"adapter": adapter}
    reader = open_engine(model, config, tokenizer, adapters, lengths)
    asked = RequestOptions(adapter="adapter" if adapters else None)
    return reader.engine, [reader.request(read, asked, name=f"prompt {i}") for i, read in enumerate(reads)]
