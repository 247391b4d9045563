"""Incremental parser of tool calls in a model's output.

    mistral   [TOOL_CALLS]  [{"name": "weather", "arguments": {"city": "Rome"}}, ...]  </s>
    tagged    <tool_call>\\n{"name": "weather", "arguments": {"city": "Rome"}}\\n</tool_call>  ...  <|im_end|>

Only the control token starts Mistral's list: text that spells "[TOOL_CALLS]" is content. The tags of Hermes 2 Pro
and others are text in most vocabularies, so that text which may become a tag is held back. A call is emitted once
its name and the first character of its arguments are known; each later token emits a fragment of the arguments.
Concatenated, the fragments are the arguments as written by the model.

Arguments are a JSON object. Null or missing arguments become an empty object. An object encoded as a JSON string,
which some models write, is decoded. Any other arguments are invalid.

A list or block that becomes invalid is content, from the first character after the last emitted fragment. If it is
truncated by the token limit or a stop string, this rest is dropped. Whitespace around blocks is dropped. An "id"
that the model writes after the arguments is ignored, because the call has been emitted with an id by then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .json_text import (
    LITERALS,
    WHITESPACE,
    InvalidError,
    Parser,
    after_space,
    container,
    expect,
    string,
    string_char,
)

OPENING, CLOSING = "<tool_call>", "</tool_call>"
MOST_SPACES = 100  # characters of whitespace that are held back, because a tag may follow


@dataclass(frozen=True)
class ToolSyntax:
    """How a model writes tool calls: in a list after the control token `begin`, or each between tags.

    `tagged`: the tags are text, or the control tokens `begin` and `end` of the same spelling. Without any of these
    all text is content.
    """

    begin: int | None = None
    end: int | None = None
    tagged: bool = False

    @property
    def known(self) -> bool:
        """Whether calls can be told from text."""
        return self.tagged or self.begin is not None


@dataclass
class ToolCall:
    """One call. `id` is 9 letters or digits; `arguments` is the JSON text of an object."""

    index: int
    id: str
    name: str
    arguments: str = ""


@dataclass
class ToolCallDelta:
    """New parts of call `index`: argument fragments; the first delta has `id` and `name`."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class ToolCallStream:
    """Separates content and tool calls in one completion.

    `ids` returns the id of call 0, 1, ... (see messages.tool_call_id). The tokenization of the text affects only
    the bounds of fragments.
    """

    def __init__(self, syntax: ToolSyntax, ids: Callable[[int], str]) -> None:
        self.calls: list[ToolCall] = []  # parsed so far
        self.syntax, self._ids = syntax, ids
        self._list: _CallList | None = None  # the list or block being parsed
        self._spaces = self._tag = ""  # text held back: whitespace, and the beginning of a tag
        self._after_block = False  # with nothing but whitespace in between

    def push(self, token: int, text: str) -> tuple[str, list[ToolCallDelta]]:
        """Add a token and its decoded text; return new content and tool call deltas."""
        deltas: list[ToolCallDelta] = []
        if self._list is None and not self.syntax.tagged:
            content = text
        else:
            content = "".join([self._read(char, deltas) for char in text])
        if token == self.syntax.begin:  # `text` precedes the control token
            content += self.close()[0] if self._list is not None or self._tag else ""
            self._begin(self._spaces)
        elif token == self.syntax.end and self._list is not None:
            content += self.close()[0]
            self._after_block = True
        return content, deltas

    @property
    def held(self) -> str:
        """Text at the end that may belong to a call, and is neither content nor dropped yet."""
        return self._list.raw if self._list is not None else self._spaces + self._tag

    def close(self, cut: bool = False) -> tuple[str, list[ToolCallDelta]]:
        """End the completion; return the rest of an incomplete list or block as content.

        If the completion was `cut` (token limit or stop string), the rest is dropped, and a call counts once its
        name is known.
        """
        calls, self._list = self._list, None
        deltas: list[ToolCallDelta] = []
        if calls is None:
            content = "" if self._after_block and not self._tag else self.held
            self._spaces = self._tag = ""
            return content, deltas
        if not cut:
            return calls.remaining(), deltas
        if calls.name is not None and not calls.emitted:
            self._emit_call(calls.name, deltas)
        return "", deltas

    def _begin(self, raw: str) -> None:
        """Begin a list or block; `raw` is content if it becomes invalid."""
        self._list = _CallList(self.syntax.tagged, raw)
        self._spaces, self._tag, self._after_block = "", "", False

    def _read(self, char: str, deltas: list[ToolCallDelta]) -> str:
        """Add a character; return new content."""
        calls = self._list
        if calls is None:
            return self._search(char) if self.syntax.tagged else char
        ended = calls.ended
        if not calls.push(char):
            self._list = None
            if not (ended and calls.tagged):
                return calls.remaining() + self._read(char, deltas)
            self._after_block = True  # without a closing tag, a block may follow all the same
            return "".join([self._search(c) for c in calls.remaining() + char])
        if calls.closed:
            self._list, self._after_block = None, True
        elif calls.name is not None and calls.fragment:
            if not calls.emitted:
                self._emit_call(calls.name, deltas)
                calls.emitted = True
            self._emit_arguments(calls.fragment, deltas)
            calls.fragment = ""
        return ""

    def _search(self, char: str) -> str:
        """Add a character outside of a block; return what cannot belong to a tag or the whitespace before it."""
        if self._tag + char == OPENING:
            self._begin(self._spaces + OPENING)
            return ""
        if OPENING.startswith(self._tag + char):
            self._tag += char
            return ""
        if not self._tag and char in WHITESPACE and len(self._spaces) < MOST_SPACES:
            self._spaces += char
            return ""
        content, self._spaces, self._tag, self._after_block = self.held, "", "", False
        return content + (self._search(char) if char in OPENING[0] + WHITESPACE else char)

    def _emit_call(self, name: str, deltas: list[ToolCallDelta]) -> None:
        index = len(self.calls)
        self.calls.append(ToolCall(index, self._ids(index), name))
        deltas.append(ToolCallDelta(index, self.calls[-1].id, name))

    def _emit_arguments(self, fragment: str, deltas: list[ToolCallDelta]) -> None:
        call = self.calls[-1]
        call.arguments += fragment
        if not deltas or deltas[-1].index != call.index:
            deltas.append(ToolCallDelta(call.index))
        deltas[-1].arguments += fragment


class _CallList:
    """Parser of a list of calls, or of one `tagged` call, one character at a time.

    `name` is the current call's name once complete, `fragment` its new argument text. The caller takes the
    fragment and sets `emitted` when the call has been emitted. `raw` is the text not yet emitted, at first the
    text that began the block.
    """

    def __init__(self, tagged: bool, raw: str) -> None:
        self.tagged, self.raw = tagged, raw
        self.name: str | None = None
        self.emitted = False
        self.fragment = ""
        self.ended = False  # after its last call
        self.closed = False  # after its closing tag
        self._complete = False  # the current character completes a call or the list
        self._parser = self._parse_block() if tagged else self._parse_list()
        next(self._parser)

    def remaining(self) -> str:
        """Return the text not emitted; what follows the last call without becoming invalid is dropped."""
        return "" if self.ended else self.raw

    def push(self, char: str) -> bool:
        """Add a character; return whether it is valid. After False nothing more may be pushed."""
        self._complete = False
        try:
            self._parser.send(char)
        except InvalidError:
            self.ended = False  # whitespace between the list and text is content
            return False
        self.raw += char
        if self._complete or (self.name is not None and self.fragment):
            self.raw = ""
        return True

    def _parse_list(self) -> Parser:
        expect((yield from after_space()) == "[")
        char = ","
        while char == ",":
            expect((yield from after_space()) == "{")
            yield from self._parse_call()
            char = yield from after_space()
        expect(char == "]")
        self._complete = self.ended = True
        while True:
            expect((yield) in WHITESPACE)

    def _parse_block(self) -> Parser:
        expect((yield from after_space()) == "{")
        yield from self._parse_call()
        self.ended = True
        expect((yield from after_space()) == CLOSING[0])
        for wanted in CLOSING[1:]:
            expect((yield) == wanted)
        self.closed = True
        yield

    def _parse_call(self) -> Parser:
        self.name, self.emitted, seen, char = None, False, set[str](), ","
        while char == ",":
            expect((yield from after_space()) == '"')
            key = yield from string()
            expect(key in ("name", "arguments", "id") and key not in seen)
            seen.add(key)
            expect((yield from after_space()) == ":")
            yield from self._parse_field(key)
            char = yield from after_space()
        expect(char == "}" and self.name is not None)
        self._complete = True
        if "arguments" not in seen:
            self.fragment = "{}"

    def _parse_field(self, key: str) -> Parser:
        char = yield from after_space()
        if key == "arguments":
            yield from self._parse_arguments(char)
            return
        expect(char == '"')
        text = yield from string()
        if key == "name":
            expect(text != "")
            self.name = text

    def _parse_arguments(self, char: str) -> Parser:
        """Parse an object or null starting with `char`, or a string that contains one or is blank."""
        quoted = char == '"'
        if quoted:
            while (char := (yield from string_char())) in tuple(WHITESPACE):
                pass
        empty = char != "{"
        if not empty:
            reading = container(char)
            next(reading)
            try:
                while True:
                    self.fragment += char
                    char = (yield from string_char()) if quoted else (yield)
                    expect(char != "")
                    reading.send(char)
            except StopIteration:
                self.fragment += char
        elif char:
            expect(char == "n")
            for expected in LITERALS[char]:
                expect(((yield from string_char()) if quoted else (yield)) == expected)
        while quoted and char and (char := (yield from string_char())):
            expect(char in WHITESPACE)
        if empty:
            self.fragment = "{}"
