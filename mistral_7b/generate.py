"""`generate` and `stream`: text generation with a loaded model, in one call to the engine.

    prompts  --tokenize-->  requests  --engine-->  pieces of text  -->  outputs

Each call makes an engine with memory for its prompts alone; the model is not changed. For many calls whose prompts
share prefixes use an LLM, which keeps its prefix cache. examples/loop.py shows the loop in 30 lines.
"""

from __future__ import annotations

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
from .engine.prompts import Prompt, as_prompts, defaults_of, ends_of, load_tokenizer, params_for, tokenize_prompt
from .engine.request import Request
from .engine.speculation import Speculation
from .errors import GenerationError
from .lora.adapters import Source
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
    adapter: Source | None = None,
) -> list[RequestOutput]:
    """Complete one or several prompts, texts or token ids of any lengths; return outputs in their order.

    params      for all prompts, or one for each; None is SamplingParams(), with 16 tokens and the model's defaults
    tokenizer   needed for text prompts and text output; None loads the one in the model's folder
    batch_size  completions decoded together; memory grows with it, outputs do not change
    speculate   settings of speculative decoding, which saves steps; outputs do not change
    kv_dtype    torch.int8 quantizes keys and values, to about half of bfloat16's bytes; None does not
    adapter     a LoRA adapter, or the folder or file of one

    Raises GenerationError, naming the prompt, if one is empty or does not fit the context, CacheError for another
    kv_dtype, AdapterError for an adapter of another model.
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
    adapter: Source | None = None,
) -> Iterator[TextPiece]:
    """Complete one prompt and yield its text in pieces; closing the iterator frees the engine.

    A completion's joined pieces are the text that `generate` returns. The call itself checks the prompt, before
    the first piece is computed.
    """
    engine, requests = _open(model, prompt, params, tokenizer, 1, speculate, kv_dtype, adapter)
    if len(requests) != 1:
        raise GenerationError(
            f"stream takes one prompt, not {len(requests)}", field="prompt", hint="use generate for many"
        )
    return _with_text(engine, requests[0])


def _with_text(engine: Engine, request: Request) -> Iterator[TextPiece]:
    """Merge pieces without text into the next one of their completion; without a tokenizer yield all."""
    ids_only = request.completions[0].tokenizer is None
    held: dict[int, tuple[int, ...]] = defaultdict(tuple)  # tokens without text yet, by completion
    for piece in follow(engine, request):
        held[piece.index] += piece.token_ids
        if piece.text or piece.finish_reason or ids_only:
            yield replace(piece, token_ids=held.pop(piece.index))


def _open(
    model: Mistral7B, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None,
    tokenizer: Tokenizer | None, batch_size: int, speculate: Speculation | None, kv_dtype: torch.dtype | None,
    adapter: Source | None,
) -> tuple[Engine, list[Request]]:  # fmt: skip
    """An engine with memory for these prompts, and their requests."""
    int8 = check_kv_dtype(kv_dtype)
    if batch_size < 1:
        raise GenerationError(f"batch_size must be at least 1, not {batch_size}", field="batch_size")
    several = as_prompts(prompts)
    params = params or SamplingParams(**defaults_of(model))
    tokenizer_error = ""
    if tokenizer is None:
        tokenizer, tokenizer_error = load_tokenizer(model)
    ends = ends_of(model, tokenizer)
    tokenized = [
        tokenize_prompt(model.args, f"prompt {i}", prompt, p, tokenizer, tokenizer_error, ends=ends)
        for i, (prompt, p) in enumerate(zip(several, params_for(several, params), strict=True))
    ]
    rows = max([batch_size, *(len(one.completions) for one in tokenized)])  # a prompt's completions run together
    config = EngineConfig(
        max_sequences=rows, max_batch_tokens=max(PREFILL_CHUNK, rows + EngineConfig.page_size),
        kv_dtype="int8" if int8 else None, prefix_caching=len(tokenized) > 1, speculation=speculate,
    )  # fmt: skip
    lengths = [len(c.prompt) + c.max_tokens for one in tokenized for c in one.completions]
    adapters = None if adapter is None else {"adapter": adapter}
    inputs = open_engine(model, config, tokenizer, adapters, lengths)
    options = RequestOptions(adapter="adapter" if adapters else None)
    return inputs.engine, [inputs.request(one, options, name=f"prompt {i}") for i, one in enumerate(tokenized)]
