"""Prompts: texts or token ids, tokenized and checked, with their completions and token limits."""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..checkpoint.generation_settings import generation_settings
from ..errors import GenerationError, Mistral7BError, PromptTooLongError, SamplingError, TokenizerError
from ..model import Mistral7B, ModelArgs
from ..sampling.defaults import sampling_defaults
from ..sampling.params import SamplingParams
from ..sampling.sampler import draw_seed
from ..text.tokenizer import Tokenizer
from ..text.vocabularies.files import stop_ids_of
from .completion import EOS, Completion

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class TokenizedPrompt:
    """A checked prompt, and its n completions without tokens. `prompt` is the text, None if given as ids."""

    prompt: str | None
    ids: list[int]
    params: SamplingParams
    completions: list[Completion]


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, from one prompt (a text or token ids) or several."""
    if isinstance(prompts, Tensor):
        prompts = prompts.tolist()
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def params_for(
    prompts: Sequence[object], params: SamplingParams | Sequence[SamplingParams]
) -> list[SamplingParams]:
    """The parameters of each prompt. GenerationError if a list of them has another length."""
    each = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
    if len(each) != len(prompts):
        raise GenerationError(
            f"{len(prompts)} prompts with {len(each)} SamplingParams",
            field="params",
            hint="pass one, or one for each prompt",
        )
    return each


def tokenize_prompt(
    args: ModelArgs, name: str, prompt: Prompt, params: SamplingParams, tokenizer: Tokenizer | None,
    tokenizer_error: str = "", kv_capacity: int | None = None, field: str = "prompt",
    ends: frozenset[int] | None = None,
) -> TokenizedPrompt:  # fmt: skip
    """Tokenize and check one prompt. GenerationError, PromptTooLongError, SamplingError or TokenizerError.

    name, field      how errors call the prompt, and the request field that held it
    tokenizer_error  why there is no tokenizer, if it is None
    kv_capacity      tokens that the KV pages hold, if fewer than a context; None if they hold a context
    ends             ids with which the model ends a text (`ends_of`); None: those of the tokenizer
    """
    if tokenizer is None and (isinstance(prompt, str) or params.stops):
        raise GenerationError(
            f"{name}: text prompts and stop strings need a tokenizer, and {tokenizer_error}",
            field=field if isinstance(prompt, str) else "stop",
            hint="pass tokenizer=...",
        )
    if isinstance(prompt, str):
        assert tokenizer is not None  # checked above
        try:
            ids = tokenizer.encode(prompt)
        except TokenizerError as e:
            raise TokenizerError.of(e, message=f"{name}: {e.message}", field=field) from e
    else:
        ids = list(prompt)
    if not ids:
        raise GenerationError(f"{name} is empty; it needs at least one token, such as BOS", field=field)
    check_ids(args, name, ids, field)
    named = [*(params.logit_bias or ()), *(params.stop_token_ids or ())]
    if named and max(named) >= args.vocab_size:
        raise SamplingError(
            f"token {max(named)} in logit_bias or stop_token_ids: the vocabulary has {args.vocab_size} tokens",
            field="logit_bias" if max(named) in (params.logit_bias or ()) else "stop_token_ids",
        )
    max_tokens = _max_tokens(args, name, field, len(ids), params, kv_capacity)
    seed = draw_seed() if params.seed is None else params.seed
    completions = [Completion(ids, params, max_tokens, seed, k, tokenizer, ends=ends) for k in range(params.n)]
    return TokenizedPrompt(prompt if isinstance(prompt, str) else None, ids, params, completions)


def check_ids(args: ModelArgs, name: str, ids: Sequence[int], field: str) -> None:
    """Raise GenerationError for what is not a token id of the model."""
    for i, token in enumerate(ids):
        if not isinstance(token, int) or not 0 <= token < args.vocab_size:
            raise GenerationError(
                f"{name}: {token!r} at index {i} is not a token id below {args.vocab_size}",
                field=field,
            )


def _max_tokens(
    args: ModelArgs, name: str, field: str, length: int, params: SamplingParams, kv_capacity: int | None
) -> int:
    """The token limit of a completion of a prompt of `length` tokens. PromptTooLongError if none is left.

    A model with a window has no longest context, so `max_tokens` alone limits its completions.
    """
    context, left = args.max_seq_len, args.max_seq_len - length
    if params.max_tokens is None and left < 1:
        raise PromptTooLongError(
            f"{name} has {length} tokens and fills the context of {context}", field=field, hint="shorten it"
        ).counted(context, length)
    if params.max_tokens is None and kv_capacity is not None:
        left = min(left, kv_capacity - length)
        if left < 1:
            raise PromptTooLongError(
                f"{name} has {length} tokens and fills the KV pages, which hold {kv_capacity}",
                field=field,
                hint="shorten it, or raise kv_cache_bytes",
            ).counted(kv_capacity, length)
    if params.max_tokens is not None and params.max_tokens > left and args.sliding_window is None:
        raise PromptTooLongError(
            f"{name} has {length} tokens, and max_tokens={params.max_tokens} more do not fit the context of "
            f"{context}",
            field=field,
            hint="shorten it, or lower max_tokens (None takes what is left)",
        ).counted(context, length, params.max_tokens)
    return left if params.max_tokens is None else params.max_tokens


@functools.lru_cache(maxsize=4)
def _tokenizer_at(source: pathlib.Path) -> Tokenizer:
    return Tokenizer.from_pretrained(source)


_stop_ids_at = functools.lru_cache(maxsize=4)(stop_ids_of)


def ends_of(model: Mistral7B, tokenizer: Tokenizer | None) -> frozenset[int]:
    """The ids with which a model ends a text: those that its files and its tokenizer name, or else EOS."""
    named = tokenizer.stop_ids if tokenizer is not None else frozenset[int]()
    if model.source is not None:
        with contextlib.suppress(Mistral7BError):  # files that cannot be read name none
            named |= _stop_ids_at(model.source)
    return frozenset(i for i in named or (EOS,) if i < model.args.vocab_size)


def defaults_of(model: Mistral7B) -> dict[str, Any]:
    """The fields of SamplingParams that the model's own files set."""
    return sampling_defaults(*generation_settings(model.source))


def load_tokenizer(model: Mistral7B) -> tuple[Tokenizer | None, str]:
    """The tokenizer in the model's folder; or None, and the reason. Prompts of token ids need no tokenizer."""
    if model.source is None:
        return None, "this model was not opened from a folder"
    try:
        return _tokenizer_at(model.source), ""
    except Mistral7BError as e:
        return None, str(e)
