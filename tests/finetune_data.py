"""A tiny base model with its tokenizer, and examples, for the tests of fine-tuning."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tiny import tiny_args, tiny_model

from mistral_7b import Mistral7B, Tokenizer
from mistral_7b.training.vocabulary import train_vocabulary

VOCABULARY = 310


class Example(NamedTuple):
    """As training.encoding.Encoded."""

    ids: np.ndarray
    trained: np.ndarray


def examples(count: int = 24, seed: int = 5) -> list[Example]:
    """Prompts, which are not trained, and answers that continue them in steps of 3."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        prompt, answer = int(rng.integers(2, 9)), int(rng.integers(3, 12))
        ids = 10 + (rng.integers(60) + 3 * np.arange(prompt + answer)) % 60
        ids[0] = 1
        out.append(Example(ids.astype(np.int32), np.arange(prompt + answer) >= prompt))
    return out


@functools.cache
def tokenizer() -> Tokenizer:
    """A vocabulary of 310 tokens with Mistral's v3 chat template."""
    text = "".join(f"def f{j}(x):\n    return x * {j % 7}\n\nWhat is {j}? It is {j}.\n" for j in range(60))
    path = Path(tempfile.mkdtemp(prefix="mistral-7b-tests-")) / "tokenizer.model.v3"
    train_vocabulary([text], VOCABULARY, path)
    return Tokenizer.from_pretrained(path)


def base_model(trained: bool = False) -> Mistral7B:
    """A float32 model for this vocabulary."""
    args = tiny_args(vocab_size=VOCABULARY, max_seq_len=1024)
    return tiny_model(args).requires_grad_(trained)


def write_base(folder: Path) -> Path:
    """Write the base model with its tokenizer to a new folder."""
    model = base_model()
    model.source = tokenizer().path.parent
    model.save_pretrained(folder)
    return folder


def write_chats(path: Path, count: int = 20) -> Path:
    """Write chats of one question and one answer."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i}?"},
                {"role": "assistant", "content": f"It is {i}."},
            ]
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
