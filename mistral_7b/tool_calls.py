"""Tool calls, read from a model's tokens while they come.

    [TOOL_CALLS]  [{"name": "weather", "arguments": {"city": "Rome"}}, ...]  </s>

The control token begins them, and nothing else can: text that spells "[TOOL_CALLS]" is text. A call is given out
as it is written: its name when that is complete, and then its arguments, as far as they have come with each token.
These fragments, joined, are the arguments as the model wrote them.

What does not go on as such a list must is given back as text, from the first character on that is part of nothing
given out. The "id" that a model may write behind the arguments, having read conversations, comes too late: by then
the call has one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from dataclasses import dataclass

WHITESPACE = " \t\n\r"
DIGITS = "0123456789"
LITERALS = {"t": "rue", "f": "alse", "n": "ull"}

# A part of the list being read: it is sent one character after another, and returns when it has its last.
Reading = Generator[None, str, None]
ReadingOn = Generator[None, str, str]  # returns a text, or the first character behind it


@dataclass
class ToolCall:
    """One call. `id` is 9 letters or digits; `arguments` is the text of a JSON object."""

    index: int
    id: str
    name: str
    arguments: str = ""


@dataclass
class ToolCallDelta:
    """What has become certain of call `index`: id and name once, with its first, and pieces of its arguments."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class ToolCallStream:
    """Tells text and tool calls apart, for one completion.

    `control` is the id of [TOOL_CALLS]; None for a vocabulary without it, where all is text. `ids` gives the id of
    call 0, 1, ... (messages.tool_call_id makes one of any text). How the text is divided among tokens changes
    nothing but where fragments begin and end.
    """

    def __init__(self, control: int | None, ids: Callable[[int], str]) -> None:
        self.calls: list[ToolCall] = []  # as far as they have come
        self.control, self._ids = control, ids
        self._list: _CallList | None = None  # the one that is being read

    def push(self, token: int, text: str) -> tuple[str, list[ToolCallDelta]]:
        """Take a token and the text that is certain with it; what of it is content, and what came of calls."""
        content, deltas = self._read(text)
        if token == self.control:  # the text that came with it was written before it
            content += self.close()
            self._list = _CallList()
        return content, deltas

    def close(self) -> str:
        """At the end: the text of a list that breaks off, as far as it was not given out with a call."""
        left = self._list.left() if self._list is not None else ""
        self._list = None
        return left

    def _read(self, text: str) -> tuple[str, list[ToolCallDelta]]:
        deltas: list[ToolCallDelta] = []
        for place, char in enumerate(text):
            if self._list is None:
                return text[place:], deltas
            if not self._list.push(char):
                left = self.close()
                return left + text[place:], deltas
            if self._list.name is not None:
                self._begin(self._list.name, deltas)
                self._list.name = None
            if self._list.fragment and self._list.named:
                self._extend(self._list.fragment, deltas)
                self._list.fragment = ""
        return "", deltas

    def _begin(self, name: str, deltas: list[ToolCallDelta]) -> None:
        index = len(self.calls)
        self.calls.append(ToolCall(index, self._ids(index), name))
        deltas.append(ToolCallDelta(index, self.calls[-1].id, name))

    def _extend(self, fragment: str, deltas: list[ToolCallDelta]) -> None:
        call = self.calls[-1]
        call.arguments += fragment
        if not deltas or deltas[-1].index != call.index:
            deltas.append(ToolCallDelta(call.index))
        deltas[-1].arguments += fragment


class _WrongError(Exception):
    """A character that cannot come here."""


class _CallList:
    """A list of calls, read a character at a time.

    `name` and, once the call is `named`, `fragment` are what has come; whoever takes them away sets them back.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.named = False
        self.fragment = ""
        self._raw = ""  # all that is part of nothing given out yet
        self._inside = False  # the arguments of a call
        self._complete = False  # a call or the list, with the present character
        self._over = False
        self._reading = self._read_list()
        next(self._reading)

    def left(self) -> str:
        """The text of what breaks off here; blanks behind the whole list are nothing."""
        return "" if self._over else self._raw

    def push(self, char: str) -> bool:
        """Take the next character; whether it may come here. If not, nothing more may be pushed."""
        inside, self._complete = self._inside, False
        try:
            self._reading.send(char)
        except _WrongError:
            self._over = False  # blanks behind the list stand before text, and are text
            return False
        self._raw += char
        if inside or self._inside:
            self.fragment += char
        if self._complete or self.name is not None or (self.named and self.fragment):
            self._raw = ""
        return True

    def _read_list(self) -> Reading:
        _need((yield from _skip()) == "[")
        char = ","
        while char == ",":
            _need((yield from _skip()) == "{")
            yield from self._read_call()
            char = yield from _skip()
        _need(char == "]")
        self._complete = self._over = True
        while True:
            _need((yield) in WHITESPACE)

    def _read_call(self) -> Reading:
        self.named, seen, char = False, set[str](), ","
        while char == ",":
            _need((yield from _skip()) == '"')
            key = yield from _string()
            _need(key in ("name", "arguments", "id") and key not in seen)
            seen.add(key)
            _need((yield from _skip()) == ":")
            yield from self._read_field(key)
            char = yield from _skip()
        _need(char == "}" and self.named)
        self._complete = True
        if "arguments" not in seen:
            self.fragment = "{}"

    def _read_field(self, key: str) -> Reading:
        char = yield from _skip()
        if key == "arguments":
            _need(char == "{")
            self._inside = True
            yield from _value(char)
            self._inside = False
            return
        _need(char == '"')
        text = yield from _string()
        if key == "name":
            _need(text != "")
            self.name, self.named = text, True


def _need(condition: bool) -> None:
    if not condition:
        raise _WrongError


def _skip() -> ReadingOn:
    """Read on until a character that is no whitespace, and return it."""
    while (char := (yield)) in WHITESPACE:
        pass
    return char


def _string() -> ReadingOn:
    """A string whose quotation mark has been read; return what it says."""
    parts = ['"']
    while (char := (yield)) != '"':
        _need(char >= " ")
        parts.append(char)
        if char == "\\":
            char = yield
            parts.append(char)
            _need(char in '"\\/bfnrtu')
            if char == "u":
                for _ in range(4):
                    char = yield
                    parts.append(char)
                    _need(char in DIGITS + "abcdefABCDEF")
    text = json.loads("".join(parts) + '"')
    _need(not any("\ud800" <= c <= "\udfff" for c in text))  # half a character
    return text


def _value(char: str) -> Reading:
    """An object or list that begins with `char`, which has been read. Nesting costs no recursion."""
    closers: list[str] = []
    while True:
        following = ""  # what had to be read to see that a number has ended
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
                _need((yield) == expected)
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
        _need(char == ",")
        char = yield from _skip()
        if closers[-1] == "}":
            char = yield from _key(char)


def _key(char: str) -> ReadingOn:
    """A key that begins with `char`, and its colon; return the first character of the value."""
    _need(char == '"')
    yield from _string()
    _need((yield from _skip()) == ":")
    return (yield from _skip())


def _number(char: str) -> ReadingOn:
    """A number that begins with `char`; return the character behind it."""
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


def _digits(char: str) -> ReadingOn:
    """One digit or more, the first being `char`; return the character behind them."""
    _need(char in DIGITS)
    while char in DIGITS:
        char = yield
    return char
