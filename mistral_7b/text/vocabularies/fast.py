"""A tokenizer.json file, read by the `tokenizers` package: BPE with byte fallback, or byte-level BPE.

                    spaces     a byte        a token adds to a text
    byte fallback   "\u2581the"     "<0xE2>"      its piece, or one byte
    byte level      "\u0120the"     "\u00e2"           bytes: each character of a token stands for one

The file is opened twice. `_full` finds every added token in a text. In `_guarded`, control tokens have secret
names, so that no text spells one; to parse those of a rendered chat template, their spellings outside of users'
texts are replaced by the secret names first. Both find the other added tokens.
"""

from __future__ import annotations

import json
import pathlib
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from ...checkpoint.json_files import read_object
from ...errors import TokenizerError
from .contract import NOTHING, SPACE, Spans, Surface, Vocabulary, matches, not_utf8, touches
from .files import MAX_ID, NAMED, AddedToken, TokenizerSettings, damaged

if TYPE_CHECKING:
    import tokenizers

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
PARTS = 1024  # of rendered texts, whose ids are remembered
SECRET = secrets.token_hex(16)  # unknown to users, and in no file


class FastVocabulary(Vocabulary):
    """The tokens of a tokenizer.json file, with the added and named tokens of the other files of its folder.

    `ends` are ids that end a turn: added tokens among them are control tokens. Raises TokenizerError for a file
    that is missing, damaged, or not BPE.
    """

    def __init__(self, path: pathlib.Path, files: TokenizerSettings, ends: frozenset[int] = frozenset()) -> None:
        self.path = path
        self._content = _read(path)
        self._content["added_tokens"] = _added(path, self._content, files)
        full = self._full
        added = {
            i: AddedToken(i, t.content, t.special, t.lstrip, t.rstrip, t.normalized, t.single_word)
            for i, t in full.get_added_tokens_decoder().items()
        }
        vocabulary = full.get_vocab(with_added_tokens=True)
        if (last := max(vocabulary.values(), default=-1)) > MAX_ID:
            raise damaged(path, f"has a token with the id {last}")
        self.names = [""] * (last + 1)
        for name, i in vocabulary.items():
            self.names[i] = name
        for i, token in added.items():
            self.names[i] = token.content
        ids = {name: self.find(files.named.get(name, "")) for name in NAMED}
        self.bos_id, self.eos_id, self.unk_id = ids["bos_token"], ids["eos_token"], ids["unk_token"]
        named = {i for i in ids.values() if i is not None}
        textless = {i for i, t in added.items() if t.special or i in ends} | named
        self.markup = frozenset(textless | {i for i, t in added.items() if t.is_markup})
        kinds = list(_steps(self._content.get("decoder"), "decoders"))
        self._byte_level = any(step.get("type") == "ByteLevel" for step in kinds)
        self.kind = "byte-level BPE" if self._byte_level else "BPE with byte fallback"
        base = self._content["model"]["vocab"]
        self.added_size = sum(token.content not in base for token in added.values())
        self.drops_first_space = any(map(_drops_space, kinds))
        self.surfaces = [
            None if i in textless or not name else self._surface(name, i in added)
            for i, name in enumerate(self.names)
        ]
        with _understood(path):
            framed = full.encode("", add_special_tokens=True).ids
        self.adds_bos = self.bos_id is not None and (
            framed[:1] == [self.bos_id]
            if self._content.get("post_processor")
            else bool(files.config.get("add_bos_token", False))
        )

    def _surface(self, name: str, added: bool) -> Surface:
        if self._byte_level:
            return name.encode() if added else _bytes_of(name)
        byte = BYTE_PIECE.fullmatch(name) if self._content["model"].get("byte_fallback") else None
        return name if byte is None else bytes([int(byte[1], 16)])

    @cached_property
    def _full(self) -> tokenizers.Tokenizer:
        return _build(self.path, self._content)

    @cached_property
    def _guarded(self) -> tokenizers.Tokenizer:
        """The tokenizer whose control tokens have secret names."""
        secret = {self.names[i]: _secret(i) for i in self.markup}
        model = dict(self._content["model"])
        model["vocab"] = {secret.get(name, name): i for name, i in model["vocab"].items()}
        model["merges"] = [m for m in model["merges"] if secret.keys().isdisjoint(_words(m))]
        model["unk_token"] = secret.get(model.get("unk_token") or "", model.get("unk_token"))
        added = [
            {**token, "content": secret.get(token["content"], token["content"])}
            for token in self._content["added_tokens"]
        ]
        content = {**self._content, "model": model, "added_tokens": added, "post_processor": None}
        return _build(self.path, content)

    def encode(self, text: str) -> list[int]:
        """Encode plain text; added tokens are found in it unless they are control tokens."""
        return _encode(self._guarded, text)

    def encode_rendered(self, text: str, plain: Spans = ()) -> list[int]:
        """Encode a rendered chat template; control tokens that touch `plain` stay text."""
        if not plain:
            starts = [m.start() for m in self._spellings.finditer(text)] if self._can_be_cut else []
            bounds = zip([0, *starts], [*starts, len(text)], strict=True)
            return [i for start, end in bounds for i in self._encode_part(text[start:end])]
        parts: list[str] = []
        done = 0
        for start, end in matches(self._spellings, text, lambda match: not touches(*match.span(), plain)):
            parts += [text[done:start], self._secrets[text[start:end]]]
            done = end
        return _encode(self._guarded, "".join(parts) + text[done:])

    @cached_property
    def _encode_part(self) -> Callable[[str], list[int]]:
        """Encode the part of a rendered text from one control token to the next.

        The last parts are remembered, as each turn of a conversation renders those before it again.
        """
        return lru_cache(PARTS)(lambda text: _encode(self._full, text))

    @cached_property
    def _can_be_cut(self) -> bool:
        """Whether the parts of a text that begin with a control token can be encoded by themselves.

        They cannot if a control token depends on the text before it, or can begin within another added token.
        """
        added = [AddedToken.of(int(t["id"]), t) for t in self._content["added_tokens"]]
        controls = [t for t in added if t.id in self.markup]
        if len(controls) < len(self.markup) or any(t.lstrip or t.single_word or t.normalized for t in controls):
            return False
        heads = {t.content[:n] for t in controls for n in range(1, len(t.content) + 1)}
        wholes = tuple(t.content for t in controls)
        tails = (t.content[n:] for t in added for n in range(1, len(t.content)))
        return not any(tail in heads or tail.startswith(wholes) for tail in tails)

    @cached_property
    def _secrets(self) -> dict[str, str]:
        return {self.names[i]: _secret(i) for i in self.markup}

    @cached_property
    def _spellings(self) -> re.Pattern[str]:
        longest_first = sorted(self._secrets, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or NOTHING)


def _secret(token: int) -> str:
    return f"<{SECRET}-{token}>"


def _words(merge: Any) -> tuple[str, str, str]:
    """Return both tokens of a merge, and what they become."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right, left + right


def _read(path: pathlib.Path) -> dict[str, Any]:
    """Read the file. TokenizerError if it is missing, damaged, or not BPE."""
    if not path.is_file():
        raise TokenizerError("no such tokenizer file", place=path)
    content = read_object(path)
    model = content.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), (dict, list)):
        raise damaged(path, "is not a tokenizer.json: it has no model with a vocabulary")
    kind = model.get("type") or ("BPE" if "merges" in model else "unknown")
    if kind != "BPE" or not isinstance(model["vocab"], dict) or not isinstance(model.get("merges"), list):
        raise TokenizerError(
            f"holds a {kind} model; tokenizers of the Mistral family are BPE",
            field="model.type",
            place=path,
            hint="choose the tokenizer of this model with --tokenizer or Tokenizer.from_pretrained",
        )
    return content


def _build(path: pathlib.Path, content: dict[str, Any]) -> tokenizers.Tokenizer:
    """Build the tokenizer of a file's content. TokenizerError if it is inconsistent."""
    import tokenizers

    with _understood(path):
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@contextmanager
def _understood(path: pathlib.Path) -> Iterator[None]:
    """Raise TokenizerError for what the package says of a file: Exception itself, or a panic, which is none."""
    try:
        yield
    except BaseException as e:
        if isinstance(e, Exception) or type(e).__name__ == "PanicException":
            raise damaged(path, f"is damaged: {e}") from e
        raise


def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    except (UnicodeEncodeError, TypeError) as e:
        raise not_utf8(text) from e


def _added(path: pathlib.Path, content: dict[str, Any], files: TokenizerSettings) -> list[dict[str, Any]]:
    """Return the file's added tokens, changed and completed by the other files, as transformers does.

    An entry of added_tokens_decoder replaces one of the same spelling; a named token of the vocabulary is a
    control token. Named tokens that no file gives an id are ignored: the model has no row for them.
    """
    try:
        listed = [AddedToken.of(int(t["id"]), t) for t in content.get("added_tokens") or ()]
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise damaged(path, f"its added tokens cannot be read ({e!r})") from e
    tokens = {token.content: token for token in listed}
    for token in files.added:
        if token.content not in tokens or "added_tokens_decoder" in files.config:
            tokens[token.content] = token
    vocabulary = content["model"]["vocab"]
    for name in files.special:
        if name in tokens:
            token = tokens[name]
            tokens[name] = AddedToken(
                token.id, name, True, token.lstrip, token.rstrip, token.normalized, token.single_word
            )
        elif name in vocabulary:
            tokens[name] = AddedToken(vocabulary[name], name, True)
    return [vars(token) for token in tokens.values()]


def _steps(step: Any, inside: str) -> list[dict[str, Any]]:
    """Return the steps of a decoder, those inside a sequence one by one."""
    if not isinstance(step, dict):
        return []
    if step.get("type") == "Sequence":
        return [one for part in step.get(inside) or () for one in _steps(part, inside)]
    return [step]


def _drops_space(step: dict[str, Any]) -> bool:
    """Whether a decoder's step drops the space that encoding put before the first word."""
    if step.get("type") == "Metaspace":
        return bool(step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True))
    return step.get("type") == "Strip" and step.get("content") in (" ", SPACE) and step.get("start", 0) > 0


def _bytes_of(name: str) -> bytes:
    """Return the bytes that the characters of a byte-level token stand for."""
    if all(char in BYTES for char in name):
        return bytes(BYTES[char] for char in name)
    return name.encode()


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each character of byte-level BPE.

    Printable characters of Latin-1 stand for themselves, other bytes for the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


BYTES = _byte_alphabet()
