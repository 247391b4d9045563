"""Chat formats: conversations to token ids.

MistralChat     mistral-common's templates, for Mistral's own releases
TemplateChat    a fine-tune's own chat template, over any vocabulary

version   releases                 a chat with a system prompt becomes
v1        7B v0.1, v0.2            <s>[INST] system\\n\\nuser [/INST]answer</s>   markers are plain text
v3        7B v0.3                  <s>[INST] system\\n\\nuser[/INST] answer</s>   markers are control tokens
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

from mistral_common.protocol.instruct.normalize import get_normalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Tool
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
from mistral_common.tokens.tokenizers.base import TokenizerVersion
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from ..checkpoint.gguf.chat_templates import template_version
from ..errors import TokenizerError
from .chat_template import ChatTemplate
from .conversation import Messages
from .messages import MISTRAL_COMMON_ERRORS, TEMPLATES, label, plain_messages, read_messages, reason
from .template_choice import find_template, mistral_version
from .tool_calls import OPENING
from .vocabularies.contract import SPACE, Vocabulary
from .vocabularies.files import TokenizerSettings
from .vocabularies.sentencepiece import SentencePieceVocabulary, open_pieces

Tools = Sequence[Mapping[str, Any]] | None
# ids, and how many at the end are a continued answer (None: no whole number)
Encoded = tuple[list[int], int | None]


class ChatFormat(Protocol):
    """What encodes conversations for a tokenizer.

    name     where the template comes from, for people
    version  of Mistral's template; None for another one
    """

    name: str
    version: str | None

    def encode(self, messages: Messages, tools: Tools, labels: Sequence[str] | None) -> Encoded:
        """Encode a conversation up to the assistant's next message: see Tokenizer.encode_chat_with_prefix."""

    def encode_history(self, messages: Messages, tools: Tools) -> list[int]:
        """Encode a conversation as it stands, which may end with an answer: see Tokenizer.encode_history."""

    def turn_end(self) -> str | None:
        """Return the spelling of the token that ends a turn; None if there is none but EOS."""

    @property
    def source(self) -> str | None:
        """The Jinja text of the template; None for mistral-common's, which have none."""

    @property
    def supports_tools(self) -> bool:
        """Whether the template has a place for tools."""

    @property
    def supports_system(self) -> bool:
        """Whether the template has a place for a system message."""

    @property
    def tags_tool_calls(self) -> bool:
        """Whether the model writes each tool call between tags, <tool_call> and </tool_call>."""


class MistralChat:
    """The chat template of a Mistral release: `path` is its SentencePiece file, `controls` its control tokens."""

    def __init__(self, path: pathlib.Path, version: str, controls: frozenset[str]) -> None:
        if version not in TEMPLATES:
            raise TokenizerError(
                f"no chat template {version!r}; known are {', '.join(TEMPLATES)}", field="version"
            )
        if version != "v1" and not controls.issuperset(("[INST]", "[/INST]")):
            raise TokenizerError(
                f"has no control tokens [INST] and [/INST]: it cannot be {version}", field="version", place=path
            )
        self.version: str | None = version
        self.name = f"mistral-{version}, by mistral-common"
        self._named = version
        self._pieces = open_pieces(path, version)
        if self._pieces.bos_id < 0 or self._pieces.eos_id < 0:
            raise TokenizerError("defines no beginning or end of sequence (<s>, </s>)", place=path)
        self._chat = self._template(ValidationMode.test)
        self.source: str | None = None
        self.supports_tools, self.supports_system = version != "v1", True
        self.tags_tool_calls = False

    def _template(self, mode: ValidationMode) -> MistralTokenizer:
        version = TokenizerVersion(self._named)
        return MistralTokenizer(
            TEMPLATES[self._named](self._pieces), get_validator(version, mode=mode), get_normalizer(version)
        )

    def turn_end(self) -> None:
        """Return None: EOS ends a turn."""

    def encode(self, messages: Messages, tools: Tools, labels: Sequence[str] | None) -> Encoded:
        """Encode a conversation. Consecutive assistant messages count as one, as mistral-common joins them."""
        return self._encode(self._chat, messages, tools, labels)

    def encode_history(self, messages: Messages, tools: Tools) -> list[int]:
        """Encode a conversation; EOS ends an answer."""
        return self._encode(self._any_end, messages, tools, None)[0]

    @cached_property
    def _any_end(self) -> MistralTokenizer:
        """The same template, which accepts any last role."""
        return self._template(ValidationMode.agnostic)

    def _encode(
        self, template: MistralTokenizer, messages: Messages, tools: Tools, labels: Sequence[str] | None
    ) -> tuple[list[int], int]:
        if tools and self.version == "v1":
            raise TokenizerError("this tokenizer (v1) does not support tools; Mistral 7B v0.3 does", field="tools")
        chat = read_messages(messages, self._named, labels)
        if not any(m.role == "user" for m in chat):
            raise TokenizerError("the conversation has no message with role 'user' to answer", field="messages")
        try:
            validated_tools = [Tool.from_openai(dict(t)) for t in tools or ()] or None
            if validated_tools:
                self._chat._chat_completion_request_validator._validate_tools(validated_tools)
        except MISTRAL_COMMON_ERRORS as e:
            raise TokenizerError(f"tools: {reason(e)}", field="tools") from e
        try:
            return self._apply(template, chat, validated_tools)
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
        for i in range(len(chat)):
            try:
                self._apply(self._any_end, chat[: i + 1], None)
            except MISTRAL_COMMON_ERRORS:
                return i
        return len(chat) - 1


class TemplateChat:
    """A fine-tune's own template: what it renders is encoded with its control tokens, as transformers does.

    BOS is where the template writes it.
    """

    version: str | None = None

    def __init__(self, vocabulary: Vocabulary, template: ChatTemplate) -> None:
        self._vocabulary, self._template = vocabulary, template
        self.name = template.name

    @property
    def source(self) -> str:
        return self._template.source

    @property
    def supports_tools(self) -> bool:
        return self._template.supports_tools

    @property
    def supports_system(self) -> bool:
        return self._template.supports_system

    @property
    def tags_tool_calls(self) -> bool:
        return OPENING in (self._template.tool_use or self._template).source

    def turn_end(self) -> str | None:
        """Return the control token that the template writes after an answer."""
        return self._template.turn_end()

    def encode(self, messages: Messages, tools: Tools, labels: Sequence[str] | None) -> Encoded:
        """Encode a conversation; the last message is continued if it has "prefix": True."""
        chat = plain_messages(messages, labels)
        continued = bool(chat[-1].pop("prefix", False))
        rendered = self._template.render(
            chat, tools or None, add_generation_prompt=not continued, continue_final=continued
        )
        ids = self._vocabulary.encode_rendered(rendered.text, rendered.plain)
        return ids, self._tokens_of(chat[-1]["content"], ids) if continued else 0

    def encode_history(self, messages: Messages, tools: Tools) -> list[int]:
        """Encode a conversation that is rendered without a generation prompt."""
        rendered = self._template.render(plain_messages(messages), tools or None, add_generation_prompt=False)
        return self._vocabulary.encode_rendered(rendered.text, rendered.plain)

    def _tokens_of(self, answer: str, ids: list[int]) -> int | None:
        """Return how many tokens at the end of `ids` are `answer`; None if its beginning is within a token.

        The space that a first word is encoded with is not part of it.
        """
        wanted, text = answer.encode(), b""
        for n, token in enumerate(reversed(ids)):
            if text == wanted or (self._vocabulary.drops_first_space and text == b" " + wanted):
                return n
            surface = self._vocabulary.surface(token)
            if surface is None or len(text) > len(wanted):
                return None
            text = (surface.replace(SPACE, " ").encode() if isinstance(surface, str) else surface) + text
        return None


def chat_format(
    folder: pathlib.Path, vocabulary: Vocabulary, name: str | os.PathLike[str] | None = None
) -> ChatFormat | None:
    """Return the chat format of a folder, or the one that `name` says; None if the folder brings none.

    mistral-common encodes the chats of Mistral's own releases. A folder without a template has
    its format if its vocabulary has [INST] as a control token, or if it has no tokenizer_config.json, where the
    template would be, as in Mistral's layout.
    """
    own = isinstance(vocabulary, SentencePieceVocabulary) and not vocabulary.added
    choice = find_template(folder, None if name is None else os.fspath(name))
    if choice is None:
        bare = not (folder / "tokenizer_config.json").is_file()
        if isinstance(vocabulary, SentencePieceVocabulary) and own:
            return mistral_chat(vocabulary) if bare or "[INST]" in vocabulary.markup_names() else None
        return None
    if choice.mistral is not None:
        if not isinstance(vocabulary, SentencePieceVocabulary):
            raise TokenizerError(
                f"mistral-{choice.mistral} needs a SentencePiece vocabulary (tokenizer.model)",
                field="chat_template",
                place=vocabulary.path,
            )
        return mistral_chat(vocabulary, choice.mistral)
    template = choice.load(_special(folder, vocabulary), vocabulary.markup_names())
    if name is None and own:
        assert isinstance(vocabulary, SentencePieceVocabulary)
        if (version := mistral_version(vocabulary.names, template, folder)) is not None:
            return mistral_chat(vocabulary, version)
    return TemplateChat(vocabulary, template)


def mistral_chat(vocabulary: SentencePieceVocabulary, version: str | None = None) -> MistralChat:
    """Return Mistral's template of this version, or of the one that the vocabulary tells."""
    controls, path = vocabulary.markup_names(), vocabulary.path
    return MistralChat(path, version or template_version(controls, path.name), controls)


def _special(folder: pathlib.Path, vocabulary: Vocabulary) -> dict[str, str]:
    """Return the spellings of bos_token, eos_token..., as transformers gives them to templates."""
    ids = {"bos_token": vocabulary.bos_id, "eos_token": vocabulary.eos_id, "unk_token": vocabulary.unk_id}
    known = {name: vocabulary.names[i] for name, i in ids.items() if i is not None}
    return known | TokenizerSettings(folder).named
