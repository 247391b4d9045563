r"""Translates ECMA-262 patterns of JSON schemas into regular expressions over JSON-encoded strings.

A pattern is searched for in the decoded string, while a Lark terminal matches the encoded text, quotes and escapes
included: "." becomes any character except line terminators, or an escape of such a character.
"""

from __future__ import annotations

import enum
import functools
import json
import re
import unicodedata
from dataclasses import dataclass

from ...errors import GrammarError

ESCAPED = [chr(code) for code in (*range(0x20), 0x22, 0x5C, 0x7F)]  # characters that are always escaped here
# Any character in its only encoding: itself, or its shortest escape in lower case.
CHAR = r"([^\x22\x5c\x00-\x1f\x7f]|\\([\x22\x5cbfnrt]|u00(0[0-7bef]|1[0-9a-f]|7f)))"
MAX_DEPTH = 100  # nested groups
MAX_CODE_POINT = 0x10FFFF

Ranges = tuple[tuple[int, int], ...]
DIGITS: Ranges = ((0x30, 0x39),)
WORDS: Ranges = (*DIGITS, (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
LINES: Ranges = ((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029))
SPACES: Ranges = (
    (0x09, 0x0D), (0x20, 0x20), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029),
    (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF),
)  # fmt: skip
CLASSES = {"d": DIGITS, "w": WORDS, "s": SPACES}
CONTROLS = {"t": 0x09, "n": 0x0A, "v": 0x0B, "f": 0x0C, "r": 0x0D, "0": 0x00}
# General categories of Unicode.
CATEGORY = re.compile("L[ultmo]?|M[nce]?|N[dlo]?|P[cdseifo]?|S[mcko]?|Z[slp]?|C[cfon]?")


@functools.lru_cache(256)
def to_json_regex(pattern: str) -> str:
    """A regex of the JSON strings, without their quotes, that contain a match of an ECMA-262 pattern.

    Raises GrammarError with the reason for an invalid pattern, and for look-around.
    """
    parser = _Parser(pattern)
    return _regex_of(parser.alternatives(0), _Neighbor.ANY_TEXT, _Neighbor.ANY_TEXT)


def escape(char: str) -> str:
    """The escape of a character in ESCAPED."""
    return "\\u007f" if char == "\x7f" else json.dumps(char)[1:-1]


@dataclass(frozen=True)
class _CharSet:
    """A set of characters: code point ranges and Unicode properties like `\\p{L}`, possibly inverted."""

    ranges: Ranges = ()
    properties: tuple[str, ...] = ()
    inverted: bool = False

    def contains(self, char: str) -> bool:
        """Whether the set contains a character of ESCAPED."""
        found = any(low <= ord(char) <= high for low, high in self.ranges)
        return (found or any(_has_property(char, name) for name in self.properties)) != self.inverted

    def regex(self) -> str:
        """A regex of the JSON encodings of its characters."""
        escapes = [char for char in ESCAPED if self.contains(char)]
        if not self.properties and not self.inverted and len(self.ranges) == 1 and len(set(self.ranges[0])) == 1:
            char = chr(self.ranges[0][0])
            return _escape_literal(escape(char) if escapes else char)
        body = "".join(f"\\x{{{low:x}}}-\\x{{{high:x}}}" for low, high in self.ranges) + "".join(self.properties)
        if body:
            plain = f"[[{'^' if self.inverted else ''}{body}]&&[^\\x22\\x5c\\x00-\\x1f\\x7f]]"
        else:
            plain = "[^\\x22\\x5c\\x00-\\x1f\\x7f]" if self.inverted else "[a&&b]"
        return f"({'|'.join([plain, *(_escape_literal(escape(char)) for char in escapes)])})"


@dataclass(frozen=True)
class _Repeat:
    node: _Node
    min_count: int
    max_count: int | None


@dataclass(frozen=True)
class _Anchor:
    symbol: str  # ^ or $


@dataclass(frozen=True)
class _Choice:
    """Alternatives, each a sequence."""

    options: tuple[tuple[_Node, ...], ...]


_Node = _CharSet | _Repeat | _Anchor | _Choice


class _Parser:
    """A recursive-descent parser of ECMA-262 patterns."""

    def __init__(self, pattern: str) -> None:
        self._pattern, self._at = pattern, 0

    def alternatives(self, depth: int) -> _Choice:
        """Parse up to the end of the group, or of the pattern if `depth` is 0."""
        if depth > MAX_DEPTH:
            raise GrammarError("groups are nested too deeply")
        options: list[tuple[_Node, ...]] = []
        sequence: list[_Node] = []
        while self._at < len(self._pattern) and not (depth and self._pattern[self._at] == ")"):
            if self._take("|"):
                options.append(tuple(sequence))
                sequence = []
            else:
                sequence.append(self._quantified(self._atom(depth)))
        return _Choice((*options, tuple(sequence)))

    def _atom(self, depth: int) -> _Node:
        if self._take("("):
            if not self._match(r"\?:|\?P?<[A-Za-z_$][\w$]*>") and self._match(r"\?.{0,2}"):
                raise GrammarError("look-around and flags are not supported")
            group = self.alternatives(depth + 1)
            if not self._take(")"):
                raise GrammarError("unclosed group")
            return group
        if self._take("["):
            return self._class()
        char = self._pattern[self._at]
        if char in ")*+?":
            raise GrammarError(f"unexpected {char!r}")
        self._at += 1
        if char in "^$":
            return _Anchor(char)
        if char == ".":
            return _CharSet(LINES, inverted=True)
        return self._escaped(False) if char == "\\" else _single(ord(char))

    def _quantified(self, node: _Node) -> _Node:
        if self._match(r"\{,\d+\}"):
            raise GrammarError("{,n} is ambiguous between dialects: write {0,n}")
        found = self._match(r"([*+?]|\{(\d+)(?:(,)(\d*))?\})\??")
        if not found:
            return node
        symbol, low, comma, high = found.groups()
        if symbol in "*+?":
            min_count, max_count = int(symbol == "+"), 1 if symbol == "?" else None
        else:
            min_count = int(low)
            max_count = (int(high) if high else None) if comma else min_count
        if max_count is not None and min_count > max_count:
            raise GrammarError(f"{symbol} has its bounds in the wrong order")
        if isinstance(node, _Anchor) or self._match(r"[*+?]|\{\d"):
            raise GrammarError("nothing to repeat")
        return _Repeat(node, min_count, max_count)

    def _class(self) -> _CharSet:
        """Parse a character class after its opening bracket."""
        inverted = self._take("^")
        ranges: list[tuple[int, int]] = []
        properties: list[str] = []
        while not self._take("]"):
            one = self._member()
            dash = self._at
            if self._take("-") and self._at < len(self._pattern) and self._pattern[self._at] != "]":
                other = self._member()
                if not (_is_single(one) and _is_single(other)):
                    raise GrammarError("a range must start and end with a single character")
                ranges.append((one.ranges[0][0], other.ranges[0][0]))
                if ranges[-1][0] > ranges[-1][1]:
                    raise GrammarError("a range has its ends in the wrong order")
            else:
                self._at = dash
                ranges.extend(one.ranges)
                properties.extend(one.properties)
        return _CharSet(tuple(ranges), tuple(properties), inverted)

    def _member(self) -> _CharSet:
        if self._at >= len(self._pattern):
            raise GrammarError("unclosed class")
        self._at += 1
        char = self._pattern[self._at - 1]
        return self._escaped(True) if char == "\\" else _single(ord(char))

    def _escaped(self, in_class: bool) -> _CharSet:
        """Parse an escape after its backslash."""
        if found := self._match(r"[dDwWsS]"):
            ranges = CLASSES[found[0].lower()]
            return _CharSet(ranges if found[0].islower() else _complement(ranges))
        if found := self._match(r"([pP])\{(?:(?:gc|General_Category)=)?([A-Za-z_]+)\}"):
            return _CharSet(properties=(f"\\{found[1]}{{{found[2]}}}",))
        if found := self._match(r"u([dD][89abAB]\w\w)\\u([dD][c-fC-F][0-9a-fA-F]{2})"):
            return _single(((int(found[1], 16) - 0xD800) << 10) + int(found[2], 16) - 0xDC00 + 0x10000)
        if found := self._match(r"(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|u\{([0-9a-fA-F]{1,6})\})"):
            return _single(int(found[1] or found[2] or found[3], 16))
        if found := self._match(r"c([A-Za-z])"):
            return _single(ord(found[1]) % 32)
        if found := self._match(r"[tnvfr]|0(?![0-9])"):
            return _single(CONTROLS[found[0]])
        if in_class and self._take("b"):
            return _single(8)
        if found := self._match(r"[^A-Za-z0-9]"):
            return _single(ord(found[0]))
        raise GrammarError(f"\\{self._pattern[self._at : self._at + 1]} is not supported")

    def _take(self, text: str) -> bool:
        found = self._pattern.startswith(text, self._at)
        self._at += len(text) if found else 0
        return found

    def _match(self, regex: str) -> re.Match[str] | None:
        found = re.compile(regex, re.DOTALL).match(self._pattern, self._at)
        self._at = found.end() if found else self._at
        return found


class _Neighbor(enum.Enum):
    """What precedes or follows a piece of a pattern."""

    ANY_TEXT = enum.auto()  # any text: the pattern is not anchored here
    STRING_END = enum.auto()  # the start or end of the string
    PIECE = enum.auto()  # another piece


def _regex_of(choice: _Choice, left: _Neighbor, right: _Neighbor) -> str:
    """A regex of alternatives, extended by any text at sides that are not anchored."""
    return "|".join(_sequence(list(option), left, right) for option in choice.options)


def _sequence(nodes: list[_Node], left: _Neighbor, right: _Neighbor) -> str:
    while left != _Neighbor.PIECE and nodes and nodes[0] == _Anchor("^"):
        nodes, left = nodes[1:], _Neighbor.STRING_END
    while right != _Neighbor.PIECE and nodes and nodes[-1] == _Anchor("$"):
        nodes, right = nodes[:-1], _Neighbor.STRING_END
    # A group at either end may contain the anchor; its alternatives then add the free text themselves.
    groups = bool(nodes) and isinstance(nodes[0], _Choice), bool(nodes) and isinstance(nodes[-1], _Choice)
    before = f"{CHAR}*" if left == _Neighbor.ANY_TEXT and not groups[0] else ""
    after = f"{CHAR}*" if right == _Neighbor.ANY_TEXT and not groups[1] else ""
    lefts, rights = [left, *[_Neighbor.PIECE] * len(nodes)], [*[_Neighbor.PIECE] * (len(nodes) - 1), right]
    return before + "".join(map(_piece, nodes, lefts, rights)) + after


def _piece(node: _Node, left: _Neighbor, right: _Neighbor) -> str:
    if isinstance(node, _CharSet):
        return node.regex()
    if isinstance(node, _Choice):
        return f"({_regex_of(node, left, right)})"
    if isinstance(node, _Anchor):
        raise GrammarError(f"{node.symbol} is supported only at the ends of the pattern")
    max_count = "" if node.max_count is None else node.max_count
    return f"({_piece(node.node, _Neighbor.PIECE, _Neighbor.PIECE)}){{{node.min_count},{max_count}}}"


def _single(code: int) -> _CharSet:
    if 0xD800 <= code <= 0xDFFF or code > MAX_CODE_POINT:
        raise GrammarError(f"{code:x} is not a character")
    return _CharSet(((code, code),))


def _is_single(node: _CharSet) -> bool:
    return len(node.ranges) == 1 and not node.properties and node.ranges[0][0] == node.ranges[0][1]


def _complement(ranges: Ranges) -> Ranges:
    ends = [-1, *(end for low, high in ranges for end in (low, high)), MAX_CODE_POINT + 1]
    return tuple((ends[i] + 1, ends[i + 1] - 1) for i in range(0, len(ends), 2))


def _has_property(char: str, name: str) -> bool:
    """Whether a character of ESCAPED has a Unicode property, `\\p{...}`, or lacks it, `\\P{...}`."""
    wanted, category = name[3:-1], unicodedata.category(char)
    if not CATEGORY.fullmatch(wanted):
        raise GrammarError(f"{name} is not supported: only general categories like \\p{{L}} are")
    return category.startswith(wanted) == (name[1] == "p")


def _escape_literal(text: str) -> str:
    """A regex that matches a text literally, valid between the slashes of Lark."""
    return "".join(char if char.isascii() and char.isalnum() else f"\\x{{{ord(char):x}}}" for char in text)
