"""A SentencePiece file (tokenizer.model), read by mistral-common, with the added tokens that lie beside it.

A text is cut at added tokens; SentencePiece encodes what lies between them.

    <|im_start|>user\\nHi<|im_end|>     [32001] + encode("user\\nHi") + [32000]

SentencePiece puts a space before a text's first word. Unless `legacy` is false in tokenizer_config.json, each part
gets one, as in transformers' and llama.cpp's readers of such files.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property

import sentencepiece
from mistral_common.tokens.tokenizers.base import TokenizerVersion
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

from ...checkpoint.others import check_pointer
from ...errors import TokenizerError
from .contract import NOTHING, Spans, Surface, Vocabulary, matches, not_utf8, touches
from .files import AddedToken, damaged

UNKNOWN = " \u2047 "  # what SentencePiece decodes the unknown token to
NO_PREFIX = b"\x1a\x02\x18\x00"  # appended to a model: normalizer_spec (field 3) with add_dummy_prefix (3) = false


class SentencePieceVocabulary(Vocabulary):
    """The pieces of a SentencePiece file and added tokens, which extend or rename them.

    `ends` are ids that end a turn: added tokens among them are control tokens. `named` may name control tokens as
    "bos_token" and "eos_token" in place of the file's. Raises TokenizerError for a file that is missing or not a
    SentencePiece model.
    """

    kind = "SentencePiece"

    def __init__(
        self, path: pathlib.Path, added: Iterable[AddedToken] = (), ends: frozenset[int] = frozenset(),
        legacy: bool = True, adds_bos: bool = True, named: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.path, self.legacy, self.adds_bos, self.drops_first_space = path, legacy, adds_bos, True
        self.pieces = open_pieces(path)
        self.names = list(self.pieces.vocab())
        model = self.pieces._model
        controls = frozenset(i for i in range(len(self.names)) if model.IsControl(i))
        self.surfaces = [self._surface(i, piece) for i, piece in enumerate(self.names)]
        ids = (self.pieces.bos_id, self.pieces.eos_id, self.pieces.unk_id)
        self.bos_id, self.eos_id, self.unk_id = (i if i >= 0 else None for i in ids)
        if self.unk_id is not None:
            self.surfaces[self.unk_id] = UNKNOWN
        self.added = [t for t in added if not self._has(t)]
        self.added_size = len(self.added)
        for token in self.added:
            missing = token.id + 1 - len(self.names)
            self.names += [""] * missing
            self.surfaces += [None] * missing
            self.names[token.id] = token.content
            self.surfaces[token.id] = None if token.special or token.id in ends else token.content
        textless = {t.id for t in self.added if t.is_markup or t.id in ends}
        own = controls if self.unk_id is None else controls | {self.unk_id}
        self.markup = own | textless
        controls_by_name = {self.names[i]: i for i in self.markup}
        self.bos_id = controls_by_name.get((named or {}).get("bos_token", ""), self.bos_id)
        self.eos_id = controls_by_name.get((named or {}).get("eos_token", ""), self.eos_id)
        self._all = [*self.added, *(AddedToken(i, self.names[i]) for i in own - {t.id for t in self.added})]

    def _surface(self, token: int, piece: str) -> Surface:
        model = self.pieces._model
        if model.IsControl(token):
            return None
        if model.IsByte(token):  # type: ignore[attr-defined]  # not among mistral-common's declared methods
            return bytes([int(piece[1:-1], 16)])
        return piece

    def _has(self, token: AddedToken) -> bool:
        """Whether the file itself has this token, which SentencePiece then finds in texts, or never does."""
        return token.id < len(self.names) and self.names[token.id] == token.content

    def encode(self, text: str) -> list[int]:
        """Encode plain text; added tokens are found in it unless they are control tokens."""
        if not self.added:
            return self._encode_part(text, True)
        return self._encode(text, lambda token, start, end: token in self.markup)

    def encode_rendered(self, text: str, plain: Spans = ()) -> list[int]:
        """Encode a rendered chat template; control tokens that touch `plain` stay text."""

        def is_plain(token: int, start: int, end: int) -> bool:
            return token in self.markup and touches(start, end, plain)

        return self._encode(text, is_plain)

    def _encode(self, text: str, is_plain: Callable[[int, int, int], bool]) -> list[int]:
        """Encode text, cut at each added or control token for which `is_plain(id, start, end)` is false."""
        ids: list[int] = []
        done = 0
        for start, end in matches(self._pattern, text, lambda m: not is_plain(self._id(m.group()), *m.span())):
            ids += self._encode_part(text[done:start], not ids)
            ids.append(self._id(text[start:end]))
            done = end
        return ids + self._encode_part(text[done:], not ids)

    def _encode_part(self, text: str, first: bool) -> list[int]:
        """Encode text without added tokens; a part that is not the `first` may begin without a space."""
        try:
            if first or self.legacy:
                return self.pieces.encode(text, bos=False, eos=False)
            return self._continuing.encode(text)
        except (RuntimeError, AssertionError) as e:
            raise not_utf8(text) from e

    @cached_property
    def _continuing(self) -> sentencepiece.SentencePieceProcessor:
        """The same model, which puts no space before the first word."""
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(self.path.read_bytes() + NO_PREFIX)
        return processor

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """A pattern of all added and control tokens, the longest first."""
        longest_first = sorted(self._all, key=lambda token: -len(token.content))
        return re.compile("|".join(map(_spelling, longest_first)) or NOTHING)

    def _id(self, found: str) -> int:
        """Return the id of a token that was found, perhaps with the whitespace that it takes."""
        return self._ids[found] if found in self._ids else self._ids[found.strip()]

    @cached_property
    def _ids(self) -> dict[str, int]:
        """The ids of these tokens, by their spelling with and without whitespace around it."""
        return {t.content.strip(): t.id for t in self._all} | {t.content: t.id for t in self._all}


def _spelling(token: AddedToken) -> str:
    """Return a pattern of a token and the whitespace that it takes."""
    text = re.escape(token.content)
    if token.single_word:
        text = rf"(?<!\w){text}(?!\w)"
    return (r"\s*" if token.lstrip else "") + text + (r"\s*" if token.rstrip else "")


def open_pieces(path: pathlib.Path, version: str = "v1") -> SentencePieceTokenizer:
    """Open a SentencePiece file with mistral-common, as a template of this version takes it."""
    if not path.is_file():
        raise TokenizerError("no such tokenizer file", place=path)
    try:  # without a version, mistral-common would guess one from the file name
        return SentencePieceTokenizer(path, tokenizer_version=TokenizerVersion(version))
    except RuntimeError as e:
        check_pointer(path, TokenizerError)
        raise damaged(path, f"is not a SentencePiece model ({e})") from e
