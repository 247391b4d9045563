"""A conversation: messages in OpenAI's format, and the file that stores them."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from ..files import atomic_write
from .inputs import UsageError, read_text

Message = dict[str, Any]


class Conversation:
    """Complete turns of a conversation: a question is added together with its answer."""

    def __init__(self, system: str = "") -> None:
        self.system = system
        self.turns: list[Message] = []

    def with_question(self, question: str) -> list[Message]:
        """Return the messages with one more question, without adding it."""
        return [*self.messages, {"role": "user", "content": question}]

    def add_turn(self, question: str, answer: str) -> None:
        self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    @property
    def messages(self) -> list[Message]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.turns]

    def save(self, path: str) -> None:
        """Write `{"messages": [...]}` atomically; only an existing conversation is overwritten.

        UsageError if the file is something else, WriteError if it cannot be written.
        """
        target = pathlib.Path(path).expanduser()
        if target.exists():
            try:
                read_messages(target)
            except UsageError as error:
                raise UsageError.of(error, hint="it is not overwritten; use another name") from error
        text = json.dumps({"messages": self.messages}, ensure_ascii=False, indent=2) + "\n"
        with atomic_write(target) as temporary:
            temporary.touch(mode=0o600)  # readable by its owner only
            temporary.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str) -> Conversation:
        """Read a file written by `save`, or a list of messages. UsageError if roles do not alternate."""
        messages = read_messages(pathlib.Path(path).expanduser())
        conversation = cls()
        if messages and messages[0]["role"] == "system":
            conversation.system, messages = messages[0]["content"], messages[1:]
        for i, message in enumerate(messages):
            expected = "assistant" if i % 2 else "user"
            if message["role"] != expected:
                raise UsageError(f"turn {i + 1} has role {message['role']!r}, not {expected!r}", place=path)
        if len(messages) % 2:
            raise UsageError("the last message has no answer", place=path)
        conversation.turns = messages
        return conversation


def read_messages(path: pathlib.Path) -> list[Message]:
    """Read messages, each with a role and a text, from a JSON file. UsageError for any other content."""
    try:
        data = json.loads(read_text(str(path)))
    except json.JSONDecodeError as error:
        raise UsageError(f"is not JSON: {error}", place=path) from error
    messages = data.get("messages") if isinstance(data, dict) else data
    if not isinstance(messages, list):
        raise UsageError('is not a conversation: it has no list of "messages"', place=path)
    for i, message in enumerate(messages):
        if not (isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))):
            raise UsageError(f'message {i + 1} is not {{"role": text, "content": text}}', place=path)
    return [{"role": m["role"], "content": m["content"]} for m in messages]
