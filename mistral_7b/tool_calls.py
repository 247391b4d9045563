"""Tool calls, read from a model's tokens while they come.

    [TOOL_CALLS]  [{"name": "weather", "arguments": {"city": "Rome"}}, ...]  </s>

The control token begins them, and nothing else can: text that spells "[TOOL_CALLS]" is text. A call is given out
once it has a name and the first character of its arguments, and then as far as they have come with each token.
These fragments, joined, are the arguments as the model wrote them.

Arguments are an object. Null, and none at all, stand for an empty one. Some models write the object as JSON within
a string: it is decoded. With any other arguments there is no call.

What cannot be such a list is text, from the first character on that is part of nothing given out. Where a list is
cut off, by a token limit or a stop string, this rest is left out. The "id" that a model may write behind the
arguments, having read conversations, comes too late: by then the call has one.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

WHITESPACE = " \t\n\r"
DIGITS = "0123456789"
LITERALS = {"t": "rue", "f": "alse", "n": "ull"}
ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}

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
    """What has become certain of call `index`: pieces of its arguments, with the first its id and name."""

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
            content += self.close()[0]
            self._list = _CallList()
        return content, deltas

    @property
    def reading(self) -> bool:
        """Whether a list is being read: what comes is no content as long as it may be a part of this."""
        return self._list is not None

    def close(self, cut: bool = False) -> tuple[str, list[ToolCallDelta]]:
        """At the end: what of a list that breaks off is text, as far as it was not given out with a call.

        Where the completion was `cut`, more would have come: nothing of the list is text, and a call is one once
        it has a name.
        """
        calls, self._list = self._list, None
        deltas: list[ToolCallDelta] = []
        if calls is None or not cut:
            return calls.left() if calls is not None else "", deltas
        if calls.name is not None and not calls.begun:
            self._begin(calls.name, deltas)
        return "", deltas

    def _read(self, text: str) -> tuple[str, list[ToolCallDelta]]:
        deltas: list[ToolCallDelta] = []
        for place, char in enumerate(text):
            calls = self._list
            if calls is None:
                return text[place:], deltas
            if not calls.push(char):
                return self.close()[0] + text[place:], deltas
            if calls.name is not None and calls.fragment:
                if not calls.begun:
                    self._begin(calls.name, deltas)
                    calls.begun = True
                self._extend(calls.fragment, deltas)
                calls.fragment = ""
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

    `name` is the present call's, once it is complete, and `fragment` what has come of its arguments. Once there
    are both, the reader takes the fragment away, and notes that the call has `begun`.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.begun = False
        self.fragment = ""
        self._raw = ""  # all that is part of nothing given out yet
        self._complete = False  # a call or the list, with the present character
        self._over = False
        self._reading = self._read_list()
        next(self._reading)

    def left(self) -> str:
        """The text of what breaks off here; blanks behind the whole list are nothing."""
        return "" if self._over else self._raw

    def push(self, char: str) -> bool:
        """Take the next character; whether it may come here. If not, nothing more may be pushed."""
        self._complete = False
        try:
            self._reading.send(char)
        except _WrongError:
            self._over = False  # blanks behind the list stand before text, and are text
            return False
        self._raw += char
        if self._complete or (self.name is not None and self.fragment):
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
        self.name, self.begun, seen, char = None, False, set[str](), ","
        while char == ",":
            _need((yield from _skip()) == '"')
            key = yield from _string()
            _need(key in ("name", "arguments", "id") and key not in seen)
            seen.add(key)
            _need((yield from _skip()) == ":")
            yield from self._read_field(key)
            char = yield from _skip()
        _need(char == "}" and self.name is not None)
        self._complete = True
        if "arguments" not in seen:
            self.fragment = "{}"

    def _read_field(self, key: str) -> Reading:
        char = yield from _skip()
        if key == "arguments":
            yield from self._read_arguments(char)
            return
        _need(char == '"')
        text = yield from _string()
        if key == "name":
            _need(text != "")
            self.name = text

    def _read_arguments(self, char: str) -> Reading:
        """An object or null that begins with `char`; or a string that says one of the two, or nothing."""
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
                    _need(char != "")
                    reading.send(char)
            except StopIteration:
                self.fragment += char
        elif char:
            _need(char == "n")
            for expected in LITERALS[char]:
                _need(((yield from _char()) if quoted else (yield)) == expected)
        while quoted and char and (char := (yield from _char())):
            _need(char in WHITESPACE)
        if empty:
            self.fragment = "{}"


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
    parts = []
    while char := (yield from _char()):
        parts.append(char)
    return "".join(parts)


def _char() -> ReadingOn:
    """The next character that a string says, or "" at its end."""
    char = yield
    if char == '"':
        return ""
    _need(char >= " ")
    if char != "\\":
        return char
    char = yield
    if char != "u":
        _need(char in ESCAPES)
        return ESCAPES[char]
    code = yield from _hexadecimal()
    if 0xD800 <= code < 0xDC00:  # the first half of a character: the second must follow
        _need((yield) == "\\" and (yield) == "u")
        low = yield from _hexadecimal()
        _need(0xDC00 <= low < 0xE000)
        code = 0x10000 + (code - 0xD800 << 10) + low - 0xDC00
    _need(not 0xDC00 <= code < 0xE000)
    return chr(code)


def _hexadecimal() -> Generator[None, str, int]:
    """The number that four digits say."""
    digits = ""
    for _ in range(4):
        digits += yield
        _need(digits[-1] in DIGITS + "abcdefABCDEF")
    return int(digits, 16)


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
