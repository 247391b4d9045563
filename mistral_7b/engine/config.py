"""Configuration of an engine. Imports no torch, so that the command line can show it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from .speculation import Speculation


@dataclass(frozen=True)
class GrammarLimits:
    """Limits of a request's grammar (JSON schema, regex, choice or Lark), at which the request ends.

    Times are CPU seconds, so that a busy machine ends no request. An ordinary schema compiles in 10 ms, a token's
    mask takes 0.1 ms. Limits on all grammars together are fixed (grammar/compile_queue.py, grammar/client.py).
    ConfigError names a field whose value is out of range.

    Attributes:
        compile_seconds: to parse and compile the grammar
        mask_seconds: to compute the mask of one token
        request_seconds: for all tokens of a request, over all its completions
        memory_bytes: address space of the worker process, with the interpreter's 0.3 GB
    """

    compile_seconds: float = 5.0
    mask_seconds: float = 0.25
    request_seconds: float = 5.0
    memory_bytes: int = 2 << 30

    def __post_init__(self) -> None:
        for name in ("compile_seconds", "mask_seconds", "request_seconds"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 86_400:
                raise ConfigError(f"{name} must be a number of seconds above 0, not {value!r}", field=name)
        if not isinstance(self.memory_bytes, int) or self.memory_bytes < 1 << 29:
            raise ConfigError(
                f"memory_bytes must be a whole number of at least {1 << 29}, not {self.memory_bytes!r}",
                field="memory_bytes",
            )


@dataclass(frozen=True)
class EngineConfig:
    """Memory, batch size, queue and features of an engine. ConfigError names a field whose value is out of range.

    Attributes:
        max_sequences: completions computed together; more wait
        max_batch_tokens: tokens of one step, those of prompts and completions together. More tokens make prefill
            cheaper, and slow down the completions that decode in the same step.
        max_waiting: waiting requests beyond which QueueFullError refuses new ones, or the last one of the client
            that has most of them; None for no limit
        page_size: tokens of a KV page; prefixes are shared in whole pages
        kv_cache_bytes: memory of the KV pages. None takes half of the memory that is free after loading the model
            (nine tenths on an accelerator), and at most what `max_sequences` full contexts use.
        kv_dtype: "int8" quantizes keys and values, to about half of bfloat16's bytes
        prefix_caching: reuse the keys and values of an earlier prompt with the same prefix
        prefix_cache: folder in which KV pages of prompts are kept beyond the engine's life; processes may share it
        prefix_cache_bytes: maximum size of all files in this folder
        deterministic: make a request's tokens bit-identical whatever runs beside it. A bfloat16 model with
            int8 or int4 weights is so on a CPU without this option and without cost; weights in bfloat16 or
            float32 are so with it. float16 and float64 are refused.
        speculation: settings of speculative decoding for requests without their own
        grammar_limits: CPU time and memory that a request's grammar may use
    """

    max_sequences: int = 64
    max_batch_tokens: int = 256
    max_waiting: int | None = None
    page_size: int = 16
    kv_cache_bytes: int | None = None
    kv_dtype: str | None = None
    prefix_caching: bool = True
    prefix_cache: str | os.PathLike[str] | None = None
    prefix_cache_bytes: int = 20 * 10**9
    deterministic: bool = False
    speculation: Speculation | None = None
    grammar_limits: GrammarLimits = GrammarLimits()

    def __post_init__(self) -> None:
        lows = {
            "max_sequences": 1, "max_batch_tokens": 1, "page_size": 1, "max_waiting": 1, "kv_cache_bytes": 1,
            "prefix_cache_bytes": 1,
        }  # fmt: skip
        for name, low in lows.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < low):
                raise ConfigError(f"{name} must be a whole number of at least {low}, not {value!r}", field=name)
        if self.max_batch_tokens < self.max_sequences - 1 + self.page_size:
            raise ConfigError(
                f"max_batch_tokens ({self.max_batch_tokens}) must hold a page of a prompt and a token of other "
                f"sequence: at least max_sequences - 1 + page_size = {self.max_sequences - 1 + self.page_size}",
                field="max_batch_tokens",
            )
        if self.prefix_cache is not None and not self.prefix_caching:
            raise ConfigError("prefix_cache needs prefix_caching", field="prefix_cache")
        if self.kv_dtype not in (None, "int8"):
            raise ConfigError(
                f'kv_dtype must be "int8", or None for the model\'s own type, not {self.kv_dtype!r}',
                field="kv_dtype",
            )
