"""Tiny encoded examples for the tests of fine-tuning."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Example(NamedTuple):
    """As training.encoding.Encoded."""

    ids: np.ndarray
    trained: np.ndarray


def examples(count: int = 24, vocab: int = 67, seed: int = 5) -> list[Example]:
    """Prompts, which are not trained, and answers that continue them in steps of 3."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        prompt, answer = int(rng.integers(2, 9)), int(rng.integers(3, 12))
        ids = (rng.integers(3, vocab) + 3 * np.arange(prompt + answer)) % (vocab - 3) + 3
        ids[0] = 1
        out.append(Example(ids.astype(np.int32), np.arange(prompt + answer) >= prompt))
    return out
