"""The vocabulary in a GGUF file's metadata: pieces, scores, types and ids of special tokens, validated.

    type           in text                                    in Hugging Face's files
    NORMAL, BYTE   made by merges                             vocabulary
    UNKNOWN        never                                      special token
    CONTROL        never; only a template writes it           special token
    USER_DEFINED   matched before anything else               added token
    UNUSED         never                                      padding up to the rows of the embedding

Imports no torch.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any

from ...errors import TokenizerError

MODEL, PRE, TEMPLATE = "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template"
TOKENS, SCORES, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type"
MERGES, HF_JSON = "tokenizer.ggml.merges", "tokenizer.huggingface.json"
HF_ALONE = "huggingface.tokenizer_json_alone"  # true: no tokenizer.model lay beside that tokenizer.json
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # the same codes as in SentencePiece
SPACE = "\u2581"  # SentencePiece's symbol for a space
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
KINDS = ("llama", "gpt2")  # SentencePiece, byte-level BPE
ENDS = ("eos", "eot", "eom")  # of a text, a turn, a message: keys of the tokens that end a generation
CONTROL_LIKE = re.compile(r"<\|.*\|>|<\uff5c.*\uff5c>|<unused.*>|<pad>|<mask>", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, with one score and type each; `ids` maps "bos", "eos", "unknown"... to an id."""

    path: pathlib.Path
    tokens: list[str]
    scores: list[float]
    types: list[int]
    ids: Mapping[str, int]

    @classmethod
    def read(cls, path: pathlib.Path, metadata: Mapping[str, Any]) -> Vocabulary:
        """Return the vocabulary of a "llama" or "gpt2" tokenizer; TokenizerError names a bad key."""
        kind = metadata.get(MODEL)
        if kind not in KINDS:
            raise TokenizerError(
                f"the tokenizer is {kind!r}; 'llama' (SentencePiece) and 'gpt2' (byte-level BPE) can be read",
                field=MODEL,
                place=path,
                hint="choose another with --tokenizer or Tokenizer.from_pretrained",
            )
        tokens = _list(path, metadata, TOKENS, str)
        if kind == "llama":
            scores, types = _list(path, metadata, SCORES, float), _list(path, metadata, TYPES, int)
        else:  # scores mean nothing to a byte-level vocabulary
            scores = [0.0] * len(tokens)
            types = _list(path, metadata, TYPES, int) if TYPES in metadata else [NORMAL] * len(tokens)
        if not len(tokens) == len(scores) == len(types):
            raise TokenizerError(
                f"{len(tokens)} tokens, {len(scores)} scores, {len(types)} types", field=TOKENS, place=path
            )
        ids = _special_ids(path, metadata, len(tokens), kind == "llama")
        if kind == "llama" and UNKNOWN not in types and types[ids["unknown"]] == CONTROL:
            types = [UNKNOWN if i == ids["unknown"] else k for i, k in enumerate(types)]
        types = _with_controls(tokens, types, ids, set(metadata.get(MERGES) or ()) if kind == "gpt2" else None)
        out = cls(path, tokens, scores, types, ids)
        out._check(byte_pieces=kind == "llama")
        return out

    def _check(self, byte_pieces: bool) -> None:
        seen: set[str] = set()
        for i, (token, score, kind) in enumerate(zip(self.tokens, self.scores, self.types, strict=True)):
            if not token or token in seen or "\0" in token:
                self._refuse(f"token {i} {token!r:.40} is empty, or a duplicate", f"{TOKENS}[{i}]")
            if not math.isfinite(score) or not NORMAL <= kind <= BYTE:
                self._refuse(f"token {i} has score {score} and type {kind}", f"{TYPES}[{i}]")
            if kind == BYTE and not BYTE_PIECE.fullmatch(token):
                self._refuse(f"token {i} {token!r:.40} must be a byte, such as '<0x0A>'", f"{TOKENS}[{i}]")
            seen.add(token)
        count = {kind: self.types.count(kind) for kind in (UNKNOWN, BYTE)}
        if byte_pieces and (count[UNKNOWN] != 1 or count[BYTE] not in (0, 256)):
            self._refuse(
                f"{count[UNKNOWN]} unknown tokens and {count[BYTE]} byte tokens; there must be 1, and 256 or 0",
                TYPES,
            )

    def _refuse(self, what: str, field: str) -> None:
        raise TokenizerError(what, field=field, place=self.path)

    def base_size(self) -> int:
        """Return the number of tokens before those added by fine-tuning, and before padding."""
        size = self.size()
        while size and self.types[size - 1] in (CONTROL, USER_DEFINED):
            size -= 1
        return size

    def size(self) -> int:
        """Return the number of tokens without the padding at the end."""
        size = len(self.tokens)
        while size and self.types[size - 1] == UNUSED:
            size -= 1
        return size

    def first(self, size: int) -> Vocabulary:
        """Return the first `size` tokens as a vocabulary; `ids` beyond them are dropped."""
        ids = {name: i for name, i in self.ids.items() if i < size}
        return Vocabulary(self.path, self.tokens[:size], self.scores[:size], self.types[:size], ids)

    def specials(self) -> dict[int, bool]:
        """Return the ids that text does not reach by merges, and whether each is special (never text).

        Early converters wrote all added tokens as USER_DEFINED. Those spelled like control tokens are special:
        otherwise text could contain them.
        """
        return {
            i: kind != USER_DEFINED or looks_special(token)
            for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        }

    def text_of(self, name: str) -> str | None:
        """Return the spelling of the special token `name`, such as "bos"; None if there is none."""
        return self.tokens[self.ids[name]] if name in self.ids else None


def _with_controls(
    tokens: list[str], types: list[int], ids: Mapping[str, int], merges: Collection[Any] | None
) -> list[int]:
    """Return the types, CONTROL for control tokens that a converter wrote as NORMAL.

    They are spelled like one and made by no merge, or begin or end a text and are spelled as a tag. `merges` are
    the lines of a byte-level vocabulary; None: two pieces whose joined spelling is a third are merged.
    """
    ends = {ids[name] for name in ("bos", *ENDS) if name in ids}
    pieces = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}

    def is_control(i: int, token: str) -> bool:
        if i in ends and token.startswith("<") and token.endswith(">"):
            return True
        if not looks_special(token):
            return False
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        return not any(a in pieces and b in pieces if merges is None else f"{a} {b}" in merges for a, b in cuts)

    return [
        CONTROL if kind == NORMAL and is_control(i, token) else kind
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
    ]


def looks_special(token: str) -> bool:
    """Return whether a token is spelled like a control token, such as "<|im_end|>"."""
    return CONTROL_LIKE.fullmatch(token) is not None


def _list(path: pathlib.Path, metadata: Mapping[str, Any], key: str, wanted: type) -> list[Any]:
    values = metadata.get(key)
    if not isinstance(values, list) or not all(type(v) is wanted for v in values):
        raise TokenizerError(f"{key!r} is missing, or of the wrong type", field=key, place=path)
    return values


def _special_ids(path: pathlib.Path, metadata: Mapping[str, Any], size: int, defaults: bool) -> dict[str, int]:
    """Return the ids of special tokens; without keys, a "llama" vocabulary has llama.cpp's 0, 1 and 2."""
    ids = {"unknown": 0, "bos": 1, "eos": 2} if defaults else {}
    for name in ("unknown", "bos", "padding", *ENDS):
        key = f"tokenizer.ggml.{name}_token_id"
        token = metadata.get(key, ids.get(name))
        if token is None or (type(token) is int and name == "padding" and token >= size):
            continue  # some converters write a padding id of -1
        if type(token) is not int or not 0 <= token < size:
            raise TokenizerError(f"{key!r} is {token!r}, not an id of {size} tokens", field=key, place=path)
        ids[name] = token
    return ids
