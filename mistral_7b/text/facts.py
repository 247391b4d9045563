"""What a model's tokenizer and chat template are, for people and for JSON. Imports no torch."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable

from typing_extensions import TypedDict  # pydantic requires it before Python 3.12

from .tokenizer import Tokenizer

NO_TEMPLATE = "no chat template: choose one with --chat-template"


class End(TypedDict):
    id: int
    token: str


class ChatFacts(TypedDict):
    """`name` is the template's file or name."""

    name: str
    tools: bool
    system: bool


class TokenizerFacts(TypedDict):
    """`added_tokens` are those outside of the base vocabulary, `ends` those that end a generation.

    `chat` is None for a model without a chat template.
    """

    kind: str
    file: str
    vocab_size: int
    added_tokens: int
    ends: list[End]
    chat: ChatFacts | None


def tokenizer_facts(tokenizer: Tokenizer, ends: Iterable[int] = ()) -> TokenizerFacts:
    """Describe a tokenizer; `ends` are further ids that end a generation. Files are named without folders."""
    path, gguf = tokenizer.path, tokenizer.gguf
    chat: ChatFacts | None = None
    if (template := tokenizer.chat) is not None:
        place = pathlib.PurePath(template.name)
        name = "tokenizer.chat_template" if gguf and place.parent == path.parent else place.name
        chat = {"name": name, "tools": template.supports_tools, "system": template.supports_system}
    return {
        "kind": tokenizer.vocabulary.kind,
        "file": (gguf or path).name,
        "vocab_size": tokenizer.vocab_size,
        "added_tokens": tokenizer.vocabulary.added_size,
        "ends": [{"id": i, "token": tokenizer.piece(i)} for i in sorted(tokenizer.stop_ids.union(ends))],
        "chat": chat,
    }  # fmt: skip
