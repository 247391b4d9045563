"""SentencePiece model files: written from the pieces in GGUF metadata, and read into them. Imports no torch."""

from __future__ import annotations

import pathlib
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from ...errors import TokenizerError
from .vocabulary import BYTE, NORMAL, SPACE, USER_DEFINED, Vocabulary

UNIGRAM, BPE = 1, 2  # ModelType in SentencePiece's TrainerSpec
NORMALIZATION_PROBE = " \ufb01  \uff21"  # a ligature, two spaces, a wide letter: normalization would change them


def serialize(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> bytes:
    """Return a serialized SentencePiece ModelProto of a "llama" vocabulary; `metadata` holds its flags."""
    types, ids = vocabulary.types, vocabulary.ids
    tokens = [
        t.replace(" ", SPACE) if k == USER_DEFINED else t for t, k in zip(vocabulary.tokens, types, strict=True)
    ]
    if len(set(tokens)) < len(tokens):
        raise TokenizerError(
            "two tokens differ only in the symbol of a space", field="tokenizer.ggml.tokens", place=vocabulary.path
        )
    flags = {
        name: metadata.get(f"tokenizer.ggml.{name}", default)
        for name, default in (("add_space_prefix", True), ("remove_extra_whitespaces", False))
    }
    pieces = (
        _message(1, _message(1, t.encode()) + _tag(2, 5) + struct.pack("<f", s) + _number(3, k))
        for t, s, k in zip(tokens, vocabulary.scores, types, strict=True)
    )
    names = [(field, name) for field, name in ((45, "unknown"), (46, "bos"), (47, "eos")) if name in ids]
    trainer = (
        _number(3, BPE)
        + _number(4, len(tokens))
        + _number(35, BYTE in types)
        + b"".join(_number(field - 5, ids[name]) for field, name in names)
        + b"".join(_message(field, tokens[ids[name]].encode()) for field, name in names)
    )
    normalizer = (
        _message(1, b"identity")
        + _number(3, flags["add_space_prefix"] is True)
        + _number(4, flags["remove_extra_whitespaces"] is True)
        + _number(5, True)
    )
    return b"".join(pieces) + _message(2, trainer) + _message(3, normalizer)


def read(path: pathlib.Path) -> tuple[Vocabulary, bool]:
    """Return the pieces of a SentencePiece file, and whether it puts a space before the first word.

    Raises TokenizerError for a file that is no BPE model, or that normalizes text.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as e:
        raise TokenizerError(f"is not a SentencePiece model ({e})", place=path, hint="fetch it again") from e
    tokens, scores, types = [], [], []
    for field, content in _fields(model.serialized_model_proto()):
        if field == 2 and dict(_fields(content)).get(3, UNIGRAM) != BPE:
            raise TokenizerError("is not a BPE model, as Mistral 7B's is; GGUF's 'llama' tokenizer is", place=path)
        if field == 1:
            entry: dict[int, Any] = {1: b"", 2: bytes(4), 3: NORMAL} | dict(_fields(content))
            tokens.append(entry[1].decode())
            scores.append(struct.unpack("<f", entry[2])[0])
            types.append(entry[3])
    wanted = NORMALIZATION_PROBE.replace(" ", SPACE)
    normalized = model.normalize(NORMALIZATION_PROBE)
    if normalized not in (wanted, SPACE + wanted):
        raise TokenizerError("normalizes text, which GGUF's 'llama' tokenizer does not", place=path)
    ids = {"unknown": model.unk_id(), "bos": model.bos_id(), "eos": model.eos_id()}
    ids = {name: i for name, i in ids.items() if i >= 0}
    return Vocabulary(path, tokens, scores, types, ids), normalized != wanted


# Protobuf: a message is a sequence of fields: a tag, then a varint (0), 4 bytes (5), or length and bytes (2).
def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _tag(field: int, wire: int) -> bytes:
    return _varint(field << 3 | wire)


def _number(field: int, value: int) -> bytes:
    return _tag(field, 0) + _varint(int(value))


def _message(field: int, content: bytes) -> bytes:
    return _tag(field, 2) + _varint(len(content)) + content


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (field number, value) of a valid message: an int for a varint, else bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
        else:
            size = {1: 8, 5: 4}.get(tag & 7) or varint()
            at += size
            yield tag >> 3, message[at - size : at]
