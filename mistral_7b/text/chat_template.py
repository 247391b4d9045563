"""The chat template of a model: Jinja that turns a conversation into text, as transformers renders it.

    messages, tools  ->  text, and the spans of it that spell a control token but are none  ->  token ids

Rendering is sandboxed and limited (template_sandbox.py), and text of a conversation never becomes a control token
(template_marks.py). Which template a model brings: template_choice.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from ..errors import TokenizerError
from .template_marks import Marks, mapped, mapped_messages, strings_of

if TYPE_CHECKING:
    import jinja2

REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field, the usual one first
RESERVED = frozenset(("messages", "tools", "add_generation_prompt"))

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation. `plain` are the spans of `text` that spell a control token but are plain text."""

    text: str
    plain: tuple[tuple[int, int], ...] = ()


class ChatTemplate:
    """A compiled chat template.

    `name` says where it comes from; `special` are the spellings of bos_token, eos_token... that the template may
    write; `controls` those of the vocabulary's control tokens. `tool_use` is the template for conversations with
    tools, where a model has one. Raises TokenizerError for a template that cannot be compiled.
    """

    def __init__(
        self,
        source: str,
        *,
        name: str,
        special: Mapping[str, str],
        controls: Collection[str],
        tool_use: ChatTemplate | None = None,
    ) -> None:
        from .template_sandbox import InvalidTemplateError, compiled, strings_in

        self.source, self.name, self.tool_use = source, name, tool_use
        self._special = dict(special)
        self._controls = frozenset((*controls, *special.values()))
        try:
            self._template: jinja2.Template = compiled(source)
            literals, names = strings_in(source)
        except InvalidTemplateError as e:
            line = "" if e.line is None else f" in line {e.line}"
            raise TokenizerError(
                f"the chat template is invalid{line}: {e}", field="chat_template", place=name
            ) from e
        try:
            self._marks = Marks(source, literals, names, self._controls)
        except TokenizerError as e:
            raise TokenizerError.of(e, place=name) from e

    def __repr__(self) -> str:
        return f"ChatTemplate({self.name!r})"

    def render(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        extra: Mapping[str, Any] = {},
    ) -> Rendered:
        """Render a conversation up to the assistant's next message.

        `continue_final` ends the text where the content of the last message ends, blanks included. `extra` are
        further variables of the template. A list of text parts is joined with newlines for a template that takes
        texts only; arguments of a tool call that are JSON text, as in the OpenAI API, become objects. Raises
        TokenizerError for what the template refuses, and for tools that it would drop.
        """
        if tools is not None and self.tool_use is not None:
            return self.tool_use.render(
                messages, tools, add_generation_prompt=add_generation_prompt, continue_final=continue_final,
                extra=extra,
            )  # fmt: skip
        if reserved := RESERVED & extra.keys():
            raise TokenizerError(f"{min(reserved)} is no option of a template", field="chat_template_kwargs")
        conversation = _Conversation(
            _messages(messages),
            _plain(list(tools), "tools") if tools is not None else None,
            _plain(dict(extra), "chat_template_kwargs"),
            add_generation_prompt and not continue_final,
        )
        if any(isinstance(m.get("content"), list) for m in conversation.messages) and not self.supports_parts:
            conversation = conversation.joined()
        rendered = self._with_arguments(conversation, continue_final)
        if tools and not self.supports_tools:
            raise TokenizerError(
                "this model's chat template has no place for tools", field="tools", place=self.name
            )
        return rendered

    def _with_arguments(self, conversation: _Conversation, continue_final: bool) -> Rendered:
        """Render with the arguments of tool calls as objects, and as given if the template takes only texts."""
        parsed = conversation.parsed()
        try:
            return self._marked(parsed, continue_final)
        except TokenizerError:
            if parsed == conversation:
                raise
            try:
                return self._marked(conversation, continue_final)
            except TokenizerError:
                pass  # what the usual form met says more
            raise

    def _marked(self, conversation: _Conversation, continue_final: bool) -> Rendered:
        """Render a conversation with marks in what spells a control token, and read them."""
        marks = self._marks
        mark, end = marks.free(conversation.strings())
        marked = cache(lambda s: marks.spellings(s, mark))  # most borders need no mark: the same text twice
        spelled = conversation.mapped(marked)
        bordered = conversation.mapped(lambda s: marked(marks.borders(s, mark)))
        ordinary, meeting = bordered == conversation, bordered != spelled
        if continue_final:
            spelled, bordered = spelled.ending(end), bordered.ending(end)
        text = self._run(spelled, mark, end)
        if ordinary:
            return Rendered(text)
        read = marks.read(text, mark)
        if meeting:  # only a spelling that came about at a border makes a difference
            other = marks.read(self._run(bordered, mark, end), mark)
            if (other.plain, other.written) != (read.plain, read.written):
                read = other
        return Rendered(read.text, read.plain)

    def _run(self, conversation: _Conversation, mark: str, end: str, probe: bool = False) -> str:
        """Render marked data; the text up to `end`, if that was put into the last message."""
        from .template_sandbox import rendered

        values = {**self._special, "documents": None, **conversation.values()}
        size = sum(map(len, conversation.strings()))
        try:
            text = rendered(self._template, values, size, probe)
        except Exception as e:  # a template is foreign code: its expressions can raise anything
            raise self._failed(e, re.compile(f"[{mark}{end}]")) from e
        if not conversation.ended:
            return text
        at = max(text.rfind(end), text.rfind(f"\\u{ord(end):04x}"))
        if at < 0:
            raise TokenizerError(
                "the chat template does not write the content of the last message, so it cannot be continued",
                field="messages",
                place=self.name,
            )
        return text[:at]

    def _failed(self, error: Exception, marks: re.Pattern[str]) -> TokenizerError:
        from .template_sandbox import LimitError, RefusalError

        text = marks.sub("", " ".join(str(error).split()))[:500] or type(error).__name__
        if isinstance(error, RefusalError):
            message = f"the model's chat template refuses the conversation: {text}"
        elif isinstance(error, LimitError):
            message = f"the chat template was stopped: {text}"
        elif isinstance(error, RecursionError):
            message = "the chat template was stopped: it nests too deeply"
        else:
            message = f"the chat template cannot render this conversation: {text}"
        return TokenizerError(message, field="messages", place=self.name)

    def _probe(self, messages: Messages, tools: Sequence[Mapping[str, Any]] | None = None, **options: Any) -> str:
        """Return the text of a conversation of our own, "" if the template refuses it."""
        conversation = _Conversation(_messages(messages), _plain(tools, "tools"), {}, **options)
        try:
            return self._run(conversation, "\ufdd0", "\ufdd1", probe=True)
        except TokenizerError:
            return ""

    @cached_property
    def supports_tools(self) -> bool:
        """Whether the template, or the one it has for tools, writes the tools of a conversation."""
        if self.tool_use is not None:
            return self.tool_use.supports_tools
        parameters = {"type": "object", "properties": {"probed": {"type": "string", "description": "x"}}}
        function = {"name": "probe_tool", "description": "x", "parameters": parameters}
        tools = [{"type": "function", "function": function}]
        system, user = {"role": "system", "content": "x"}, {"role": "user", "content": "y"}
        return any("probe_tool" in self._probe(m, tools) for m in ([user], [system, user]))

    @cached_property
    def supports_system(self) -> bool:
        """Whether the template writes a system message that precedes the user's."""
        text = self._probe([{"role": "system", "content": "ProbeS"}, {"role": "user", "content": "ProbeU"}])
        return "ProbeS" in text

    @cached_property
    def supports_parts(self) -> bool:
        """Whether the template reads content that is a list of parts; else it would write Python's notation."""
        parts = [{"type": "text", "text": "ProbeU"}]
        text = self._probe([{"role": "user", "content": parts}])
        return "ProbeU" in text and not re.search(r"""['"]text['"]: """, text)

    def turn_end(self) -> str | None:
        """Return the control token that the template writes after an assistant's content, None for none."""
        turn = [{"role": "user", "content": "ProbeU"}, {"role": "assistant", "content": "ProbeA"}]
        _, found, after = self._probe(turn, add_generation_prompt=False).rpartition("ProbeA")
        ends = [c for c in self._controls if c and after.lstrip().startswith(c)]
        return max(ends, key=len) if found and ends else None


@dataclass(frozen=True)
class _Conversation:
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

    def mapped(self, change: Any) -> _Conversation:
        """Return the conversation with every string changed except known roles and the names of `extra`."""
        extra = {name: mapped(value, change) for name, value in self.extra.items()}
        messages, tools = mapped_messages(self.messages, change), mapped(self.tools, change)
        return replace(self, messages=messages, tools=tools, extra=extra)

    def joined(self) -> _Conversation:
        """Return the conversation with lists of text parts as one text each."""
        messages = [
            {**m, "content": "\n".join(p["text"] for p in m["content"])} if _is_text(m.get("content")) else m
            for m in self.messages
        ]
        return replace(self, messages=messages)

    def parsed(self) -> _Conversation:
        """Return the conversation with arguments of tool calls that are the text of a JSON object as objects."""
        messages = [
            {**m, "tool_calls": [_parsed(c) for c in m["tool_calls"]]}
            if isinstance(m.get("tool_calls"), list)
            else m
            for m in self.messages
        ]
        return replace(self, messages=messages)

    def ending(self, end: str) -> _Conversation:
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
        arguments = _plain(json.loads(text), "arguments")
    except (ValueError, RecursionError, TokenizerError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _is_text(content: Any) -> bool:
    """Return whether content is a list of text parts."""
    return isinstance(content, list) and all(
        isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content
    )


def _messages(messages: Messages) -> list[dict[str, Any]]:
    """Return a copy of messages without null fields, and with reasoning under each of its names."""
    if isinstance(messages, (str, Mapping)) or not messages:
        raise TokenizerError(
            "messages must be a list of at least one {'role': ..., 'content': ...}", field="messages"
        )
    chat = []
    for i, given in enumerate(messages):
        if not isinstance(given, Mapping):
            raise TokenizerError(f"must be a dictionary with a role, not {given!r:.80}", field=f"messages[{i}]")
        copy = {k: v for k, v in _plain(given, f"messages[{i}]").items() if v is not None}
        reasoning = next((copy[key] for key in REASONING if key in copy), None)
        if reasoning is not None:
            copy = {"thinking": reasoning, **copy, "reasoning_content": reasoning}
        chat.append(copy)
    return chat


def _plain(value: Any, field: str, depth: int = 0) -> Any:
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
        return {_plain(k, field, depth + 1): _plain(v, field, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, field, depth + 1) for v in value]
    for kind in (int, float):  # enumerations and the like
        if isinstance(value, kind):
            return kind(value)
    raise TokenizerError(f"{field} holds {type(value).__name__}, which is no JSON", field=field)
