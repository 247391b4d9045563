"""What the package raises on purpose: one root, so that `except Mistral7BError` catches it all.

A message says what was wrong, where (file, tensor, field) and what to do.
"""


class Mistral7BError(Exception):
    """Root of every error this package raises on purpose."""


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
    """A prompt that, with what is to follow it, exceeds the context."""


class TrainingError(Mistral7BError):
    """Training data or a training state that cannot be used."""


class EvaluationError(Mistral7BError):
    """A text on which nothing can be measured."""


class BenchmarkError(Mistral7BError):
    """A measurement that cannot be made here: no memory for it, no such engine, or a process that failed."""


class EngineError(Mistral7BError):
    """A request that the engine cannot serve: it can never fit, or its step failed (`__cause__` says why)."""


class ProcessError(EngineError):
    """A process that was to follow a grammar could not be started: the system has no more to give."""


class AbandonedError(EngineError):
    """A request that nobody waits for any more, given up while it was read."""


class QueueFullError(EngineError):
    """So many requests are waiting already that this one was refused: try again later."""
