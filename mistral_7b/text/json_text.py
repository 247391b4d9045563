"""Parsers of JSON that take one character at a time, for text that is generated.

Parsers are generators: one character is sent at a time, and they return at their last character. A character that
is invalid at its position raises InvalidError.
"""

from __future__ import annotations

from collections.abc import Generator

WHITESPACE = " \t\n\r"
DIGITS = "0123456789"
LITERALS = {"t": "rue", "f": "alse", "n": "ull"}
ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}

Parser = Generator[None, str, None]
ValueParser = Generator[None, str, str]  # returns the parsed text, or the first character after it


class InvalidError(Exception):
    """Raised for a character that is invalid at its position."""


def expect(condition: bool) -> None:
    if not condition:
        raise InvalidError


def after_space() -> ValueParser:
    """Skip whitespace; return the first other character."""
    while (char := (yield)) in WHITESPACE:
        pass
    return char


def string() -> ValueParser:
    """Parse a string after its opening quotation mark; return its value."""
    parts = []
    while char := (yield from string_char()):
        parts.append(char)
    return "".join(parts)


def string_char() -> ValueParser:
    """Return the next decoded character of a string, or "" at its end."""
    char = yield
    if char == '"':
        return ""
    expect(char >= " ")
    if char != "\\":
        return char
    char = yield
    if char != "u":
        expect(char in ESCAPES)
        return ESCAPES[char]
    code = yield from _hexadecimal()
    if 0xD800 <= code < 0xDC00:  # a high surrogate must be followed by a low one
        expect((yield) == "\\" and (yield) == "u")
        low = yield from _hexadecimal()
        expect(0xDC00 <= low < 0xE000)
        code = 0x10000 + (code - 0xD800 << 10) + low - 0xDC00
    expect(not 0xDC00 <= code < 0xE000)
    return chr(code)


def _hexadecimal() -> Generator[None, str, int]:
    """Parse four hexadecimal digits."""
    digits = ""
    for _ in range(4):
        digits += yield
        expect(digits[-1] in DIGITS + "abcdefABCDEF")
    return int(digits, 16)


def container(char: str) -> Parser:
    """Parse an object or list whose first character is `char`, without recursion."""
    closers: list[str] = []
    while True:
        following = ""  # the character that ended a number
        if char in "[{":
            closers.append("]" if char == "[" else "}")
            char = yield from after_space()
            if char != closers[-1]:
                if closers[-1] == "}":
                    char = yield from _key(char)
                continue
            closers.pop()
        elif char == '"':
            yield from string()
        elif char in LITERALS:
            for expected in LITERALS[char]:
                expect((yield) == expected)
        else:
            following = yield from _number(char)
        while closers:
            char = following if following not in ("", *WHITESPACE) else (yield from after_space())
            following = ""
            if char != closers[-1]:
                break
            closers.pop()
        if not closers:
            return
        expect(char == ",")
        char = yield from after_space()
        if closers[-1] == "}":
            char = yield from _key(char)


def _key(char: str) -> ValueParser:
    """Parse a key starting with `char` and its colon; return the first character of the value."""
    expect(char == '"')
    yield from string()
    expect((yield from after_space()) == ":")
    return (yield from after_space())


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
    expect(char in DIGITS)
    while char in DIGITS:
        char = yield
    return char
