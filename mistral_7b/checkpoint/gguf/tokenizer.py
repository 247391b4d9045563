"""Convert between GGUF's tokenizer metadata and a SentencePiece model. Imports no torch.

GGUF stores the pieces, scores and types of a `llama` (SentencePiece BPE) tokenizer and its few flags. That is
enough to write the model file that mistral-common opens. The file is cached in the user's cache folder under
the hash of its content, so that repeated loads share one file.
"""

from __future__ import annotations

import hashlib
import math
import os
import pathlib
import re
import struct
import tempfile
from collections.abc import Iterator
from typing import Any

from ...errors import CheckpointError, TokenizerError, WriteError
from ...files import atomic_write
from . import file as gguf_file
from .chat_templates import HEADS, chat_template, template_version

MODEL, TEMPLATE = "tokenizer.ggml.model", "tokenizer.chat_template"
TOKENS, SCORES, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # the same codes in both formats
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = "\u2581"  # SentencePiece's symbol for a space
BPE = 2  # ModelType in SentencePiece's TrainerSpec
NORMALIZATION_PROBE = " \ufb01  \uff21"  # a ligature, two spaces, a wide letter: normalization would change them


def extract(path: pathlib.Path) -> pathlib.Path:
    """Write a GGUF file's SentencePiece model to the cache; return its path.

    Raises TokenizerError if the file has no usable tokenizer.
    """
    try:
        metadata = gguf_file.read(path).metadata
    except CheckpointError as e:
        raise TokenizerError.of(e) from e
    model = sentencepiece_model(path, metadata)
    name = file_name(metadata)
    root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    folder = root / "mistral-7b" / "tokenizers" / hashlib.sha256(model).hexdigest()[:32]
    try:
        return _write_if_changed(folder / name, model)
    except (OSError, WriteError):  # the cache is not writable: use a temporary file
        return _write_if_changed(pathlib.Path(tempfile.mkdtemp(prefix="mistral-7b-")) / name, model)


def file_name(metadata: Any) -> str:
    """Return the release's file name for this vocabulary, with the version if it is v2 or v3."""
    if "[INST]" not in metadata[TOKENS]:
        return "tokenizer.model"
    v2 = str(metadata.get(TEMPLATE)).startswith(HEADS["v2"].strip())
    return "tokenizer.model.v2" if v2 else "tokenizer.model.v3"


def _write_if_changed(path: pathlib.Path, content: bytes) -> pathlib.Path:
    """Write `content` to `path` atomically unless the file already holds it."""
    if not path.is_file() or path.read_bytes() != content:
        with atomic_write(path, folders=True) as beside:
            beside.write_bytes(content)
    return path


def sentencepiece_model(path: pathlib.Path, metadata: Any) -> bytes:
    """Build a serialized SentencePiece ModelProto from GGUF metadata."""
    kind = metadata.get(MODEL)
    if kind != "llama":
        raise TokenizerError(
            f"the tokenizer is {kind!r}; Mistral 7B's is 'llama' (SentencePiece)",
            field=MODEL,
            place=path,
            hint="choose another with --tokenizer or Tokenizer.from_pretrained",
        )
    tokens, scores, types = _pieces(path, metadata)
    ids = {
        name: metadata.get(f"tokenizer.ggml.{name}_token_id", default)
        for name, default in (("unknown", 0), ("bos", 1), ("eos", 2))
    }
    for name, token in ids.items():
        if not isinstance(token, int) or not 0 <= token < len(tokens):
            raise TokenizerError(
                f"'tokenizer.ggml.{name}_token_id' is {token!r}, not an id of {len(tokens)} tokens",
                field=f"tokenizer.ggml.{name}_token_id",
                place=path,
            )
    flags = {
        name: metadata.get(f"tokenizer.ggml.{name}", default)
        for name, default in (("add_space_prefix", True), ("remove_extra_whitespaces", False))
    }
    pieces = (
        _message(1, _message(1, t.encode()) + _tag(2, 5) + struct.pack("<f", s) + _number(3, k))
        for t, s, k in zip(tokens, scores, types, strict=True)
    )
    names = ((45, "unknown"), (46, "bos"), (47, "eos"))
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


def _pieces(path: pathlib.Path, metadata: Any) -> tuple[list[str], list[float], list[int]]:
    """Return tokens, scores and types, validated for SentencePiece."""
    tokens, scores, types = (metadata.get(key) for key in (TOKENS, SCORES, TYPES))
    for key, values, wanted in ((TOKENS, tokens, str), (SCORES, scores, float), (TYPES, types, int)):
        if not isinstance(values, list) or not all(type(v) is wanted for v in values):
            raise TokenizerError(f"{key!r} is missing, or of the wrong type", field=key, place=path)
    if not len(tokens) == len(scores) == len(types):
        raise TokenizerError(
            f"{len(tokens)} tokens, {len(scores)} scores, {len(types)} types", field=TOKENS, place=path
        )
    tokens = [t.replace(" ", SPACE) if k == USER_DEFINED else t for t, k in zip(tokens, types, strict=True)]
    seen: set[str] = set()
    for i, (token, score, kind) in enumerate(zip(tokens, scores, types, strict=True)):
        if not token or token in seen or "\0" in token:
            raise TokenizerError(
                f"token {i} {token!r:.40} is empty, or a duplicate", field=f"{TOKENS}[{i}]", place=path
            )
        if not math.isfinite(score) or not NORMAL <= kind <= BYTE:
            raise TokenizerError(f"token {i} has score {score} and type {kind}", field=f"{TYPES}[{i}]", place=path)
        if kind == BYTE and not BYTE_PIECE.fullmatch(token):
            raise TokenizerError(
                f"token {i} {token!r:.40} must be a byte, such as '<0x0A>'", field=f"{TOKENS}[{i}]", place=path
            )
        seen.add(token)
    count = {kind: types.count(kind) for kind in (UNKNOWN, BYTE)}
    if count[UNKNOWN] != 1 or count[BYTE] not in (0, 256):
        raise TokenizerError(
            f"{count[UNKNOWN]} unknown tokens and {count[BYTE]} byte tokens; there must be 1, and 256 or 0",
            field=TYPES,
            place=path,
        )
    return tokens, scores, types


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


def metadata(path: pathlib.Path, vocab_size: int) -> dict[str, Any]:
    """Return the tokenizer keys of a SentencePiece file, padded with unused tokens."""
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as e:
        raise TokenizerError(f"is not a SentencePiece model ({e})", place=path, hint="fetch it again") from e
    size = model.vocab_size()
    if size > vocab_size:
        raise TokenizerError(
            f"{size} tokens, but the model has {vocab_size}: it belongs to another model", place=path
        )
    if model.normalize(NORMALIZATION_PROBE) != SPACE + NORMALIZATION_PROBE.replace(" ", SPACE):
        raise TokenizerError("normalizes text, which GGUF's 'llama' tokenizer does not", place=path)
    tokens, scores, types = [], [], []
    for piece in (_fields(content) for field, content in _fields(model.serialized_model_proto()) if field == 1):
        entry: dict[int, Any] = {1: b"", 2: bytes(4), 3: NORMAL} | dict(piece)
        tokens.append(entry[1].decode())
        scores.append(struct.unpack("<f", entry[2])[0])
        types.append(entry[3])
    more = vocab_size - size
    of_kind = {kind: {t for t, k in zip(tokens, types, strict=True) if k == kind} for kind in set(types)}
    controls = of_kind.get(CONTROL, set())
    special = controls | of_kind.get(UNKNOWN, set()) | of_kind.get(USER_DEFINED, set())  # as in llama.cpp
    return {
        MODEL: "llama",
        "tokenizer.ggml.pre": "default",
        TOKENS: tokens + [f"[PAD{size + i}]" for i in range(more)],
        SCORES: scores + [-10000.0] * more,
        TYPES: types + [UNUSED] * more,
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        TEMPLATE: chat_template(template_version(controls, path.name), special),
    }
