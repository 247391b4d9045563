"""Incremental parser of tool calls in a model's output.

    [TOOL_CALLS]  [{"name": "weather", "arguments": {"city": "Rome"}}, ...]  </s>

Only the control token starts a list: text that spells "[TOOL_CALLS]" is content. A call is emitted once its name
and the first character of its arguments are known; each later token emits a fragment of the arguments.
Concatenated, the fragments are the arguments as written by the model.

Arguments are a JSON object. Null or missing arguments become an empty object. An object encoded as a JSON string,
which some models write, is decoded. Any other arguments are invalid.

A list that becomes invalid is content, from the first character after the last emitted fragment. If the list is
truncated by the token limit or a stop string, this rest is dropped. An "id" that the model writes after the
arguments is ignored, because the call has been emitted with an id by then.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

WHITESPACE = " \t\n\r"
DIGITS = "0123456789"
LITERALS = {"t": "rue", "f": "alse", "n": "ull"}
ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}

# Parsers are generators: one character is sent at a time, and they return at their last character.
Parser = Generator[None, str, None]
ValueParser = Generator[None, str, str]  # returns the parsed text, or the first character after it


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

    `control` is the id of [TOOL_CALLS]; None if the vocabulary lacks it (all text is content). `ids` returns the
    id of call 0, 1, ... (see messages.tool_call_id). The tokenization of the text affects only the bounds of
    fragments.
    """

    def __init__(self, control: int | None, ids: Callable[[int], str]) -> None:
        self.calls: list[ToolCall] = []  # parsed so far
        self.control, self._ids = control, ids
        self._list: _CallList | None = None  # the list being parsed

    def push(self, token: int, text: str) -> tuple[str, list[ToolCallDelta]]:
        """Add a token and its decoded text; return new content and tool call deltas."""
        content, deltas = self._parse(text)
        if token == self.control:  # `text` precedes the control token
            content += self.close()[0]
            self._list = _CallList()
        return content, deltas

    @property
    def reading(self) -> bool:
        """Whether a list is being parsed: text is held back while it may belong to the list."""
        return self._list is not None

    def close(self, cut: bool = False) -> tuple[str, list[ToolCallDelta]]:
        """End the completion; return the rest of an incomplete list as content.

        If the completion was `cut` (token limit or stop string), the rest is dropped, and a call counts once its
        name is known.
        """
        calls, self._list = self._list, None
        deltas: list[ToolCallDelta] = []
        if calls is None or not cut:
            return calls.remaining() if calls is not None else "", deltas
        if calls.name is not None and not calls.emitted:
            self._emit_call(calls.name, deltas)
        return "", deltas

    def _parse(self, text: str) -> tuple[str, list[ToolCallDelta]]:
        deltas: list[ToolCallDelta] = []
        for i, char in enumerate(text):
            calls = self._list
            if calls is None:
                return text[i:], deltas
            if not calls.push(char):
                return self.close()[0] + text[i:], deltas
            if calls.name is not None and calls.fragment:
                if not calls.emitted:
                    self._emit_call(calls.name, deltas)
                    calls.emitted = True
                self._emit_arguments(calls.fragment, deltas)
                calls.fragment = ""
        return "", deltas

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


class _InvalidError(Exception):
    """Raised for a character that is invalid at its position."""


class _CallList:
    """Parser of a list of calls, one character at a time.

    `name` is the current call's name once complete, `fragment` its new argument text. The caller takes the
    fragment and sets `emitted` when the call has been emitted.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.emitted = False
        self.fragment = ""
        self._raw = ""  # text not yet emitted
        self._complete = False  # the current character completes a call or the list
        self._list_ended = False
        self._parser = self._parse_list()
        next(self._parser)

    def remaining(self) -> str:
        """Return the text not emitted; whitespace after the complete list is dropped."""
        return "" if self._list_ended else self._raw

    def push(self, char: str) -> bool:
        """Add a character; return whether it is valid. After False nothing more may be pushed."""
        self._complete = False
        try:
            self._parser.send(char)
        except _InvalidError:
            self._list_ended = False  # whitespace between the list and text is content
            return False
        self._raw += char
        if self._complete or (self.name is not None and self.fragment):
            self._raw = ""
        return True

    def _parse_list(self) -> Parser:
        _expect((yield from _skip()) == "[")
        char = ","
        while char == ",":
            _expect((yield from _skip()) == "{")
            yield from self._parse_call()
            char = yield from _skip()
        _expect(char == "]")
        self._complete = self._list_ended = True
        while True:
            _expect((yield) in WHITESPACE)

    def _parse_call(self) -> Parser:
        self.name, self.emitted, seen, char = None, False, set[str](), ","
        while char == ",":
            _expect((yield from _skip()) == '"')
            key = yield from _string()
            _expect(key in ("name", "arguments", "id") and key not in seen)
            seen.add(key)
            _expect((yield from _skip()) == ":")
            yield from self._parse_field(key)
            char = yield from _skip()
        _expect(char == "}" and self.name is not None)
        self._complete = True
        if "arguments" not in seen:
            self.fragment = "{}"

    def _parse_field(self, key: str) -> Parser:
        char = yield from _skip()
        if key == "arguments":
            yield from self._parse_arguments(char)
            return
        _expect(char == '"')
        text = yield from _string()
        if key == "name":
            _expect(text != "")
            self.name = text

    def _parse_arguments(self, char: str) -> Parser:
        """Parse an object or null starting with `char`, or a string that contains one or is blank."""
        quoted = char == '"'
        if quoted:
            while (char := (yield from _char())) in tuple(WHITESPACE):
                pass
        empty = char != "{"
        if not empty:
            reading = _value(char)
            next(reading)
            try:
                while True:
                    self.fragment += char
                    char = (yield from _char()) if quoted else (yield)
                    _expect(char != "")
                    reading.send(char)
            except StopIteration:
                self.fragment += char
        elif char:
            _expect(char == "n")
            for expected in LITERALS[char]:
                _expect(((yield from _char()) if quoted else (yield)) == expected)
        while quoted and char and (char := (yield from _char())):
            _expect(char in WHITESPACE)
        if empty:
            self.fragment = "{}"


def _expect(condition: bool) -> None:
    if not condition:
        raise _InvalidError


def _skip() -> ValueParser:
    """Skip whitespace; return the first other character."""
    while (char := (yield)) in WHITESPACE:
        pass
    return char


def _string() -> ValueParser:
    """Parse a string after its opening quotation mark; return its value."""
    parts = []
    while char := (yield from _char()):
        parts.append(char)
    return "".join(parts)


def _char() -> ValueParser:
    """Return the next decoded character of a string, or "" at its end."""
    char = yield
    if char == '"':
        return ""
    _expect(char >= " ")
    if char != "\\":
        return char
    char = yield
    if char != "u":
        _expect(char in ESCAPES)
        return ESCAPES[char]
    code = yield from _hexadecimal()
    if 0xD800 <= code < 0xDC00:  # a high surrogate must be followed by a low one
        _expect((yield) == "\\" and (yield) == "u")
        low = yield from _hexadecimal()
        _expect(0xDC00 <= low < 0xE000)
        code = 0x10000 + (code - 0xD800 << 10) + low - 0xDC00
    _expect(not 0xDC00 <= code < 0xE000)
    return chr(code)


def _hexadecimal() -> Generator[None, str, int]:
    """Parse four hexadecimal digits."""
    digits = ""
    for _ in range(4):
        digits += yield
        _expect(digits[-1] in DIGITS + "abcdefABCDEF")
    return int(digits, 16)


def _value(char: str) -> Parser:
    """Parse an object or list whose first character is `char`, without recursion."""
    closers: list[str] = []
    while True:
        following = ""  # the character that ended a number
        if char in "[{":
            closers.append("]" if char == "[" else "}")
            char = yield from _skip()
            if char != closers[-1]:
                if closers[-1] == "}":
                    char = yield from _key(char)
                continue
            closers.pop()
        elif char == '"':
            yield from _string()
        elif char in LITERALS:
            for expected in LITERALS[char]:
                _expect((yield) == expected)
        else:
            following = yield from _number(char)
        while closers:
            char = following if following not in ("", *WHITESPACE) else (yield from _skip())
            following = ""
            if char != closers[-1]:
                break
            closers.pop()
        if not closers:
            return
        _expect(char == ",")
        char = yield from _skip()
        if closers[-1] == "}":
            char = yield from _key(char)


def _key(char: str) -> ValueParser:
    """Parse a key starting with `char` and its colon; return the first character of the value."""
    _expect(char == '"')
    yield from _string()
    _expect((yield from _skip()) == ":")
    return (yield from _skip())


def _number(char: str) -> ValueParser:
    """Parse a number starting with `char`; return the character after it."""
    if char == "-":
        char = yield
    if char == "0":
        char = yield
    else:
        char = yield from _digits(char)
    if char == ".":
        char = yield from _digits((yield))
    if char in "eE":
        char = yield
        if char in "+-":
            char = yield
        char = yield from _digits(char)
    return char


def _digits(char: str) -> ValueParser:
    """Parse one or more digits starting with `char`; return the character after them."""
    _expect(char in DIGITS)
    while char in DIGITS:
        char = yield
    return char
