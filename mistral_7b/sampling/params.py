"""Sampling parameters. Imports no torch: the command line and HTTP protocol import it.

Names, defaults and ranges are vLLM's; sampler.py implements them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Any

from ..errors import SamplingError

GREEDY_BELOW = 1e-5  # lower temperatures count as 0, as in vLLM


@dataclass(frozen=True)
class StructuredOutputs:
    """A constraint on the generated text; exactly one field is given. The names are vLLM's.

    Attributes:
        json: a JSON schema, as a dictionary or as JSON text
        json_object: any JSON object
        regex: a regular expression (syntax of Rust's regex crate) that the whole text matches
        choice: the text is one of these
        grammar: a context-free grammar, in llguidance's variant of Lark or in llama.cpp's GBNF
    """

    json: str | Mapping[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if getattr(self, f.name) not in (None, False)]
        if len(given) != 1:
            names = ", ".join(f.name for f in fields(self))
            raise SamplingError(
                f"structured_outputs takes exactly one of {names}, not {' and '.join(given) or 'none of them'}",
                field="structured_outputs",
            )
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and not _is_text(value):
                self._refuse(name, "a text that can be written as UTF-8")
        if not isinstance(self.json_object, bool):
            self._refuse("json_object", "true or false")
        if self.choice is not None:
            texts = self.choice
            if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
                self._refuse("choice", "a list of at least one text")
            if not all(_is_text(text) for text in texts):
                self._refuse("choice", "a list of texts that can be written as UTF-8")
            object.__setattr__(self, "choice", tuple(texts))
        if self.json is not None:
            self._read_schema()

    def _read_schema(self) -> None:
        """Parse a schema given as text."""
        schema: Any = self.json
        try:
            text = schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
            schema = json.loads(text, parse_float=as_written, parse_constant=as_written)
        except (ValueError, TypeError, RecursionError) as e:
            raise SamplingError(f"structured_outputs.json is no JSON: {e}", field="structured_outputs.json") from e
        if not isinstance(schema, dict):
            self._refuse("json", "a JSON schema, which is an object")
        object.__setattr__(self, "json", schema)

    def _refuse(self, name: str, wanted: str) -> None:
        field = f"structured_outputs.{name}"
        raise SamplingError(f"{field} must be {wanted}, not {getattr(self, name)!r:.80}", field=field)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StructuredOutputs:
        """Build from a dictionary by field name; SamplingError for an unknown name."""
        unknown = sorted(map(str, set(values) - {f.name for f in fields(cls)}))
        if unknown:
            raise SamplingError(
                f"structured_outputs has no {', '.join(unknown)}", field=f"structured_outputs.{unknown[0]:.100}"
            )
        return cls(**values)


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of a completion. SamplingError names a field whose value is out of range.

    Attributes:
        n: completions per prompt
        temperature: >= 0; 0 always takes the most probable token
        top_k: keep the k most probable tokens; 0 or -1 keeps all
        top_p: in (0, 1]: keep the fewest most probable tokens whose probabilities sum to p
        min_p: in [0, 1]: keep tokens at least min_p times as probable as the most probable
        repetition_penalty: > 0: divides positive and multiplies negative logits of tokens in prompt or output
        presence_penalty: in [-2, 2]: subtracted from logits of tokens in the output
        frequency_penalty: in [-2, 2]: subtracted once per occurrence in the output
        logit_bias: {token id: number in [-100, 100]} added to logits
        stop: stop string or strings; the completion's text ends before it
        stop_token_ids: tokens that end the completion
        ignore_eos: continue after the end-of-sequence token
        max_tokens: token limit of the completion; None: as many as the context holds
        min_tokens: minimum number of tokens; EOS and stop strings are ignored before it
        seed: integer seed for reproducible sampling; None draws one from torch's generator
        logprobs: return log-probabilities of the token and its top-k alternatives; -1: of all
        prompt_logprobs: the same for the prompt's tokens
        structured_outputs: constraint on the text (a StructuredOutputs, or a dictionary of its fields);
            supported by the engine only, `generate` refuses it
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        self._number("temperature", low=0.0)
        self._number("top_p", low=0.0, high=1.0, open_low=True)
        self._number("min_p", low=0.0, high=1.0)
        self._number("repetition_penalty", low=0.0, open_low=True)
        self._number("presence_penalty", low=-2.0, high=2.0)
        self._number("frequency_penalty", low=-2.0, high=2.0)
        self._whole("n", 1)
        self._whole("top_k", -1)
        self._whole("min_tokens", 0)
        for name, low in (("max_tokens", 1), ("logprobs", -1), ("prompt_logprobs", -1), ("seed", None)):
            if getattr(self, name) is not None:
                self._whole(name, low)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})",
                field="min_tokens",
            )
        if not isinstance(self.ignore_eos, bool):
            self._refuse("ignore_eos", "true or false")
        self._check_lists()
        if isinstance(self.structured_outputs, Mapping):
            object.__setattr__(self, "structured_outputs", StructuredOutputs.from_dict(self.structured_outputs))
        if not isinstance(self.structured_outputs, StructuredOutputs | None):
            self._refuse("structured_outputs", "a StructuredOutputs or a dictionary of its fields")

    def _check_lists(self) -> None:
        if isinstance(self.stop, (bytes, Mapping)) or not all(isinstance(s, str) and s for s in self.stops):
            self._refuse("stop", "a text or a list of texts, none of them empty")
        ids = self.stop_token_ids
        if ids is not None and (isinstance(ids, str) or not all(_is_whole(i) and i >= 0 for i in ids)):
            self._refuse("stop_token_ids", "a list of token ids")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                self._refuse("logit_bias", "a dictionary from token ids to numbers")
            try:  # over HTTP the keys are strings
                bias = {int(token): float(number) for token, number in self.logit_bias.items()}
            except (TypeError, ValueError):
                self._refuse("logit_bias", "a dictionary from token ids to numbers")
            if not all(token >= 0 and -100 <= number <= 100 for token, number in bias.items()):
                self._refuse("logit_bias", "of token ids >= 0 and numbers in [-100, 100]")
            object.__setattr__(self, "logit_bias", bias)

    def _number(self, name: str, low: float, high: float = math.inf, open_low: bool = False) -> None:
        value = getattr(self, name)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not good or value > high or value < low or (open_low and value == low):
            wanted = f"a number in {'(' if open_low else '['}{low:g}, {high:g}]"
            self._refuse(name, wanted if high < math.inf else f"a number {'>' if open_low else '>='} {low:g}")

    def _whole(self, name: str, low: int | None) -> None:
        value = getattr(self, name)
        if not _is_whole(value) or (low is not None and value < low):
            self._refuse(name, "a whole number" + (f" of at least {low}" if low is not None else ""))

    def _refuse(self, name: str, wanted: str) -> None:
        raise SamplingError(f"{name} must be {wanted}, not {getattr(self, name)!r}", field=name)

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def greedy(self) -> bool:
        """Whether decoding is greedy: the most probable token is always taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def penalizes(self) -> bool:
        """Whether logits depend on previous tokens, so that a History is needed."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Build from a dictionary by field name; SamplingError for an unknown name."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise SamplingError(f"unknown sampling parameter {', '.join(unknown)}", field=unknown[0])
        return cls(**values)


def as_written(number: str) -> float:
    """Parse a number; ValueError if a float cannot represent its decimal digits exactly."""
    value = float(number)
    if not math.isfinite(value) or Decimal(repr(value)) != Decimal(number):
        raise ValueError(f"{number} is no number that a float holds exactly as it is written")
    return value


def _is_text(value: Any) -> bool:
    """Return whether a value is a string without lone surrogates."""
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
