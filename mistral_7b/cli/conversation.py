"""A conversation: messages in OpenAI's form, and the file they are kept in."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from ..files import atomic_write
from .inputs import UsageError, read_text

Message = dict[str, Any]


class Conversation:
    """Whole turns only: a question is added together with its answer, so that nothing is left hanging."""

    def __init__(self, system: str = "") -> None:
        self.system = system
        self.turns: list[Message] = []

    def asking(self, question: str) -> list[Message]:
        """The messages with one more question, as the model should see them."""
        return [*self.messages, {"role": "user", "content": question}]

    def answered(self, question: str, answer: str) -> None:
        self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    @property
    def messages(self) -> list[Message]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.turns]

    def save(self, path: str) -> None:
        """Write `{"messages": [...]}`, beside the place and renamed. Only a conversation is written over.

        WriteError if the system does not take it.
        """
        target = pathlib.Path(path).expanduser()
        if target.exists():
            try:
                read_messages(target)
            except UsageError as error:
                raise UsageError.of(error, hint="it is not written over, choose another name") from error
        text = json.dumps({"messages": self.messages}, ensure_ascii=False, indent=2) + "\n"
        with atomic_write(target) as beside:
            beside.touch(mode=0o600)  # a conversation is for its user's eyes
            beside.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str) -> Conversation:
        """Read a file that `save` has written, or a bare list of messages."""
        messages = read_messages(pathlib.Path(path).expanduser())
        conversation = cls()
        if messages and messages[0]["role"] == "system":
            conversation.system, messages = messages[0]["content"], messages[1:]
        for i, message in enumerate(messages):
            wanted = "assistant" if i % 2 else "user"
            if message["role"] != wanted:
                raise UsageError(f"turn {i + 1} has role {message['role']!r} where {wanted!r} is due", place=path)
        if len(messages) % 2:
            raise UsageError("ends with a question: its answer is missing", place=path)
        conversation.turns = messages
        return conversation


def read_messages(path: pathlib.Path) -> list[Message]:
    """The messages in a JSON file, each with a role and a text. UsageError if it holds anything else."""
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
