"""What the package raises on purpose: one root, so that `except Mistral7BError` catches it all.

A message is for people: no code reads it. What code needs stands beside it: the error's class, and the attributes
of the root. They survive pickling, so that an error crosses processes whole.
"""

from __future__ import annotations

import copyreg
import os
from typing import Any, Self


class Mistral7BError(Exception):
    """Root of every error this package raises on purpose. `str()` gives "place: message; hint".

    Attributes:
        message: what is wrong, in one sentence
        field: the parameter, request field, key or tensor at fault: `temperature`, `messages[2].content`
        place: where that is: a file, and the line in it where one is to blame
        hint: what to do
    """

    def __init__(
        self,
        message: str = "",
        *,
        field: str | None = None,
        place: str | os.PathLike[str] | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.field, self.hint = message, field, hint
        self.place = None if place is None else os.fspath(place)

    @classmethod
    def of(cls, error: Mistral7BError, **changed: Any) -> Self:
        """An error of this class with what another says, but for the arguments that are `changed`."""
        return cls(**{**error.data, **changed})

    @property
    def data(self) -> dict[str, str | None]:
        """All that it says, by name: what makes an equal error of it in another process."""
        return {"message": self.message, "field": self.field, "place": self.place, "hint": self.hint}

    def __str__(self) -> str:
        text = f"{self.place}: {self.message}" if self.place else self.message
        return f"{text}; {self.hint}" if self.hint else text

    def __reduce__(self) -> tuple[Any, ...]:
        """Past `__init__`, whose arguments differ between the classes."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class ConfigError(Mistral7BError):
    """A model configuration that cannot be, or whose fields contradict each other."""


class CacheError(Mistral7BError):
    """A cache asked for what it cannot hold: too long a context, or a rollback past its window."""


class CheckpointError(Mistral7BError):
    """A file of weights that is damaged, incomplete, unknown or unsafe."""


class QuantizationError(Mistral7BError):
    """A scheme that there is none of, or weights that it cannot hold."""


class AdapterError(Mistral7BError):
    """A LoRA adapter that is not loaded, is loaded already, or does not fit the model."""


class WriteError(Mistral7BError):
    """A file that the system does not take: the disk is full or read-only, or this user may not write there."""


class HubError(Mistral7BError):
    """A download that could not be made: offline, gated, missing, or cut off."""


class TokenizerError(Mistral7BError):
    """A tokenizer file or a conversation that cannot be encoded."""


class SamplingError(Mistral7BError):
    """A sampling parameter out of its range."""


class GrammarError(SamplingError):
    """A schema, regex or grammar that cannot be used, or that asks for more than its limits."""


class GenerationError(Mistral7BError):
    """A prompt that cannot be continued: empty, or longer than the context."""


class PromptTooLongError(GenerationError):
    """A prompt that, with what is to follow it, exceeds the context.

    Attributes, in tokens, None where unknown:
        limit: the size of the context, or of the memory if that is smaller
        prompt: the length of the prompt
        completion: `max_tokens`; None also for no limit
    """

    limit: int | None = None
    prompt: int | None = None
    completion: int | None = None

    def counted(self, limit: int, prompt: int, completion: int | None = None) -> Self:
        """This error with its counts."""
        self.limit, self.prompt, self.completion = limit, prompt, completion
        return self


class TrainingError(Mistral7BError):
    """Training data or a training state that cannot be used."""


class EvaluationError(Mistral7BError):
    """A text on which nothing can be measured."""


class InterpretError(Mistral7BError):
    """An activation that there is none of, or that cannot be recorded or replaced like that."""


class BenchmarkError(Mistral7BError):
    """A measurement that cannot be made here: no memory for it, no such engine, or a process that failed."""


class EngineError(Mistral7BError):
    """A request that the engine cannot serve: it can never fit, or its step failed (`__cause__` says why)."""


class ProcessError(EngineError):
    """A process that was to follow a grammar could not be started: the system has no more to give."""


class AbandonedError(EngineError):
    """A request whose client disconnected while it was being read."""


class QueueFullError(EngineError):
    """As many requests wait as the engine queues, so that this one is refused."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, for people: its first line, or its class where it says nothing."""
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__
