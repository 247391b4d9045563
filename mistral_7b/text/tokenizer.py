"""The tokenizer: text and chats to token ids, ids to text, and incremental decoding.

A Tokenizer joins a vocabulary (vocabularies/), a chat format (chat.py) and the ids that end generation. Only chat
formats insert control tokens: text never encodes as one, so that "[INST]", "</s>" or "<|im_end|>" in a user's
message is plain text.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from ..checkpoint.gguf.file import is_gguf
from ..checkpoint.gguf.splits import first_part
from ..checkpoint.gguf.tokenizer import extract, has_tokenizer
from ..checkpoint.hub import SENTENCEPIECE, resolve, sentencepiece_file, weight_groups
from ..errors import TokenizerError
from .chat import ChatFormat, TemplateChat, chat_format, mistral_chat
from .chat_template import ChatTemplate
from .streaming import StreamDecoder
from .template_choice import no_template
from .tool_calls import CLOSING, OPENING, ToolSyntax
from .vocabularies.contract import SPACE, Spans, Vocabulary
from .vocabularies.files import TokenizerSettings
from .vocabularies.folder import FAST, open_folder
from .vocabularies.sentencepiece import SentencePieceVocabulary


class Tokenizer:
    """A vocabulary with its chat format.

    chat   encodes conversations; None: the model brings no chat template
    ends   ids that end generation besides the vocabulary's EOS
    gguf   the GGUF file that it was extracted from, if it was
    """

    def __init__(
        self, vocabulary: Vocabulary, chat: ChatFormat | None = None, ends: Iterable[int] = (),
        gguf: pathlib.Path | None = None,
    ) -> None:  # fmt: skip
        self.vocabulary, self.chat, self.gguf = vocabulary, chat, gguf
        turn_end = vocabulary.find((chat and chat.turn_end()) or "")
        known = {vocabulary.eos_id, turn_end, *ends} - {None}
        self.stop_ids: frozenset[int] = frozenset(known)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"Tokenizer({str(self.path)!r}, {self.version!r}, {self.vocab_size} tokens)"

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str] = "demo", chat_template: str | os.PathLike[str] | None = None
    ) -> Tokenizer:
        """Load the tokenizer of a model: a folder, a file in it, a GGUF file, a hub id, or a bundled name.

        `chat_template` None is the model's own. Else it is a Jinja file, one of the model's named templates, or a
        name of template_library: "chatml", "zephyr", "mistral-v3"...

        A GGUF file has its own tokenizer, also where other files lie beside it; those count if it has none.
        """
        path = _gguf_model(resolve(source))
        folder = path if path.is_dir() else path.parent
        if path.is_file() and is_gguf(path) and (not _has_files(folder) or has_tokenizer(path)):
            return cls._of_folder(extract(path), chat_template, path)
        if path.is_file() and SENTENCEPIECE.fullmatch(path.name):
            vocabulary = SentencePieceVocabulary(path)
            return cls(vocabulary, chat_format(path.parent, vocabulary, chat_template))
        return cls._of_folder(folder, chat_template)

    @classmethod
    def _of_folder(
        cls, folder: pathlib.Path, chat_template: str | os.PathLike[str] | None, gguf: pathlib.Path | None = None
    ) -> Tokenizer:
        vocabulary = open_folder(folder)
        settings = TokenizerSettings(folder)
        eos = vocabulary.find(settings.named.get("eos_token", ""))
        ends = settings.stop_ids if eos is None else settings.stop_ids | {eos}
        return cls(vocabulary, chat_format(folder, vocabulary, chat_template), ends, gguf)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], version: str | None = None) -> Tokenizer:
        """Load one SentencePiece file, whatever its name.

        `version` None detects the template from the vocabulary. Raises TokenizerError for a file that is missing,
        is not a SentencePiece model, or lacks the control tokens of its template.
        """
        vocabulary = SentencePieceVocabulary(pathlib.Path(path))
        return cls(vocabulary, mistral_chat(vocabulary, version))

    @classmethod
    def from_template(cls, vocabulary: Vocabulary, template: ChatTemplate, ends: Iterable[int] = ()) -> Tokenizer:
        """Join a vocabulary with a chat template of its own."""
        return cls(vocabulary, TemplateChat(vocabulary, template), ends)

    @classmethod
    def v1(cls) -> Tokenizer:
        """The tokenizer of Mistral 7B v0.1 and v0.2: 32000 tokens; <s> and </s> are control tokens."""
        return cls.from_file(MistralTokenizer._data_path() / "tokenizer.model.v1", "v1")

    @classmethod
    def v2(cls) -> Tokenizer:
        """Template v2: 32768 tokens with control tokens. No Mistral 7B uses it (v0.3 uses v3)."""
        return cls.from_file(MistralTokenizer._data_path() / "mistral_instruct_tokenizer_240216.model.v2", "v2")

    @classmethod
    def v3(cls) -> Tokenizer:
        """The tokenizer of Mistral 7B v0.3: 32768 tokens, tool calls with ids."""
        return cls.from_file(MistralTokenizer._data_path() / "mistral_instruct_tokenizer_240323.model.v3", "v3")

    def stopping_at(self, tokens: Iterable[int | str]) -> Tokenizer:
        """Return this tokenizer with more ids that end generation: ids, or tokens by their spelling.

        Raises TokenizerError for a text that is not one token.
        """
        ids = [token if isinstance(token, int) else self._find(token) for token in tokens]
        return Tokenizer(self.vocabulary, self.chat, self.stop_ids.union(ids), self.gguf)

    def _find(self, name: str) -> int:
        found = self.vocabulary.find(name)
        if found is None:
            found = next((i for i in range(self.vocab_size) if self.piece(i) == name), None)
        if found is None:
            raise TokenizerError(
                f"{name!r} is not one token of the vocabulary",
                field="stop_token",
                place=self.path,
                hint="use a stop string, or name a token by its id",
            )
        return found

    @property
    def path(self) -> pathlib.Path:
        """The file of the vocabulary."""
        return self.vocabulary.path

    @property
    def version(self) -> str | None:
        """The version of Mistral's chat template; None for another template, or none."""
        return self.chat.version if self.chat else None

    @property
    def vocab_size(self) -> int:
        return self.vocabulary.size

    @property
    def bos_id(self) -> int | None:
        """The beginning of a sequence; None if the vocabulary has no such token."""
        return self.vocabulary.bos_id

    @property
    def eos_id(self) -> int | None:
        """The end of a sequence; `stop_ids` has it and all others that end generation."""
        return self.vocabulary.eos_id

    @property
    def start_id(self) -> int:
        """The token that a document begins with: BOS, or EOS, which separates documents, where texts have no BOS.

        Raises TokenizerError if the vocabulary has neither.
        """
        start = self.bos_id if self.vocabulary.adds_bos or self.eos_id is None else self.eos_id
        if start is None:
            raise TokenizerError("the vocabulary has no beginning or end of sequence", place=self.path)
        return start

    @property
    def unk_id(self) -> int | None:
        """The unknown token; with byte tokens, no text encodes to it."""
        return self.vocabulary.unk_id

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        """Encode plain text; it never produces a control token.

        With `bos`, the ids begin with BOS if the model's texts do. With `eos`, they end with EOS.
        """
        ids = self.vocabulary.encode(text)
        if bos and self.vocabulary.adds_bos and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        if eos:
            if self.eos_id is None:
                raise TokenizerError("the vocabulary has no end of sequence", field="eos", place=self.path)
            ids.append(self.eos_id)
        return ids

    def encode_rendered(self, text: str, plain: Spans = ()) -> list[int]:
        """Encode a rendered chat template, without BOS or EOS; control tokens that it spells become ids.

        In the character ranges `plain`, which come from messages, they stay text. Without any, the ids are those
        of transformers' `tokenizer(text, add_special_tokens=False)`.
        """
        return self.vocabulary.encode_rendered(text, plain)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids, skipping control tokens; each invalid UTF-8 byte becomes U+FFFD."""
        decoder = self.stream()
        return "".join([decoder.push(i) for i in ids]) + decoder.flush()

    def stream(self, after: Sequence[int] = ()) -> StreamDecoder:
        """Return an incremental decoder for ids that follow the ids `after`.

        SentencePiece puts a space before the first word of a text, and decoding drops it. The space is kept if
        `after` ends in text, since the next word is then not the first.
        """
        return StreamDecoder(self.vocabulary.surface, self.vocabulary.drops_first_space and self.is_start(after))

    def is_start(self, after: Sequence[int]) -> bool:
        """Return whether text after these ids is the start of a text: they are none, or end in a control token."""
        return not after or self.is_control(after[-1])

    @cached_property
    def tool_syntax(self) -> ToolSyntax:
        """How the model writes tool calls: as its chat template says, else after [TOOL_CALLS] if there is one."""
        tagged = self.chat is not None and self.chat.tags_tool_calls
        names = (OPENING, CLOSING) if tagged else ("[TOOL_CALLS]", "")
        found = [self.vocabulary.find(name) for name in names]
        begin, end = (i if i in self.vocabulary.markup else None for i in found)
        return ToolSyntax(begin, end, tagged)

    def is_control(self, token: int) -> bool:
        """Return whether an id has no text: control tokens, and ids beyond the vocabulary."""
        return self.surface(token) is None

    def piece(self, token: int) -> str:
        """Return an id for display: " the", "[INST]", "<0xE2>", "<unused_32005>" if there is no such token."""
        surface = self.surface(token)
        if isinstance(surface, str):
            return surface.replace(SPACE, " ")
        if surface is None:
            name = self.vocabulary.names[token] if token < self.vocab_size else ""
            return name or f"<unused_{token}>"
        try:
            return surface.decode()
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in surface)

    def piece_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes that one id adds to a text; empty for control tokens."""
        surface = self.surface(token)
        if isinstance(surface, str):
            return surface.replace(SPACE, " ").encode()
        return surface or b""

    def surface(self, token: int) -> str | bytes | None:
        """Return the piece (with SPACE for spaces), bytes, or None for an id without text.

        Control tokens have no text, nor do ids beyond the vocabulary, which a model with added or padding tokens
        may emit. Raises TokenizerError for a negative id.
        """
        return self.vocabulary.surface(token)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        labels: Sequence[str] | None = None,
    ) -> list[int]:
        """Encode a conversation up to the assistant's next message, with BOS as the template has it.

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
    ) -> tuple[list[int], int | None]:
        """Return the ids of encode_chat, and how many belong to a continued assistant message.

        The number is None if that message begins within a token.
        """
        if self.chat is None:
            raise no_template(self.path.parent)
        return self.chat.encode(messages, tools, labels)

    def encode_history(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Encode a conversation as the beginning of a longer one: no message of the assistant is begun after it.

        Behind an answer stand the token that ends it, and what the template writes after that.
        """
        if self.chat is None:
            raise no_template(self.path.parent)
        return self.chat.encode_history(messages, tools)


def _gguf_model(path: pathlib.Path) -> pathlib.Path:
    """Return the GGUF file whose model a folder opens as, or whose tokenizer is its only one; else the path."""
    if not path.is_dir():
        return path
    groups = weight_groups(entry.name for entry in path.iterdir())
    if groups and groups[0].entry_file.endswith(".gguf"):
        return path / groups[0].entry_file
    inside = [f for f in path.glob("*.gguf") if is_gguf(f) and first_part(f) == f]
    return inside[0] if len(inside) == 1 and not _has_files(path) else path


def _has_files(folder: pathlib.Path) -> bool:
    """Return whether a folder has a vocabulary in files of its own."""
    return sentencepiece_file(folder) is not None or (folder / FAST).is_file()
