"""Small preference data for the tests, as token ids."""

from __future__ import annotations

import numpy as np

from mistral_7b.training.encoding import Encoded, Pair, Thumb

END = 2


def encoded(prompt: list[int], completion: list[int]) -> Encoded:
    """A prompt with a completion, whose tokens are trained."""
    ids = np.array([*prompt, *completion], dtype=np.int32)
    return Encoded(ids, np.arange(len(ids)) >= len(prompt))


def drawn(n: int, seed: int = 0) -> list[tuple[list[int], list[int], list[int]]]:
    """Prompts with two completions each, of different lengths, that end with END."""
    rng = np.random.default_rng(seed)

    def ids(least: int, most: int) -> list[int]:
        return rng.integers(4, 67, rng.integers(least, most)).tolist()

    return [([1, *ids(2, 6)], [*ids(1, 7), END], [*ids(1, 7), END]) for _ in range(n)]


def pairs(n: int, seed: int = 0) -> list[Pair]:
    return [Pair(encoded(p, chosen), encoded(p, rejected)) for p, chosen, rejected in drawn(n, seed)]


def thumbs(n: int, seed: int = 0) -> list[Thumb]:
    """Answers whose thumbs alternate, the first one up."""
    return [Thumb(encoded(p, answer), i % 2 == 0) for i, (p, answer, _) in enumerate(drawn(n, seed))]
