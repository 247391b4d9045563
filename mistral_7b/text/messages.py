"""Convert conversations of the OpenAI API to mistral-common's messages; chat templates.

mistral-common's own converter rejects null fields and ids such as "call_6kZ...". This one accepts what clients
send: missing and null fields, list content, any ids, and tool results without a name.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.chunk import TextChunk
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.tool_calls import FunctionCall, ToolCall
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from mistral_common.tokens.tokenizers.instruct import (
    InstructTokenizerV1,
    InstructTokenizerV2,
    InstructTokenizerV3,
    InstructTokenizerV7,
)
from pydantic import ValidationError

from ..errors import TokenizerError

# Exceptions of mistral-common; SentencePiece raises RuntimeError for text that is not valid UTF-8.
MISTRAL_COMMON_ERRORS = (MistralCommonException, ValueError, AssertionError, RuntimeError)


def read_messages(
    messages: Sequence[Mapping[str, Any]], version: str, labels: Sequence[str] | None = None
) -> list[Any]:
    """Convert OpenAI's dictionaries to mistral-common's messages.

    Raises TokenizerError naming the invalid message (see `label`).
    """
    return _Converter(version).convert(messages, labels)


def plain_messages(
    messages: Sequence[Mapping[str, Any]], labels: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Copy OpenAI's messages for a chat template of Jinja: text parts become one text, developer becomes system.

    Everything else stays as it was given. Raises TokenizerError naming the invalid message (see `label`).
    """
    return _each(messages, labels, lambda i, message, last: _plain(message, last))


def _each(
    messages: Sequence[Mapping[str, Any]],
    labels: Sequence[str] | None,
    read: Callable[[int, Mapping[str, Any], bool], Any],
) -> list[Any]:
    """Return read(index, message, whether it is the last) of each message. Errors name the message."""
    if isinstance(messages, (str, Mapping)) or not messages:
        raise TokenizerError(
            "messages must be a list of at least one {'role': ..., 'content': ...}", field="messages"
        )
    out = []
    for i, message in enumerate(messages):
        try:
            out.append(read(i, message, i + 1 == len(messages)))
        except TokenizerError as e:
            name = label(labels, i)
            field = f"{name}.{e.field}" if e.field else name
            raise TokenizerError.of(e, message=f"{name}: {e.message}", field=field) from e
        except (*MISTRAL_COMMON_ERRORS, KeyError, TypeError) as e:
            name = label(labels, i)
            raise TokenizerError(f"{name}: {reason(e)}", field=name) from e
    return out


def _plain(message: Mapping[str, Any], last: bool) -> dict[str, Any]:
    """Copy one message. TokenizerError names its invalid field."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        field = "role" if isinstance(message, Mapping) else None
        raise TokenizerError(f"must be a dictionary with a role, not {message!r:.80}", field=field)
    copy = dict(message)
    content = _content(copy.get("content"))
    if isinstance(content, list):
        copy["content"] = "\n".join(chunk.text for chunk in content)
    if copy["role"] == "developer":
        copy["role"] = "system"
    if content is None and copy["role"] in ("system", "user"):
        raise TokenizerError(f"a message with role {copy['role']!r} needs content", field="content")
    if content is None and copy["role"] == "assistant" and not copy.get("tool_calls"):
        copy["content"] = ""  # an empty answer
    if not copy.get("prefix"):
        copy.pop("prefix", None)
    elif not last:
        raise TokenizerError('only the last message can have "prefix": true', field="prefix")
    elif copy["role"] != "assistant" or not copy.get("content"):
        raise TokenizerError("an answer to continue needs the role assistant and content", field="content")
    return copy


def label(labels: Sequence[str] | None, index: int) -> str:
    """Return the name of a message in errors: its label if there are labels, else its index."""
    return labels[index] if labels is not None else f"messages[{index}]"


def tool_call_id(name: str) -> str:
    """Return a tool call id in the form of Mistral's templates: 9 letters or digits.

    An id in this form is unchanged. Any other id ("call_6kZ...") is hashed, so that a call and its result match
    and a conversation sent again encodes to the same tokens.
    """
    if re.fullmatch("[a-zA-Z0-9]{9}", name):
        return name
    number = int.from_bytes(hashlib.sha256(name.encode()).digest())
    alphabet = string.ascii_letters + string.digits
    return "".join(alphabet[number // 62**i % 62] for i in range(9))


class _Converter:
    """Converter for the messages of one conversation."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.open_calls: list[ToolCall] = []  # calls of the last assistant message without a result

    def convert(self, messages: Sequence[Mapping[str, Any]], labels: Sequence[str] | None) -> list[Any]:
        return _each(messages, labels, self._checked)

    def _checked(self, index: int, message: Mapping[str, Any], last: bool) -> Any:
        converted = self._message(index, message, last)
        if message.get("prefix") and not last:
            raise TokenizerError('only the last message can have "prefix": true', field="prefix")
        return converted

    def _message(self, index: int, message: Mapping[str, Any], last: bool) -> Any:
        if not isinstance(message, Mapping) or "role" not in message:
            field = "role" if isinstance(message, Mapping) else None
            raise TokenizerError(f"must be a dictionary with a role, not {message!r:.80}", field=field)
        role, content = message["role"], _content(message.get("content"))
        if role == "assistant":
            calls = [self._call(f"{index}.{k}", c) for k, c in enumerate(message.get("tool_calls") or ())]
            self.open_calls = list(calls)
            if calls:  # Mistral's templates drop text beside tool calls
                content = None
            if not calls and not content:
                if last or message.get("prefix"):
                    raise TokenizerError("an assistant's message needs content or tool_calls", field="content")
                content = [TextChunk(text="")]  # an empty answer; mistral-common refuses ""
            return AssistantMessage(
                content=content, tool_calls=calls or None, prefix=bool(message.get("prefix", False))
            )
        if content is None:
            raise TokenizerError(f"a message with role {role!r} needs content", field="content")
        if role == "tool":
            return self._result(message, content)
        if role == "user":
            return UserMessage(content=content)
        if role in ("system", "developer"):
            return SystemMessage(content=content)
        raise TokenizerError(
            f"unknown role {role!r}; must be one of system, developer, user, assistant, tool", field="role"
        )

    def _call(self, default_id: str, call: Mapping[str, Any]) -> ToolCall:
        if self.version == "v1":
            raise TokenizerError(
                "this tokenizer (v1) does not support tool calls; Mistral 7B v0.3 does", field="tool_calls"
            )
        try:
            function = call["function"]
            name, arguments = function["name"], _arguments(function.get("arguments"))
        except KeyError as e:
            raise TokenizerError(f"field {e} of a tool call is missing", field="tool_calls") from e
        return ToolCall(
            id=tool_call_id(call.get("id") or default_id), function=FunctionCall(name=name, arguments=arguments)
        )

    def _result(self, message: Mapping[str, Any], content: Any) -> ToolMessage:
        """Convert a tool result; without an id it belongs to the first call without a result."""
        given = message.get("tool_call_id")
        if not given and not self.open_calls:
            raise TokenizerError("a tool's message needs a tool_call_id", field="tool_call_id")
        name = tool_call_id(given) if given else self.open_calls[0].id
        call = next((c for c in self.open_calls if c.id == name), None)
        if call is not None:
            self.open_calls.remove(call)
        known = call.function.name if call is not None else None  # the v2 template writes the name
        return ToolMessage(content=content, tool_call_id=name, name=message.get("name") or known)


def _arguments(given: Any) -> Any:
    """Return the arguments of a call; null, "null" and blank text become an empty object.

    An object encoded twice is decoded once. Other text is unchanged and may be invalid JSON: the call may have
    been truncated.
    """
    text = given
    while isinstance(text, str):
        try:
            value = json.loads(text) if text.strip() else None
        except ValueError:
            return given
        if value is None:
            return "{}"
        if isinstance(value, dict):
            return text
        text = value
    return given


def _content(content: Any) -> Any:
    """Return text or text chunks. TokenizerError for parts other than text."""
    if isinstance(content, str):
        try:
            content.encode()  # rejects lone surrogates with a clear message
        except UnicodeEncodeError as e:
            raise TokenizerError(str(e), field="content") from e
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise TokenizerError(
            f"content must be a string or a list of parts, not {type(content).__name__}", field="content"
        )
    for i, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise TokenizerError(
                f"content part of type {kind!r}: Mistral 7B supports text only", field=f"content[{i}]"
            )
        if not isinstance(part.get("text"), str):
            told = "must be a text" if "text" in part else "is missing"
            raise TokenizerError(f"content[{i}].text {told}", field=f"content[{i}].text")
    return [TextChunk(text=part["text"]) for part in content]


def reason(error: Exception) -> str:
    """Return the message of a mistral-common or pydantic exception on one line."""
    if isinstance(error, KeyError):
        return f"field {error} is missing"
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    return " ".join(str(error).split()) or type(error).__name__


class _Undecoded:
    """A template that does not decode its tokens, as mistral-common does with every conversation it encodes."""

    def decode(
        self, tokens: list[int], special_token_policy: SpecialTokenPolicy = SpecialTokenPolicy.IGNORE
    ) -> str:
        return ""


class _V1(_Undecoded, InstructTokenizerV1):
    """The v1 template, except that an answer may be empty: the end of the sequence alone, as a model writes it."""

    def encode_assistant_message(self, message: AssistantMessage, is_before_last_user_message: bool) -> list[int]:
        if not message.content and not message.tool_calls:
            return [] if message.prefix else [self.tokenizer.eos_id]
        return super().encode_assistant_message(message, is_before_last_user_message)


class _V2(_Undecoded, InstructTokenizerV2):
    """The v2 template, except that an answer may be empty, and that a continued one keeps its trailing spaces.

    mistral-common strips trailing spaces from every answer, as in training. A continued answer must match the text
    to which the client appends the continuation.
    """

    def encode_assistant_message(self, message: AssistantMessage, is_before_last_user_message: bool) -> list[int]:
        if not message.content and not message.tool_calls:
            return [] if message.prefix else [self.tokenizer.eos_id]
        return super().encode_assistant_message(message, is_before_last_user_message)

    def _encode_normal_content_assistant_message(self, message: AssistantMessage) -> list[int]:
        if message.prefix and isinstance(message.content, str):
            return self.tokenizer.encode(message.content, bos=False, eos=False)
        return super()._encode_normal_content_assistant_message(message)


class _V3(_V2, InstructTokenizerV3):
    """The v3 template, with the same exceptions."""


class _V7(_V2, InstructTokenizerV7):
    """The v7 template, with the same exceptions."""


TEMPLATES = {"v1": _V1, "v2": _V2, "v3": _V3, "v7": _V7}
