"""The forms of rows of data, recognised by their keys, and the samples that they become.

form          keys                                                        sample
preference    chosen, rejected [, prompt, tools]                          Preference
thumb         label (true or false), completion or messages [, prompt]    Judged
chat          messages [, tools]                                          Chat    OpenAI's, mistral-finetune's
ShareGPT      conversations [, system, tools]                             Chat    turns of from and value
Alpaca        instruction, output [, input, system]                       Chat    of two turns
completion    prompt, completion [, tools]                                Completion or Chat
text          text                                                        Document
prompt        prompt [, tools, anything]                                  Task    for GRPO

A prompt or an answer that is a text is plain text, as `LLM.generate` takes it; messages go through the chat
template, as `LLM.chat` has them. Other keys, such as an id, are ignored, unless they look like a misspelt one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import TrainingError
from .messages import (
    Message,
    answers_of,
    check_spelling,
    judged_messages,
    read_messages,
    read_tools,
    sharegpt_messages,
)

Row = dict[str, Any]
SUPERVISED = frozenset(("lora", "qlora", "full"))


class Document(NamedTuple):
    """A plain text."""

    text: str


class Completion(NamedTuple):
    """A plain text and its continuation."""

    prompt: str
    completion: str


class Chat(NamedTuple):
    """A conversation. `answers` are the indices of the assistant's messages that are trained."""

    messages: list[Message]
    tools: list[Any] | None
    answers: tuple[int, ...]


class Preference(NamedTuple):
    """Two answers to one prompt."""

    chosen: Completion | Chat
    rejected: Completion | Chat


class Judged(NamedTuple):
    """An answer, and whether it is a good one."""

    answer: Completion | Chat
    good: bool


class Task(NamedTuple):
    """A prompt whose answers a reward function judges. `row` is what that function is given."""

    prompt: str | Chat
    row: Row


Sample = Document | Completion | Chat | Preference | Judged | Task


@dataclass(frozen=True)
class Form:
    """A form of rows: its keys, the methods that train on it, and what reads a row of it."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    methods: frozenset[str]
    read: Callable[[Row], Sample]

    def fits(self, row: Row) -> bool:
        """Return whether a row has the keys of this form."""
        return all(key in row for key in self.required)

    def check_keys(self, row: Row) -> None:
        """Raise TrainingError for a key that is no other's, but almost one of this form."""
        check_spelling(row, (*self.required, *self.optional))


def form_of(row: Any, method: str) -> Form:
    """Return the form of a row. TrainingError if there is none, or none that `method` trains on."""
    if not isinstance(row, dict):
        raise TrainingError(f"must be a JSON object, not {_shown(row)}")
    suitable = [form for form in FORMS if method in form.methods]
    found = [form for form in FORMS if form.fits(row) and (method != "grpo" or form in suitable)]
    if not found:
        wanted = sorted({key for form in suitable for key in form.required})
        check_spelling(row, wanted)
        raise TrainingError(f"has the keys {_listed(row)}; {method} takes {_described(suitable)}")
    if found[0] not in suitable:
        other = " or ".join(sorted(found[0].methods))
        raise TrainingError(
            f"is of the form {found[0].name}, which --method {other} takes; {method} takes {_described(suitable)}"
        )
    return found[0]


def _text(row: Row, key: str, *, may_be_blank: bool = False) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise TrainingError(f"{key} must be a text, not {_shown(value)}", field=key)
    if not may_be_blank and not value.strip():
        raise TrainingError(f"{key} is empty", field=key)
    return value


def _read_document(row: Row) -> Document:
    return Document(_text(row, "text"))


def _read_chat(row: Row) -> Chat:
    messages, muted = read_messages(row["messages"], "messages")
    return Chat(messages, read_tools(row), answers_of(messages, muted))


def _read_sharegpt(row: Row) -> Chat:
    turns = sharegpt_messages(row["conversations"])
    if row.get("system") is not None:
        turns.insert(0, {"role": "system", "content": _text(row, "system", may_be_blank=True)})
    messages, muted = read_messages(turns, "conversations")
    return Chat(messages, read_tools(row), answers_of(messages, muted))


def _read_alpaca(row: Row) -> Chat:
    asked, given = _text(row, "instruction"), ""
    if row.get("input") is not None:
        given = _text(row, "input", may_be_blank=True)
    messages = [
        {"role": "user", "content": f"{asked}\n\n{given}" if given.strip() else asked},
        {"role": "assistant", "content": _text(row, "output")},
    ]
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": _text(row, "system")})
    return Chat(messages, None, (len(messages) - 1,))


def _read_completion(row: Row) -> Completion | Chat:
    return _answered(row, "completion")


def _answered(row: Row, key: str) -> Completion | Chat:
    """Return the prompt of a row with the answer that is its `key`."""
    if isinstance(row.get("prompt"), str) and isinstance(row[key], str):
        return Completion(_text(row, "prompt", may_be_blank=True), _text(row, key))
    messages, start = judged_messages(row.get("prompt"), row[key], key)
    return Chat(messages, read_tools(row), answers_of(messages, range(start)))


def _read_preference(row: Row) -> Preference:
    chosen, rejected = _answered(row, "chosen"), _answered(row, "rejected")
    if chosen == rejected:
        raise TrainingError("chosen and rejected are equal: there is nothing to prefer", field="rejected")
    if isinstance(chosen, Completion) and isinstance(rejected, Completion):
        return Preference(chosen, rejected)
    if isinstance(chosen, Completion) or isinstance(rejected, Completion):
        raise TrainingError("chosen and rejected must both be texts, or both messages", field="rejected")
    pairs = zip(chosen.messages, rejected.messages, strict=False)
    common = next((i for i, (one, other) in enumerate(pairs) if one != other), len(rejected.messages))
    sides = []
    for chat, key in ((chosen, "chosen"), (rejected, "rejected")):
        if len(chat.messages) <= common or chat.messages[common]["role"] != "assistant":
            raise TrainingError("chosen and rejected must differ first in an assistant's message", field=key)
        sides.append(chat._replace(answers=answers_of(chat.messages, range(common))))
    return Preference(*sides)


def _read_thumb(row: Row) -> Judged:
    if "messages" in row:
        messages, _ = read_messages(row["messages"], "messages")
        last = answers_of(messages, range(len(messages) - 1))
        return Judged(Chat(messages, read_tools(row), last), row["label"])
    return Judged(_answered(row, "completion"), row["label"])


def _read_task(row: Row) -> Task:
    if isinstance(row["prompt"], str):
        return Task(_text(row, "prompt"), row)
    messages, _ = read_messages(row["prompt"], "prompt")
    if messages[-1]["role"] not in ("user", "tool"):
        raise TrainingError(f"prompt ends with a message of role {messages[-1]['role']!r}", field="prompt")
    return Task(Chat(messages, read_tools(row), ()), row)


class _Thumbs(Form):
    """The form of thumbs: a `label` that is no boolean is a key like any other."""

    def fits(self, row: Row) -> bool:
        return isinstance(row.get("label"), bool) and ("messages" in row or "completion" in row)


class _Prompts(Form):
    """The form of prompts: other keys are the reward function's."""

    def check_keys(self, row: Row) -> None:
        """Every key is allowed."""


FORMS = (
    Form("preference", ("chosen", "rejected"), ("prompt", "tools"), frozenset(("dpo",)), _read_preference),
    _Thumbs("thumb", ("label",), ("prompt", "completion", "messages", "tools"), frozenset(("kto",)), _read_thumb),
    Form("chat", ("messages",), ("tools",), SUPERVISED, _read_chat),
    Form("ShareGPT", ("conversations",), ("system", "tools"), SUPERVISED, _read_sharegpt),
    Form("Alpaca", ("instruction", "output"), ("input", "system"), SUPERVISED, _read_alpaca),
    Form("completion", ("prompt", "completion"), ("tools",), SUPERVISED, _read_completion),
    Form("text", ("text",), (), SUPERVISED, _read_document),
    _Prompts("prompt", ("prompt",), ("tools",), frozenset(("grpo",)), _read_task),
)  # the first that fits is a row's form


def _described(forms: Iterable[Form]) -> str:
    return ", or ".join(f"{form.name} ({', '.join(form.required)})" for form in forms)


def _listed(keys: Collection[str]) -> str:
    return ", ".join(map(repr, keys)) or "none"


def _shown(value: Any) -> str:
    return f"{value!r:.60}"
