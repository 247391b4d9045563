"""The choice of a vocabulary for a folder of tokenizer files.

tokenizer.model alone, or both of a release of Mistral    SentencePiece, by mistral-common
tokenizer.json                                            the `tokenizers` package, as transformers prefers it
tokenizer.model with added tokens                         SentencePiece between the added tokens
"""

from __future__ import annotations

import pathlib
from functools import cache

from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from ...checkpoint.chat_templates import chat_templates
from ...checkpoint.hub import sentencepiece_file
from ...checkpoint.json_files import read_object
from ...errors import TokenizerError
from .contract import Vocabulary
from .fast import FastVocabulary
from .files import TokenizerSettings
from .sentencepiece import SentencePieceVocabulary

FAST = "tokenizer.json"


def open_folder(folder: pathlib.Path) -> Vocabulary:
    """Open the vocabulary of a folder. TokenizerError if it has none, or a damaged one."""
    files, pieces, fast = TokenizerSettings(folder), sentencepiece_file(folder), folder / FAST
    if pieces is None and not fast.is_file():
        raise TokenizerError(
            "contains no tokenizer.json, tokenizer.model or tokenizer.model.v3"
            + (" (tekken.json is of later models)" if (folder / "tekken.json").is_file() else ""),
            place=folder,
            hint="fetch the tokenizer files from the model's repository on the hub, or choose another with "
            "--tokenizer",
        )
    if pieces is None or (fast.is_file() and not is_mistrals_own(pieces, fast, files)):
        return FastVocabulary(fast, files, files.stop_ids)
    return SentencePieceVocabulary(
        pieces, files.added, files.stop_ids, legacy=files.config.get("legacy") is not False,
        adds_bos=files.config.get("add_bos_token") is not False, named=files.named,
    )  # fmt: skip


def is_mistrals_own(pieces: pathlib.Path, fast: pathlib.Path, files: TokenizerSettings) -> bool:
    """Return whether a folder with both files is a release of Mistral, whose ids are those of mistral-common.

    The SentencePiece file has the pieces of one of Mistral's, tokenizer.json the same tokens and no others, and
    the chat template, if there is one, writes [INST].
    """
    known = SentencePieceVocabulary(pieces)
    if release_of(tuple(known.names)) is None:
        return False
    content = read_object(fast)
    try:
        tokens = {**content["model"]["vocab"], **{t["content"]: t["id"] for t in content["added_tokens"]}}
    except (KeyError, TypeError):
        return False  # opening it tells what is wrong
    same = tokens == {name: i for i, name in enumerate(known.names)}
    templates = chat_templates(files.folder).values()
    writes = not templates or any("[INST]" in template.text for template in templates)
    return same and all(t.id < known.size for t in files.added) and writes


@cache
def release_of(pieces: tuple[str, ...]) -> str | None:
    """Return the version of the vocabulary of Mistral 7B that has these pieces; None for another's."""
    for version in ("v1", "v2", "v3"):
        tokenizer = getattr(MistralTokenizer, version)().instruct_tokenizer.tokenizer
        if pieces == tuple(tokenizer.vocab()):
            return version
    return None
