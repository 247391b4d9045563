"""How an engine is set up. Imports no torch, so that the command line can show it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from .speculation import Speculation


@dataclass(frozen=True)
class GrammarLimits:
    """What a grammar (a schema, regex, choice or Lark text) may use of the machine; past it its request ends.

    CPU seconds, so that a busy machine ends no request. An ordinary schema compiles in 10 ms, and a token takes
    0.1 ms. What all grammars together may use is fixed (grammar/turns.py, grammar/client.py). A value out of its
    range raises ConfigError naming the field.

    Attributes:
        compile_seconds: to read and compile it
        mask_seconds: for one token
        request_seconds: for all tokens of a request, over all its completions
        memory_bytes: address space of the process that follows it, the interpreter's 0.3 GB included
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
    """What an engine may use. A value out of its range raises ConfigError naming the field.

    Attributes:
        max_sequences: completions computed together; more wait
        max_batch_tokens: tokens of one step, those of prompts and of completions together. More make prompts
            cheaper, and completions that run beside them slower.
        max_waiting: requests that may wait; one more is refused with QueueFullError. None: any number
        page_size: tokens to a page of keys and values; prefixes are shared in whole pages
        kv_cache_bytes: memory for pages; None takes half of what is free once the model is there (nine tenths
            on an accelerator), but never more than `max_sequences` contexts need
        kv_dtype: "int8" keeps keys and values in about half of bfloat16's bytes, rounded
        prefix_caching: begin a prompt where an earlier one that began alike has left off
        prefix_cache: a folder in which pages of prompts outlive the engine; processes may share it
        prefix_cache_bytes: the most that all files in this folder may take
        deterministic: make a request's tokens the same to the bit whatever runs beside it. A model quantized
            to int8 or int4 on a CPU is so by itself and pays nothing.
        speculation: guess tokens ahead, for requests that do not say otherwise
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
        if self.max_batch_tokens < self.max_sequences + self.page_size:
            raise ConfigError(
                f"max_batch_tokens ({self.max_batch_tokens}) must leave room for a page of a prompt beside every "
                f"sequence: at least max_sequences + page_size = {self.max_sequences + self.page_size}",
                field="max_batch_tokens",
            )
        if self.prefix_cache is not None and not self.prefix_caching:
            raise ConfigError("prefix_cache needs prefix_caching", field="prefix_cache")
        if self.kv_dtype not in (None, "int8"):
            raise ConfigError(
                f'kv_dtype is "int8", or None for the model\'s own type, not {self.kv_dtype!r}', field="kv_dtype"
            )
