"""The chat template of a model: Jinja that turns a conversation into text, as transformers renders it.

    messages, tools  ->  text, and the spans of it that spell a control token but are none  ->  token ids

Rendering is sandboxed and limited (template_sandbox.py), and text of a conversation never becomes a control token
(template_marks.py). Which template a model brings: template_choice.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from ..errors import TokenizerError
from .conversation import Conversation, Messages, copied, plain
from .template_marks import Marks

if TYPE_CHECKING:
    import jinja2

RESERVED = frozenset(("messages", "tools", "add_generation_prompt"))


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
        conversation = Conversation(
            copied(messages),
            plain(list(tools), "tools") if tools is not None else None,
            plain(dict(extra), "chat_template_kwargs"),
            add_generation_prompt and not continue_final,
        )
        if any(isinstance(m.get("content"), list) for m in conversation.messages) and not self.supports_parts:
            conversation = conversation.joined()
        rendered = self._rendered(conversation, continue_final)
        if tools and not self.supports_tools:
            raise TokenizerError(
                "this model's chat template has no place for tools", field="tools", place=self.name
            )
        return rendered

    def _rendered(self, conversation: Conversation, continue_final: bool) -> Rendered:
        """Render the first of these forms that the template takes, with what it met in the first for an error.

        Arguments of tool calls as objects, then as given; each also with what OpenAI's API allows to leave out.
        """
        usual = conversation.parsed()
        forms, error = [usual, conversation, usual.completed(), conversation.completed()], None
        for i, form in enumerate(forms):
            if form not in forms[:i]:
                try:
                    return self._marked(form, continue_final)
                except TokenizerError as e:
                    error = error or e
        assert error is not None
        raise error

    def _marked(self, conversation: Conversation, continue_final: bool) -> Rendered:
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

    def _run(self, conversation: Conversation, mark: str, end: str, probe: bool = False) -> str:
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
        conversation = Conversation(copied(messages), plain(tools, "tools"), {}, **options)
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
