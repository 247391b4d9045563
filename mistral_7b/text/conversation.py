"""Conversations as chat templates are given them: in JSON's own types, and in the form that a template takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import TokenizerError
from .template_marks import mapped, mapped_messages, strings_of

REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field, the usual one first

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Conversation:
    """What a template is given: plain JSON data."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    extra: dict[str, Any]
    add_generation_prompt: bool = True
    ended: bool = False  # the last message's content ends with a noncharacter

    def values(self) -> dict[str, Any]:
        return {
            **self.extra,
            "messages": self.messages,
            "tools": self.tools,
            "add_generation_prompt": self.add_generation_prompt,
        }

    def strings(self) -> list[str]:
        return list(strings_of([self.messages, self.tools, self.extra]))

    def mapped(self, change: Any) -> Conversation:
        """Return the conversation with every string changed except known roles and the names of `extra`."""
        extra = {name: mapped(value, change) for name, value in self.extra.items()}
        messages, tools = mapped_messages(self.messages, change), mapped(self.tools, change)
        return replace(self, messages=messages, tools=tools, extra=extra)

    def joined(self) -> Conversation:
        """Return the conversation with lists of text parts as one text each."""
        messages = [
            {**m, "content": "\n".join(p["text"] for p in m["content"])} if _is_text(m.get("content")) else m
            for m in self.messages
        ]
        return replace(self, messages=messages)

    def parsed(self) -> Conversation:
        """Return the conversation with arguments of tool calls that are the text of a JSON object as objects."""
        messages = [
            {**m, "tool_calls": [_parsed(c) for c in m["tool_calls"]]}
            if isinstance(m.get("tool_calls"), list)
            else m
            for m in self.messages
        ]
        return replace(self, messages=messages)

    def completed(self) -> Conversation:
        """Return the conversation with the names of tool results, and what tools have not."""
        calls = [c for m in self.messages for c in m.get("tool_calls") or () if isinstance(c, dict)]
        names = {c.get("id"): (c.get("function") or {}).get("name") for c in calls}
        messages = [
            {"name": names[m.get("tool_call_id")], **m}
            if m.get("role") == "tool" and names.get(m.get("tool_call_id"))
            else m
            for m in self.messages
        ]
        none = {"description": "", "parameters": {"type": "object", "properties": {}}}
        tools = [
            {**t, "function": {**none, **t["function"]}} if isinstance(t.get("function"), dict) else t
            for t in self.tools or ()
        ]
        return replace(self, messages=messages, tools=tools or self.tools)

    def ending(self, end: str) -> Conversation:
        """Return the conversation with `end` after the content of the last message."""
        *before, last = self.messages
        content = last.get("content")
        if isinstance(content, str):
            content = content + end
        elif _is_text(content) and content:
            content = [*content[:-1], {**content[-1], "text": content[-1]["text"] + end}]
        else:
            raise TokenizerError("the last message has no text to continue", field=f"messages[{len(before)}]")
        return replace(self, messages=[*before, {**last, "content": content}], ended=True)


def _parsed(call: Any) -> Any:
    """Return a tool call whose arguments are an object, if they were the text of one."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(text := function.get("arguments"), str):
        return call
    try:
        arguments = plain(json.loads(text), "arguments")
    except (ValueError, RecursionError, TokenizerError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _is_text(content: Any) -> bool:
    """Return whether content is a list of text parts."""
    return isinstance(content, list) and all(
        isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content
    )


def copied(messages: Messages) -> list[dict[str, Any]]:
    """Return a copy of messages without null fields, and with reasoning under each of its names."""
    if isinstance(messages, (str, Mapping)) or not messages:
        raise TokenizerError(
            "messages must be a list of at least one {'role': ..., 'content': ...}", field="messages"
        )
    chat = []
    for i, given in enumerate(messages):
        if not isinstance(given, Mapping):
            raise TokenizerError(f"must be a dictionary with a role, not {given!r:.80}", field=f"messages[{i}]")
        copy = {k: v for k, v in plain(given, f"messages[{i}]").items() if v is not None}
        reasoning = next((copy[key] for key in REASONING if key in copy), None)
        if reasoning is not None:
            copy = {"thinking": reasoning, **copy, "reasoning_content": reasoning}
        chat.append(copy)
    return chat


def plain(value: Any, field: str, depth: int = 0) -> Any:
    """Return a copy made of Python's own types for JSON."""
    if isinstance(value, str):
        try:
            value.encode()  # rejects lone surrogates with a clear message
        except UnicodeEncodeError as e:
            raise TokenizerError(f"{field}: {e}", field=field) from e
        return str(value)
    if value is None or type(value) in (int, float, bool):
        return value
    if depth > 100:
        raise TokenizerError(f"{field} is nested too deeply", field=field)
    if isinstance(value, Mapping):
        if any(isinstance(key, (Mapping, list, tuple)) for key in value):
            raise TokenizerError(f"{field} has a key that is no JSON", field=field)
        return {plain(k, field, depth + 1): plain(v, field, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, field, depth + 1) for v in value]
    for kind in (int, float):  # enumerations and the like
        if isinstance(value, kind):
            return kind(value)
    raise TokenizerError(f"{field} holds {type(value).__name__}, which is no JSON", field=field)
