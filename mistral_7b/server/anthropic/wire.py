"""Conversion of Anthropic's requests to OpenAI's message format.

    Anthropic                                   OpenAI format, as text/messages.py reads it
    system                                      a first message with role system
    user: [tool_result ..., text ...]           a tool message for each result, then a user message
    assistant: [text ..., tool_use ...]         one assistant message; only its calls, if there are any
    assistant, as the last message              "prefix": True: it is continued, trailing whitespace included
    thinking, redacted_thinking                 nothing
    tool {name, input_schema}                   {"type": "function", "function": {name, parameters}}
    tool that Anthropic's servers run           nothing; an error if `tool_choice` forces it

Mistral's template supports neither text next to tool calls nor `is_error`, nor a system turn after a user's. The
text is dropped, as Mistral's own template does, the result of a failed call gets the prefix "Error: ", and a
system turn after a user's, or at the end, becomes a part of the user's.

The billing header rule: a line `x-anthropic-billing-header: ...` at the beginning of a system text is left out.
Claude Code sends it with a hash that changes from request to request. In the prompt it would give every request
another first page, and no request would hit the prefix cache.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import TokenizerError
from .bodies import (
    AnyChoice,
    Block,
    Conversing,
    NamedChoice,
    NoChoice,
    TextBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from .bodies import CountRequest as CountRequest
from .bodies import MessagesRequest as MessagesRequest

BILLING = re.compile(r"\s*x-anthropic-billing-header:[^\n]*\n*", re.IGNORECASE)


class ConversationError(TokenizerError):
    """A conversation that breaks Anthropic's rules."""


@dataclass
class Conversation:
    """Messages in OpenAI's format. Each label names the field of the request that the message comes from."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)

    def add(self, label: str, message: Mapping[str, Any]) -> None:
        self.messages.append(dict(message))
        self.labels.append(label)


def conversation(request: Conversing) -> Conversation:
    """Convert the conversation of a request. ConversationError names a message that breaks Anthropic's rules."""
    out = Conversation()
    system = [TextBlock(type="text", text=_without_billing(block.text)) for block in request.system or ()]
    if system := [block for block in system if block.text]:
        out.add("system", {"role": "system", "content": _text(system)})
    called: set[str] = set()  # ids of the last assistant turn's calls that have no result yet
    for i, message in enumerate(request.messages):
        origin = f"messages[{i}]"
        role, blocks = message.role, message.content
        if role == "assistant":
            called = _add_assistant(out, origin, blocks)
            continue
        if not blocks:
            raise ConversationError(f"{origin} has no content", field=f"{origin}.content")
        before = out.messages[-1]["role"] if out.messages else None
        if role == "system" and (
            before == "user" or (before in ("assistant", "tool") and i + 1 == len(request.messages))
        ):
            role = "user"
        called -= _add_user(out, origin, role, blocks, called)
    last = out.messages[-1] if out.messages else {}
    if last.get("role") == "assistant" and not called and not any(_texts(last["content"])):
        out.messages.pop()  # nothing to continue: the answer begins there
        out.labels.pop()
    elif last.get("role") == "assistant":
        if called:
            raise ConversationError(
                f"{out.labels[-1]} calls tools: their results must follow", field=out.labels[-1]
            )
        out.messages[-1]["prefix"] = True
    return out


def _add_assistant(out: Conversation, origin: str, blocks: Sequence[Block]) -> set[str]:
    """Add an assistant turn; return the ids of its calls."""
    calls = [b for b in blocks if isinstance(b, ToolUseBlock)]
    if any(isinstance(b, ToolResultBlock) for b in blocks):
        raise ConversationError(f"{origin}: a tool_result requires the role user", field=origin)
    if len({call.id for call in calls}) < len(calls):
        raise ConversationError(f"{origin}: two calls have the same id", field=origin)
    if calls:
        out.add(origin, {"role": "assistant", "tool_calls": [_call(call) for call in calls]})
    else:
        out.add(origin, {"role": "assistant", "content": _text(blocks)})
    return {call.id for call in calls}


def _add_user(out: Conversation, origin: str, role: str, blocks: Sequence[Block], called: set[str]) -> set[str]:
    """Add a user or system turn; return the ids of the calls that it has results for."""
    if any(isinstance(b, ToolUseBlock) for b in blocks):
        raise ConversationError(f"{origin}: a tool_use requires the role assistant", field=origin)
    results = [b for b in blocks if isinstance(b, ToolResultBlock)]
    for result in results:
        if result.tool_use_id not in called or role != "user":
            raise ConversationError(
                f"{origin}: the previous turn has no call with id {result.tool_use_id!r:.80}", field=origin
            )
        out.add(origin, {"role": "tool", "tool_call_id": result.tool_use_id, "content": _result(result)})
    texts = [b for b in blocks if isinstance(b, TextBlock)]
    if texts or not results:
        out.add(origin, {"role": role, "content": _text(texts)})
    return {result.tool_use_id for result in results}


def _without_billing(text: str) -> str:
    """A system text by the billing header rule."""
    header = BILLING.match(text)
    return text[header.end() :] if header else text


def _texts(content: Any) -> list[str]:
    """The texts of a content that `_text` made."""
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def _text(blocks: Sequence[Block]) -> Any:
    """The content of text blocks: a string for one block, otherwise a list."""
    texts = [b.text for b in blocks if isinstance(b, TextBlock)]
    return texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts]


def _result(result: ToolResultBlock) -> Any:
    """The content of a tool result."""
    blocks = result.content or [TextBlock(type="text", text="")]
    if result.is_error:
        blocks = [TextBlock(type="text", text="Error: " + blocks[0].text), *blocks[1:]]
    return _text(blocks)


def _call(block: ToolUseBlock) -> dict[str, Any]:
    arguments = json.dumps(block.input, ensure_ascii=False)
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def offered(request: Conversing) -> list[dict[str, Any]] | None:
    """The tools in OpenAI's format; None if the prompt must not contain any."""
    if not request.own_tools or isinstance(request.tool_choice, NoChoice):
        return None
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name, "description": tool.description or "", "parameters": tool.input_schema,
            },
        }
        for tool in request.own_tools
    ]  # fmt: skip


def chosen(request: Conversing) -> str | dict[str, Any]:
    """`tool_choice` in OpenAI's format."""
    choice = request.tool_choice
    if isinstance(choice, NamedChoice):
        return {"type": "function", "function": {"name": choice.name}}
    if isinstance(choice, AnyChoice):
        return "required"
    return "none" if isinstance(choice, NoChoice) else "auto"


def most_calls(request: Conversing) -> int | None:
    """The maximum number of tool calls in one turn; None: no limit."""
    choice = request.tool_choice
    return 1 if choice is not None and getattr(choice, "disable_parallel_tool_use", False) else None
