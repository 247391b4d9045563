"""The tokenizer: text and chats to token ids, ids to text, and incremental decoding.

mistral-common does the encoding, so that ids are Mistral's own. This file selects the vocabulary file and the
chat template, and takes chats in the format of the OpenAI API.

    version   releases                 a chat with a system prompt becomes
    v1        7B v0.1, v0.2            <s>[INST] system\\n\\nuser [/INST]answer</s>   markers are plain text
    v3        7B v0.3                  <s>[INST] system\\n\\nuser[/INST] answer</s>   markers are control tokens

Only this file inserts control tokens: SentencePiece never encodes text as one, so that "[INST]" or "</s>" in a
user's message is plain text.
"""

from __future__ import annotations

import codecs
import os
import pathlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from mistral_common.protocol.instruct.normalize import get_normalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Tool
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
from mistral_common.tokens.tokenizers.base import TokenizerVersion
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

from ..checkpoint.gguf.chat_templates import template_version
from ..checkpoint.gguf.file import is_gguf
from ..checkpoint.gguf.splits import first_part
from ..checkpoint.gguf.tokenizer import extract
from ..checkpoint.hub import SENTENCEPIECE, resolve, sentencepiece_file
from ..errors import TokenizerError
from .messages import MISTRAL_COMMON_ERRORS, TEMPLATES, label, read_messages, reason

UTF8 = codecs.getincrementaldecoder("utf-8")
SPACE = "\u2581"  # SentencePiece's symbol for a space; in text it also decodes to a space


class Tokenizer:
    """A SentencePiece vocabulary with its chat template.

    `version` None detects the template from the vocabulary. Raises TokenizerError for a file that is missing, is
    not a SentencePiece model, or lacks the control tokens of its template.
    """

    def __init__(self, path: str | os.PathLike[str], version: str | None = None) -> None:
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise TokenizerError("no such tokenizer file", place=self.path)
        try:  # without a version, mistral-common would guess one from the file name
            self._pieces = SentencePieceTokenizer(self.path, tokenizer_version=TokenizerVersion.v1)
        except RuntimeError as e:
            raise TokenizerError(
                f"is not a SentencePiece model ({e})",
                place=self.path,
                hint="fetch tokenizer.model again (a file of some hundred bytes is a git-lfs pointer only)",
            ) from e
        self.version = version or template_version(self._control_names, self.path.name)
        if self.version not in TEMPLATES:
            raise TokenizerError(
                f"no chat template {self.version!r}; known are {', '.join(TEMPLATES)}", field="version"
            )
        if self.version != "v1" and not self._control_names.issuperset(("[INST]", "[/INST]")):
            raise TokenizerError(
                f"has no control tokens [INST] and [/INST]: it cannot be {self.version}",
                field="version",
                place=self.path,
            )
        if self.bos_id < 0 or self.eos_id < 0:
            raise TokenizerError("defines no beginning or end of sequence (<s>, </s>)", place=self.path)
        self._pieces = SentencePieceTokenizer(self.path, tokenizer_version=TokenizerVersion(self.version))
        self._chat = self._template(ValidationMode.test)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str] = "demo") -> Tokenizer:
        """Load the tokenizer of a model: a folder, a file in it, a GGUF file, a hub id, or "demo"."""
        path = resolve(source)
        if path.is_file() and is_gguf(path):
            return cls(extract(path))
        if path.is_file() and SENTENCEPIECE.fullmatch(path.name):
            return cls(path)
        return cls(_find(path.parent if path.is_file() else path))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Load one SentencePiece file, whatever its name."""
        return cls(path)

    @classmethod
    def v1(cls) -> Tokenizer:
        """The tokenizer of Mistral 7B v0.1 and v0.2: 32000 tokens; <s> and </s> are control tokens."""
        return cls(MistralTokenizer._data_path() / "tokenizer.model.v1", "v1")

    @classmethod
    def v2(cls) -> Tokenizer:
        """Template v2: 32768 tokens with control tokens. No Mistral 7B uses it (v0.3 uses v3)."""
        return cls(MistralTokenizer._data_path() / "mistral_instruct_tokenizer_240216.model.v2", "v2")

    @classmethod
    def v3(cls) -> Tokenizer:
        """The tokenizer of Mistral 7B v0.3: 32768 tokens, tool calls with ids."""
        return cls(MistralTokenizer._data_path() / "mistral_instruct_tokenizer_240323.model.v3", "v3")

    @cached_property
    def _control_names(self) -> frozenset[str]:
        return frozenset(self._pieces.id_to_piece(i) for i in self._pieces.special_ids)

    def _template(self, mode: ValidationMode) -> MistralTokenizer:
        version = TokenizerVersion(self.version)
        return MistralTokenizer(
            TEMPLATES[self.version](self._pieces), get_validator(version, mode=mode), get_normalizer(version)
        )

    @property
    def vocab_size(self) -> int:
        return self._pieces.n_words

    @property
    def bos_id(self) -> int:
        return self._pieces.bos_id

    @property
    def eos_id(self) -> int:
        return self._pieces.eos_id

    @property
    def unk_id(self) -> int:
        """The unknown token; with byte tokens, no text encodes to it."""
        return self._pieces.unk_id

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        """Encode plain text; it never produces a control token."""
        try:
            return self._pieces.encode(text, bos=bos, eos=eos)
        except (RuntimeError, AssertionError) as e:
            raise TokenizerError(f"the text cannot be encoded as UTF-8: {text!r:.80}", field="text") from e

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids, skipping control tokens; each invalid UTF-8 byte becomes U+FFFD."""
        textless = self.bos_id  # replaces ids unknown to SentencePiece, so that bytes around one are not joined
        return self._pieces.decode([textless if self.is_control(i) else i for i in ids])

    def stream(self, after: Sequence[int] = ()) -> StreamDecoder:
        """Return an incremental decoder for ids that follow the ids `after`.

        SentencePiece puts a space before the first word of a text, and decoding drops it. The space is kept if
        `after` ends in text, since the next word is then not the first.
        """
        return StreamDecoder(self, keep_space=bool(after) and not self.is_control(after[-1]))

    @cached_property
    def tool_calls_id(self) -> int | None:
        """The id of [TOOL_CALLS], which starts tool calls; None if the vocabulary lacks it."""
        name = "[TOOL_CALLS]"
        return self._pieces.vocab().index(name) if name in self._control_names else None

    def is_control(self, token: int) -> bool:
        """Return whether an id has no text: control tokens, and ids beyond the vocabulary."""
        return self.surface(token) is None

    def piece(self, token: int) -> str:
        """Return an id for display: " the", "[INST]", "<0xE2>", "<unused_32005>" if out of range."""
        surface = self.surface(token)
        if isinstance(surface, bytes) and surface.isascii():
            return surface.decode()
        if token >= self.vocab_size:
            return f"<unused_{token}>"
        return surface.replace(SPACE, " ") if isinstance(surface, str) else self._pieces.id_to_piece(token)

    def piece_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes that one id adds to a text; empty for control tokens."""
        surface = self.surface(token)
        if isinstance(surface, str):
            return surface.replace(SPACE, " ").encode()
        return surface or b""

    def surface(self, token: int) -> str | bytes | None:
        """Return the piece (with SPACE for spaces), a single byte, or None for an id without text.

        Control tokens have no text, nor do ids beyond the vocabulary, which a model with added or padding tokens
        may emit. Raises TokenizerError for a negative id.
        """
        if token < 0:
            raise TokenizerError(f"{token} is not a token id: ids are integers of at least 0", field="ids")
        return self._surfaces[token] if token < len(self._surfaces) else None

    @cached_property
    def _surfaces(self) -> list[str | bytes | None]:
        model, pieces = self._pieces._model, self._pieces.vocab()
        surfaces: list[str | bytes | None] = list(pieces)
        for i, piece in enumerate(pieces):
            if model.IsControl(i):
                surfaces[i] = None
            elif model.IsByte(i):  # type: ignore[attr-defined]  # not among mistral-common's declared methods
                surfaces[i] = bytes([int(piece[1:-1], 16)])
        surfaces[self._pieces.unk_id] = " \u2047 "
        return surfaces

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        labels: Sequence[str] | None = None,
    ) -> list[int]:
        """Encode a conversation up to the assistant's next message, with one BOS at the start.

        `messages` and `tools` are those of the OpenAI API: roles system (or developer), user, assistant, tool;
        content a text or a list of text parts; tool_calls. A last assistant message with "prefix": True is
        continued, and its text encoded unchanged. Raises TokenizerError naming the invalid message, by its entry
        in `labels` if given, else as `messages[i]`.
        """
        return self.encode_chat_with_prefix(messages, tools, labels)[0]

    def encode_chat_with_prefix(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        labels: Sequence[str] | None = None,
    ) -> tuple[list[int], int]:
        """Return the ids of encode_chat, and how many belong to a continued assistant message.

        Consecutive assistant messages count as one, as mistral-common joins them.
        """
        if tools and self.version == "v1":
            raise TokenizerError("this tokenizer (v1) does not support tools; Mistral 7B v0.3 does", field="tools")
        chat = read_messages(messages, self.version, labels)
        if not any(m.role == "user" for m in chat):
            raise TokenizerError("the conversation has no message with role 'user' to answer", field="messages")
        try:
            validated_tools = [Tool.from_openai(dict(t)) for t in tools or ()] or None
            if validated_tools:
                self._chat._chat_completion_request_validator._validate_tools(validated_tools)
        except MISTRAL_COMMON_ERRORS as e:
            raise TokenizerError(f"tools: {reason(e)}", field="tools") from e
        try:
            return self._apply(self._chat, chat, validated_tools)
        except MISTRAL_COMMON_ERRORS as e:
            name = label(labels, self._invalid_index(chat))
            raise TokenizerError(f"{name}: {reason(e)}", field=name) from e

    @staticmethod
    def _apply(template: MistralTokenizer, chat: list[Any], tools: list[Tool] | None) -> tuple[list[int], int]:
        request: ChatCompletionRequest = ChatCompletionRequest(messages=chat, tools=tools)
        encoded = template.encode_chat_completion(request)
        return encoded.tokens, len(encoded.prefix_ids or ())

    def _invalid_index(self, chat: list[Any]) -> int:
        """Return the index of the first message that makes a conversation invalid."""
        lenient = self._template(ValidationMode.agnostic)  # accepts any last role
        for i in range(len(chat)):
            try:
                self._apply(lenient, chat[: i + 1], None)
            except MISTRAL_COMMON_ERRORS:
                return i
        return len(chat) - 1


class StreamDecoder:
    """Incremental decoder: the joined results of push and flush equal `decode` of all ids.

    Text is returned as soon as no later token can change it; incomplete UTF-8 characters are buffered.
    """

    def __init__(self, tokenizer: Tokenizer, keep_space: bool = False) -> None:
        self._tokenizer = tokenizer
        self._at_start = not keep_space  # the next piece is the first of a text: drop its space
        self._pending = bytearray()

    def push(self, token: int) -> str:
        """Add a token; return the text that is now final."""
        surface = self._tokenizer.surface(token)
        if isinstance(surface, bytes):
            self._at_start = False
            self._pending += surface
            return self._decode_pending()
        text = self.flush()  # bytes followed by a piece can never be completed
        if surface is None:
            return text
        if self._at_start and surface.startswith(SPACE):
            surface = surface[1:]
        self._at_start = False
        return text + surface.replace(SPACE, " ")

    @property
    def waiting(self) -> bool:
        """Whether the bytes of an incomplete character are buffered."""
        return bool(self._pending)

    def flush(self) -> str:
        """Return the buffered text at the end of the stream."""
        return self._decode_pending(final=True)

    def _decode_pending(self, final: bool = False) -> str:
        text = ""
        while self._pending:
            size = _utf8_size(self._pending[0])
            head = bytes(self._pending[:size])
            try:
                char = UTF8().decode(head, final)
            except UnicodeDecodeError:
                char, size = "\ufffd", 1
            if not char:
                break  # an incomplete character: wait for more bytes
            text += char
            del self._pending[:size]
        return text


def _utf8_size(first: int) -> int:
    """Return the length of a UTF-8 character from its first byte (1 if invalid)."""
    return 1 if first < 0xC0 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4


def _find(folder: pathlib.Path) -> pathlib.Path:
    """Return the tokenizer file of a folder, or one extracted from its only GGUF file."""
    if file := sentencepiece_file(folder):
        return file
    inside = [f for f in folder.glob("*.gguf") if is_gguf(f) and first_part(f) == f]
    if len(inside) == 1:
        return extract(inside[0])
    others = [n for n in ("tokenizer.json", "tekken.json") if (folder / n).is_file()]
    raise TokenizerError(
        "contains no tokenizer.model or tokenizer.model.v3"
        + (f" ({others[0]} is not a SentencePiece model)" if others else ""),
        place=folder,
        hint="fetch it from the model's repository on the hub: tokenizer.model for v0.1 and v0.2, "
        "tokenizer.model.v3 for v0.3",
    )
