"""Conversion of a Responses request to a chat request. Imports no torch.

    Responses                                     chat
    instructions                                  a first message with role system
    message items                                 messages; an assistant's without text is left out
    function_call items, one after another        the tool calls of one assistant message
    function_call_output                          a tool message
    reasoning                                     left out
    item_reference                                the item that it names
    {"type": "function", "name", ...}             {"type": "function", "function": {"name", ...}}
    text.format                                   response_format

Tools. Functions can be called, also those in a namespace, which is how Codex sends the tools of MCP servers: the
prompt has the bare name, or namespace__name if that name is taken, and the response names the namespace. All other
tools (web_search, mcp, custom, local_shell, ...) would have to run here or need a model that was trained for them.
Codex and the Agents SDK send such tools with every request and work without them, so they are left out of the
prompt. A `tool_choice` that requires one is refused (400), as is "required" if no function is left.
"""

from __future__ import annotations

import copy
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from ....errors import Mistral7BError
from ...http.errors import HttpError
from ...http.validation import invalid
from ..protocol import ChatRequest
from .wire import MODES, Choice, Item, ResponsesRequest, Tool

PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco"}
SAME = (
    "model", "temperature", "top_p", "seed", "stop", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "priority", "cache_salt", "parallel_tool_calls",
)  # fmt: skip


def fresh(kind: str) -> str:
    """A new id, such as "msg_5cc2..."."""
    return f"{kind}_{uuid.uuid4().hex}"


# ---------------------------------------------------------------------- items


def plain_item(item: Item) -> dict[str, Any]:
    """An item as the API returns it: with an id, a status, and content as a list of parts."""
    out: dict[str, Any] = {"id": item.id or fresh(PREFIXES[item.type]), "type": item.type, "status": "completed"}
    if item.type == "message":
        mine = item.role == "assistant"
        out |= {"role": item.role, "content": [_part(part.value or "", mine) for part in item.content or ()]}
    elif item.type == "function_call":
        out |= {"call_id": item.call_id, "name": item.name, "arguments": item.arguments}
        out |= {} if item.namespace is None else {"namespace": item.namespace}
    else:
        out |= {"call_id": item.call_id, "output": [_part(part.value or "", False) for part in item.output or ()]}
    return out


def _part(text: str, of_assistant: bool) -> dict[str, Any]:
    if of_assistant:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "input_text", "text": text}


def in_prompt(item: Mapping[str, Any]) -> bool:
    """Whether the prompt contains an item: all but an assistant's message without text."""
    return item.get("role") != "assistant" or any(part["text"] for part in item["content"])


@dataclass
class Conversation:
    """Chat messages. Each label names the field of the request that the message comes from."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)

    def add(self, label: str, item: Mapping[str, Any], tools: Tools) -> None:
        """Add an item as `plain_item` returns it."""
        kind = item["type"]
        if kind == "function_call":
            self._call(label, item, tools)
        elif kind == "function_call_output":
            output = _texts(item["output"])
            self._message(label, {"role": "tool", "tool_call_id": item["call_id"], "content": output})
        elif in_prompt(item):
            self._message(label, {"role": item["role"], "content": _texts(item["content"])})

    def _message(self, label: str, message: dict[str, Any]) -> None:
        self.messages.append(message)
        self.labels.append(label)

    def _call(self, label: str, item: Mapping[str, Any], tools: Tools) -> None:
        name = tools.name_of(item["name"], item.get("namespace"))
        call = {"id": item["call_id"], "function": {"name": name, "arguments": item["arguments"]}}
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self._message(label, {"role": "assistant", "content": None})
        self.messages[-1].setdefault("tool_calls", []).append(call)


def _texts(parts: Sequence[Mapping[str, Any]]) -> Any:
    """The content of parts: a text for at most one part, otherwise a list."""
    if len(parts) < 2:
        return parts[0]["text"] if parts else ""
    return [{"type": "text", "text": part["text"]} for part in parts]


# ---------------------------------------------------------------------- tools


class Tools:
    """The functions of a request, with the places where the client wrote them."""

    def __init__(self, tools: Sequence[Tool] | None) -> None:
        self.functions: list[dict[str, Any]] = []  # in chat's format
        self.places: list[str] = []
        self.origins: dict[str, tuple[str, str | None]] = {}  # by name in the prompt: name and namespace
        self._names: dict[tuple[str, str | None], str] = {}
        listed = [(f"tools[{i}]", tool, None) for i, tool in enumerate(tools or ())]
        nested = [
            (f"{place}.tools[{k}]", inner, tool.name)
            for place, tool, _ in listed if tool.type == "namespace" for k, inner in enumerate(tool.tools or ())
        ]  # fmt: skip
        for place, tool, namespace in (*listed, *nested):
            if tool.type == "function" and tool.name is not None:
                self._add(place, tool, tool.name, namespace)

    def _add(self, place: str, tool: Tool, name: str, namespace: str | None) -> None:
        shown = f"{namespace}__{name}" if namespace is not None and name in self.origins else name
        self.origins[shown], self._names[name, namespace] = (name, namespace), shown
        function = {"name": shown, "description": tool.description, "parameters": tool.parameters}
        self.functions.append({"type": "function", "function": function})
        self.places.append(place)

    def name_of(self, name: str, namespace: str | None) -> str:
        """A function's name in the prompt."""
        return self._names.get((name, namespace), name)

    def choose(self, choice: Choice | None) -> tuple[list[dict[str, Any]], Any]:
        """The functions to offer, and chat's `tool_choice`. HttpError for a choice that cannot be met."""
        if choice is None or choice.type in ("auto", "none"):
            return self.functions, "auto" if choice is None else choice.type
        if choice.type == "function":
            shown = self.name_of(choice.name or "", None)
            return self.functions, {"type": "function", "function": {"name": shown}}
        if choice.type not in ("required", "allowed_tools"):
            raise HttpError(400, f"a tool of type {choice.type!r:.80} cannot be called here", field="tool_choice",
                            hint="define a function")  # fmt: skip
        offered, mode = self.functions, choice.mode or choice.type
        if choice.type == "allowed_tools":
            names = {tool.name for tool in choice.tools or () if tool.type == "function"}
            allowed = [place for place, tool in enumerate(offered) if tool["function"]["name"] in names]
            self.places = [self.places[place] for place in allowed]
            offered = [offered[place] for place in allowed]
        if mode == "required" and not offered:
            raise HttpError(400, "tool_choice requires a call, but there is no function to call",
                            field="tool_choice", hint="define a function")  # fmt: skip
        return offered, mode


# ---------------------------------------------------------------------- the request


def chat_request(body: ResponsesRequest, talk: Conversation, tools: Tools) -> ChatRequest:
    """The chat request of a conversation. HttpError names a field of `body` that is invalid."""
    functions, choice = tools.choose(body.tool_choice)
    chat: dict[str, Any] = {name: getattr(body, name) for name in SAME}
    chat |= {
        "messages": talk.messages, "tools": functions or None, "tool_choice": choice if functions else None,
        "max_completion_tokens": body.max_output_tokens, "response_format": _response_format(body),
    }  # fmt: skip
    if not functions and choice not in MODES:
        raise HttpError(400, f"there is no function {choice['function']['name']!r:.80}", field="tool_choice")
    if body.with_logprobs:
        chat |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    try:
        return ChatRequest.model_validate(chat)
    except ValidationError as e:
        errors = [{**error, "loc": ("body", *error["loc"])} for error in e.errors()]
        raise renamed(invalid(errors, chat), tools) from e


def _response_format(body: ResponsesRequest) -> dict[str, Any] | None:
    wanted = body.text.format if body.text is not None else None
    if wanted is None or wanted.schema_ is None:
        return None if wanted is None else {"type": wanted.type}
    return {"type": "json_schema", "json_schema": {"name": wanted.name or "response", "schema": wanted.schema_}}


NAMES = (
    (re.compile(r"\bstructured_outputs\.json\b|\bresponse_format\.json_schema\.schema\b"), "text.format.schema"),
    (re.compile(r"\bstructured_outputs\b|\bresponse_format\b"), "text.format"),
    (re.compile(r"\bmax_(completion_)?tokens\b"), "max_output_tokens"),
    (re.compile(r"\btools\[(\d+)\](\.function\b)?"), None),
)  # fmt: skip


def renamed(error: Mistral7BError, tools: Tools) -> Mistral7BError:
    """An equal error that names the fields of the client's request instead of those of the chat request."""

    def place(found: re.Match[str]) -> str:
        number = int(found[1])
        return tools.places[number] if number < len(tools.places) else found[0]

    def rename(text: str) -> str:
        for pattern, name in NAMES:
            text = pattern.sub(name or place, text)
        return text

    out = copy.copy(error)  # the original may be cached
    out.message = rename(error.message)
    if error.field is not None:
        out.field = "input" if error.field == "messages" else rename(error.field)
    return out
