"""tokenizer.json for the vocabulary of a GGUF file, with the ids that llama.cpp gives. Imports no torch.

llama.cpp's `llama` tokenizer merges the adjacent pair whose joined piece has the highest score, the leftmost of
equals; a BPE model of the `tokenizers` package has a list of pairs by rank. Every way to cut a piece in two is
a pair, in the order of the scores of the joined pieces.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping
from typing import Any

from ...errors import TokenizerError
from .pre_tokenizers import PreTokenizer
from .vocabulary import BYTE, MERGES, NORMAL, SPACE, Vocabulary

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def splits(piece: str, pieces: Container[str]) -> Iterator[tuple[str, str]]:
    """Yield all cuts of a piece into two other pieces."""
    for at in range(1, len(piece)):
        if piece[:at] in pieces and piece[at:] in pieces:
            yield piece[:at], piece[at:]


def sentencepiece_json(vocabulary: Vocabulary, add_space_prefix: bool, add_bos: bool, add_eos: bool) -> bytes:
    """Return the tokenizer.json of a "llama" vocabulary.

    As in llama.cpp a space is put before the first word and, with `add_space_prefix`, after every special token.
    """
    ids = {t: i for i, (t, k) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)) if k == NORMAL}
    order = sorted(ids, key=lambda piece: -vocabulary.scores[ids[piece]])  # stable: ties by id
    merges = [pair for piece in order for pair in sorted(splits(piece, ids), key=lambda p: (ids[p[0]], ids[p[1]]))]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = [{"type": "Prepend", "prepend": SPACE}] if add_space_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if add_space_prefix else []
    decoders = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *strip,
    ]
    return _json(
        vocabulary,
        normalizer={"type": "Sequence", "normalizers": [*prepend, replace]},
        pre_tokenizer=None,
        post_processor=_template(vocabulary, add_bos, add_eos),
        decoder={"type": "Sequence", "decoders": decoders},
        model=_model(
            vocabulary, merges, unk_token=vocabulary.text_of("unknown"), fuse_unk=True,
            byte_fallback=BYTE in vocabulary.types,
        ),
    )  # fmt: skip


def byte_level_json(
    vocabulary: Vocabulary, metadata: Mapping[str, Any], pre: PreTokenizer, add_bos: bool, add_eos: bool
) -> bytes:
    """Return the tokenizer.json of a "gpt2" vocabulary; TokenizerError if its merges are invalid."""
    given = metadata.get(MERGES)
    if not isinstance(given, list) or not all(isinstance(merge, str) for merge in given):
        raise TokenizerError(f"{MERGES!r} is missing, or of the wrong type", field=MERGES, place=vocabulary.path)
    merges = [tuple(merge.split(" ")) for merge in given]
    pieces = set(vocabulary.tokens)
    for i, pair in enumerate(merges):
        if len(pair) != 2 or not pieces.issuperset((*pair, "".join(pair))):
            raise TokenizerError(
                f"merge {i} {given[i]!r:.40} does not join two tokens of the vocabulary into a third",
                field=f"{MERGES}[{i}]",
                place=vocabulary.path,
            )
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return _json(
        vocabulary,
        normalizer=None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": pre.components()},
        post_processor=_template(vocabulary, add_bos, add_eos),
        decoder=byte_level,
        model=_model(
            vocabulary, merges, unk_token=None, fuse_unk=False, byte_fallback=False,
            ignore_merges=pre.ignore_merges,
        ),
    )  # fmt: skip


def _model(
    vocabulary: Vocabulary, merges: list[Any], ignore_merges: bool = False, **fields: Any
) -> dict[str, Any]:
    vocab = {token: i for i, token in enumerate(vocabulary.tokens)}
    return {
        "type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, **fields,
        "ignore_merges": ignore_merges, "vocab": vocab, "merges": merges,
    }  # fmt: skip


def _json(vocabulary: Vocabulary, **parts: Any) -> bytes:
    added = [
        {"id": i, "content": vocabulary.tokens[i], **FLAGS, "special": special}
        for i, special in vocabulary.specials().items()
    ]
    data = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **parts}
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


def _template(vocabulary: Vocabulary, add_bos: bool, add_eos: bool) -> dict[str, Any] | None:
    """Return the post-processor that adds BOS and EOS; None if it adds neither."""
    bos = vocabulary.text_of("bos") if add_bos else None
    eos = vocabulary.text_of("eos") if add_eos else None
    if bos is None and eos is None:
        return None

    def row(*sequences: str) -> list[dict[str, Any]]:
        out: list[dict[str, Any]] = []
        for number, name in enumerate(sequences):
            out += [{"SpecialToken": {"id": bos, "type_id": number}}] if bos else []
            out += [{"Sequence": {"id": name, "type_id": number}}]
            out += [{"SpecialToken": {"id": eos, "type_id": number}}] if eos else []
        return out

    tokens = {t: {"id": t, "ids": [vocabulary.tokens.index(t)], "tokens": [t]} for t in (bos, eos) if t}
    return {"type": "TemplateProcessing", "single": row("A"), "pair": row("A", "B"), "special_tokens": tokens}
