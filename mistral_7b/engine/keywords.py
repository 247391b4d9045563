"""Keyword arguments of LLM and its methods: fields of SamplingParams and RequestOptions by name, and vLLM's names.

Where a name of vLLM means something that has another name here, the error says which.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

from ..errors import EngineError
from ..sampling.params import SamplingParams
from .inputs import RequestOptions

SAMPLING = frozenset(f.name for f in dataclasses.fields(SamplingParams))
OPTIONS = frozenset(f.name for f in dataclasses.fields(RequestOptions))

CALL_NAMES = {  # vLLM's argument of generate or chat -> ours
    "sampling_params": "params",
    "prompt_token_ids": "prompts, which may be lists of token ids",
    "use_tqdm": "progress",
    "lora_request": "adapter, the name of one of LLM's `adapters`",
    "messages": "conversations",
    "max_new_tokens": "max_tokens",
    "do_sample": "temperature, where 0 means no sampling",
    "stop_sequences": "stop",
}
LLM_NAMES = {  # vLLM's argument of LLM -> ours
    "max_model_len": "SamplingParams(max_tokens=...) for lengths, EngineConfig(kv_cache_bytes=...) for memory",
    "gpu_memory_utilization": "EngineConfig(kv_cache_bytes=...)",
    "kv_cache_memory_bytes": "EngineConfig(kv_cache_bytes=...)",
    "kv_cache_dtype": "EngineConfig(kv_dtype=...)",
    "max_num_seqs": "EngineConfig(max_sequences=...)",
    "max_num_batched_tokens": "EngineConfig(max_batch_tokens=...)",
    "block_size": "EngineConfig(page_size=...)",
    "enable_prefix_caching": "EngineConfig(prefix_caching=...)",
    "speculative_config": "EngineConfig(speculation=...)",
    "tensor_parallel_size": "tensor_parallel",
    "enable_lora": "adapters",
    "lora_modules": "adapters",
    "seed": "SamplingParams(seed=...)",
}


class ArgumentError(EngineError, TypeError):
    """An argument that a function does not have."""


def unknown_argument(name: str, what: str, known: Iterable[str], names: Mapping[str, str]) -> ArgumentError:
    """The error for an argument that `what` does not have; it names the right one where there is one."""
    close = difflib.get_close_matches(name, sorted(known), n=1)
    right = names.get(name) or (close[0] if close else None)
    return ArgumentError(
        f"{what} has no argument {name!r}", field=name, hint=f"use {right}" if right else f"see help({what})"
    )


Params = SamplingParams | Sequence[SamplingParams]


@overload
def read_fields(
    what: str, params: SamplingParams | None, fields: Mapping[str, Any], default: SamplingParams
) -> tuple[SamplingParams, dict[str, Any]]: ...


@overload
def read_fields(
    what: str, params: Params | None, fields: Mapping[str, Any], default: SamplingParams
) -> tuple[Params, dict[str, Any]]: ...


def read_fields(
    what: str, params: Params | None, fields: Mapping[str, Any], default: SamplingParams
) -> tuple[Params, dict[str, Any]]:
    """The sampling parameters of a call, and those of its `fields` that belong to RequestOptions.

    Fields of SamplingParams by name change `default`; so does their absence, with params None. EngineError for
    an unknown name, and for `params` together with such fields.
    """
    sampling = {name: value for name, value in fields.items() if name in SAMPLING}
    options = {name: value for name, value in fields.items() if name in OPTIONS}
    for name in fields:
        if name not in sampling and name not in options:
            raise unknown_argument(name, what, SAMPLING | OPTIONS, CALL_NAMES)
    if params is None:
        return dataclasses.replace(default, **sampling), options
    if sampling:
        raise EngineError(
            f"pass `params`, or its fields by name, not both: {', '.join(sampling)}", field=next(iter(sampling))
        )
    return params, options
