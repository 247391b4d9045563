"""Prompts as they are given, made ready to be continued: whatever can be checked beforehand is checked here."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .completion import Completion
from .errors import GenerationError, Mistral7BError, PromptTooLongError, SamplingError, TokenizerError
from .model import Mistral7B, ModelArgs
from .sampling import SamplingParams, draw_seed
from .tokenizer import Tokenizer

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class ReadPrompt:
    """A prompt that can be continued, and its n completions, which have no tokens yet."""

    prompt: str | None
    ids: list[int]
    params: SamplingParams
    completions: list[Completion]


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One text or one list of ids is one prompt."""
    if isinstance(prompts, Tensor):
        prompts = prompts.tolist()
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def read_prompts(
    model: Mistral7B,
    prompts: Prompt | Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None,
    tokenizer: Tokenizer | None,
) -> list[ReadPrompt]:
    """Check everything that can be checked before the first token is computed."""
    several = as_prompts(prompts)
    each = params_for(several, params)
    why = ""
    if tokenizer is None:
        tokenizer, why = tokenizer_beside(model)
    return [
        read_prompt(model.args, f"prompt {i}", p, sp, tokenizer, why)
        for i, (p, sp) in enumerate(zip(several, each, strict=True))
    ]


def params_for(
    prompts: Sequence[object], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[SamplingParams]:
    """The parameters of each prompt."""
    each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(prompts)
    if len(each) != len(prompts):
        raise GenerationError(
            f"{len(prompts)} prompts with {len(each)} SamplingParams",
            field="params",
            hint="give one, or one for each",
        )
    return each


def read_prompt(
    args: ModelArgs, name: str, prompt: Prompt, params: SamplingParams, tokenizer: Tokenizer | None, why: str = "",
    space: int | None = None, field: str = "prompt",
) -> ReadPrompt:  # fmt: skip
    """One prompt; errors call it `name`, and the request's field that it came in `field`.

    `why`: why there is no tokenizer, if there is none.

    `space`: tokens for which there is memory, the prompt's included, where that is less than a context.
    """
    if tokenizer is None and (isinstance(prompt, str) or params.stops):
        raise GenerationError(
            f"{name}: text prompts and stop strings need a tokenizer, and {why}",
            field=field if isinstance(prompt, str) else "stop",
            hint="pass tokenizer=...",
        )
    if isinstance(prompt, str):
        assert tokenizer is not None  # as was just seen
        try:
            ids = tokenizer.encode(prompt)
        except TokenizerError as e:
            raise TokenizerError.of(e, message=f"{name}: {e.message}", field=field) from e
    else:
        ids = list(prompt)
    if not ids:
        raise GenerationError(f"{name} is empty; it needs one token at least, such as BOS", field=field)
    for at, token in enumerate(ids):
        if not isinstance(token, int) or not 0 <= token < args.vocab_size:
            raise GenerationError(
                f"{name}: {token!r} at index {at} is no token of a vocabulary of {args.vocab_size}",
                field=field,
            )
    named = [*(params.logit_bias or ()), *(params.stop_token_ids or ())]
    if named and max(named) >= args.vocab_size:
        raise SamplingError(
            f"token {max(named)} in logit_bias or stop_token_ids: the vocabulary has {args.vocab_size}",
            field="logit_bias" if max(named) in (params.logit_bias or ()) else "stop_token_ids",
        )
    room = _room(args, name, field, len(ids), params, space)
    seed = draw_seed() if params.seed is None else params.seed
    completions = [Completion(ids, params, room, seed, k, tokenizer) for k in range(params.n)]
    return ReadPrompt(prompt if isinstance(prompt, str) else None, ids, params, completions)


def _room(args: ModelArgs, name: str, field: str, length: int, params: SamplingParams, space: int | None) -> int:
    """How many tokens may be generated. With a window the context has no end, so `max_tokens` alone rules."""
    context, left = args.max_seq_len, args.max_seq_len - length
    if params.max_tokens is None and left < 1:
        raise PromptTooLongError(
            f"{name} has {length} tokens and fills the context of {context}", field=field, hint="shorten it"
        )
    if params.max_tokens is None and space is not None:
        left = min(left, space - length)
        if left < 1:
            raise PromptTooLongError(
                f"{name} has {length} tokens and fills the memory for {space}",
                field=field,
                hint="shorten it, or raise kv_cache_bytes",
            )
    if params.max_tokens is not None and params.max_tokens > left and args.sliding_window is None:
        raise PromptTooLongError(
            f"{name} has {length} tokens, and max_tokens={params.max_tokens} more do not fit the context of "
            f"{context}",
            field=field,
            hint="shorten it, or lower max_tokens (None takes what is left)",
        )
    return left if params.max_tokens is None else params.max_tokens


@functools.lru_cache(maxsize=4)
def _tokenizer_at(source: pathlib.Path) -> Tokenizer:
    return Tokenizer.from_pretrained(source)


def tokenizer_beside(model: Mistral7B) -> tuple[Tokenizer | None, str]:
    """The tokenizer in the model's folder, or why there is none: ids as prompts can do without."""
    if model.source is None:
        return None, "this model was not opened from a folder that could hold one"
    try:
        return _tokenizer_at(model.source), ""
    except Mistral7BError as e:
        return None, str(e)
