"""Train a SentencePiece vocabulary in the format of Mistral's v3 tokenizer files.

BPE with byte fallback, one token per digit, whitespace preserved, and v3's control tokens at their ids
(3 `[INST]` ... 9 `[/TOOL_RESULTS]`), so that mistral-common opens the file.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import TrainingError
from ..files import atomic_write

CONTROL = (
    "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
)  # fmt: skip


def train_vocabulary(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train `vocab_size` tokens on `texts` and write the file (name it `tokenizer.model.v3`).

    Texts keep their newlines, so that a piece may contain one: source code has one in every 35 bytes. Raises
    TrainingError if the texts are too short for `vocab_size`, WriteError if the file cannot be written.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            character_coverage=0.9999,
            max_sentence_length=1 << 24,
            control_symbols=",".join(CONTROL),
            num_threads=os.cpu_count() or 1,
            minloglevel=1,
        )
    except RuntimeError as error:
        raise TrainingError(
            f"cannot learn {vocab_size} tokens from this text: {error}", field="vocab_size"
        ) from None
    with atomic_write(path) as temporary:
        temporary.write_bytes(model.getvalue())
