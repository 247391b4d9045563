r"""Patterns of ECMA-262, as JSON schemas have them, rewritten for the text of a JSON string.

A pattern is searched for in what a string means, and a terminal of Lark matches what is written, quotes and
escapes included: "." becomes any character but a line's end, or an escape of one.
"""

from __future__ import annotations

import enum
import functools
import json
import re
import unicodedata
from dataclasses import dataclass

from ...errors import GrammarError

ESCAPED = [chr(code) for code in (*range(0x20), 0x22, 0x5C, 0x7F)]  # what JSON strings hold as escapes alone
# Any character, written in one way alone: as itself, or by its shortest escape in lower case.
CHAR = r"([^\x22\x5c\x00-\x1f\x7f]|\\([\x22\x5cbfnrt]|u00(0[0-7bef]|1[0-9a-f]|7f)))"
DEEPEST = 100  # groups in groups
LAST = 0x10FFFF

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
def quoted(pattern: str) -> str:
    """A regex of the JSON strings, without their quotes, in which a pattern is found.

    Raises GrammarError with the reason for what is no pattern, or looks beyond what it matches.
    """
    reader = _Reader(pattern)
    return _written(reader.alternatives(0), _Side.FREE, _Side.FREE)


def escape(char: str) -> str:
    """A character of ESCAPED as JSON writes it here."""
    return "\\u007f" if char == "\x7f" else json.dumps(char)[1:-1]


@dataclass(frozen=True)
class _Set:
    """One character: of these ranges, or of these properties of Unicode, which are as `\\p{L}`; or of neither."""

    ranges: Ranges = ()
    properties: tuple[str, ...] = ()
    inverted: bool = False

    def holds(self, char: str) -> bool:
        """Whether it holds one of ESCAPED."""
        found = any(low <= ord(char) <= high for low, high in self.ranges)
        return (found or any(_has_property(char, name) for name in self.properties)) != self.inverted

    def regex(self) -> str:
        """Its characters as JSON writes them."""
        escapes = [char for char in ESCAPED if self.holds(char)]
        if not self.properties and not self.inverted and len(self.ranges) == 1 and len(set(self.ranges[0])) == 1:
            char = chr(self.ranges[0][0])
            return _literal(escape(char) if escapes else char)
        body = "".join(f"\\x{{{low:x}}}-\\x{{{high:x}}}" for low, high in self.ranges) + "".join(self.properties)
        if body:
            plain = f"[[{'^' if self.inverted else ''}{body}]&&[^\\x22\\x5c\\x00-\\x1f\\x7f]]"
        else:
            plain = "[^\\x22\\x5c\\x00-\\x1f\\x7f]" if self.inverted else "[a&&b]"
        return f"({'|'.join([plain, *(_literal(escape(char)) for char in escapes)])})"


@dataclass(frozen=True)
class _Repeat:
    node: _Node
    least: int
    most: int | None


@dataclass(frozen=True)
class _Anchor:
    sign: str  # ^ or $


@dataclass(frozen=True)
class _Choice:
    """Alternatives, each a sequence."""

    options: tuple[tuple[_Node, ...], ...]


_Node = _Set | _Repeat | _Anchor | _Choice


class _Reader:
    """Reads a pattern from its first character to its last."""

    def __init__(self, pattern: str) -> None:
        self._pattern, self._at = pattern, 0

    def alternatives(self, depth: int) -> _Choice:
        """Up to the end of the group, or of the pattern where `depth` is 0."""
        if depth > DEEPEST:
            raise GrammarError("its groups nest too deeply")
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
            raise GrammarError(f"{char!r} stands where it cannot")
        self._at += 1
        if char in "^$":
            return _Anchor(char)
        if char == ".":
            return _Set(LINES, inverted=True)
        return self._escaped(False) if char == "\\" else _one(ord(char))

    def _quantified(self, node: _Node) -> _Node:
        if self._match(r"\{,\d+\}"):
            raise GrammarError("{,n} means different things to different readers: write {0,n}")
        found = self._match(r"([*+?]|\{(\d+)(?:(,)(\d*))?\})\??")
        if not found:
            return node
        sign, low, comma, high = found.groups()
        if sign in "*+?":
            least, most = int(sign == "+"), 1 if sign == "?" else None
        else:
            least = int(low)
            most = (int(high) if high else None) if comma else least
        if most is not None and least > most:
            raise GrammarError(f"{sign} has its bounds the wrong way round")
        if isinstance(node, _Anchor) or self._match(r"[*+?]|\{\d"):
            raise GrammarError("nothing to repeat")
        return _Repeat(node, least, most)

    def _class(self) -> _Set:
        """What stands in square brackets."""
        inverted = self._take("^")
        ranges: list[tuple[int, int]] = []
        properties: list[str] = []
        while not self._take("]"):
            one = self._member()
            dash = self._at
            if self._take("-") and self._at < len(self._pattern) and self._pattern[self._at] != "]":
                other = self._member()
                if not (_is_one(one) and _is_one(other)):
                    raise GrammarError("a class cannot be the end of a range")
                ranges.append((one.ranges[0][0], other.ranges[0][0]))
                if ranges[-1][0] > ranges[-1][1]:
                    raise GrammarError("a range has its ends the wrong way round")
            else:
                self._at = dash
                ranges.extend(one.ranges)
                properties.extend(one.properties)
        return _Set(tuple(ranges), tuple(properties), inverted)

    def _member(self) -> _Set:
        if self._at >= len(self._pattern):
            raise GrammarError("unclosed class")
        self._at += 1
        char = self._pattern[self._at - 1]
        return self._escaped(True) if char == "\\" else _one(ord(char))

    def _escaped(self, in_class: bool) -> _Set:
        """What stands behind a backslash."""
        if found := self._match(r"[dDwWsS]"):
            ranges = CLASSES[found[0].lower()]
            return _Set(ranges if found[0].islower() else _complement(ranges))
        if found := self._match(r"([pP])\{(?:(?:gc|General_Category)=)?([A-Za-z_]+)\}"):
            return _Set(properties=(f"\\{found[1]}{{{found[2]}}}",))
        if found := self._match(r"u([dD][89abAB]\w\w)\\u([dD][c-fC-F][0-9a-fA-F]{2})"):
            return _one(((int(found[1], 16) - 0xD800) << 10) + int(found[2], 16) - 0xDC00 + 0x10000)
        if found := self._match(r"(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|u\{([0-9a-fA-F]{1,6})\})"):
            return _one(int(found[1] or found[2] or found[3], 16))
        if found := self._match(r"c([A-Za-z])"):
            return _one(ord(found[1]) % 32)
        if found := self._match(r"[tnvfr]|0(?![0-9])"):
            return _one(CONTROLS[found[0]])
        if in_class and self._take("b"):
            return _one(8)
        if found := self._match(r"[^A-Za-z0-9]"):
            return _one(ord(found[0]))
        raise GrammarError(f"\\{self._pattern[self._at : self._at + 1]} is not supported")

    def _take(self, text: str) -> bool:
        found = self._pattern.startswith(text, self._at)
        self._at += len(text) if found else 0
        return found

    def _match(self, regex: str) -> re.Match[str] | None:
        found = re.compile(regex, re.DOTALL).match(self._pattern, self._at)
        self._at = found.end() if found else self._at
        return found


class _Side(enum.Enum):
    """What is next to a part of a pattern."""

    FREE = enum.auto()  # any text, or an end of the string
    END = enum.auto()  # an end of the string
    PART = enum.auto()  # another part


def _written(choice: _Choice, left: _Side, right: _Side) -> str:
    """A regex of alternatives, with the text next to them where it is free."""
    return "|".join(_sequence(list(option), left, right) for option in choice.options)


def _sequence(nodes: list[_Node], left: _Side, right: _Side) -> str:
    while left != _Side.PART and nodes and nodes[0] == _Anchor("^"):
        nodes, left = nodes[1:], _Side.END
    while right != _Side.PART and nodes and nodes[-1] == _Anchor("$"):
        nodes, right = nodes[:-1], _Side.END
    # A group at an end may hold the anchor itself, and then also what is free.
    groups = bool(nodes) and isinstance(nodes[0], _Choice), bool(nodes) and isinstance(nodes[-1], _Choice)
    before = f"{CHAR}*" if left == _Side.FREE and not groups[0] else ""
    after = f"{CHAR}*" if right == _Side.FREE and not groups[1] else ""
    lefts, rights = [left, *[_Side.PART] * len(nodes)], [*[_Side.PART] * (len(nodes) - 1), right]
    return before + "".join(map(_piece, nodes, lefts, rights)) + after


def _piece(node: _Node, left: _Side, right: _Side) -> str:
    if isinstance(node, _Set):
        return node.regex()
    if isinstance(node, _Choice):
        return f"({_written(node, left, right)})"
    if isinstance(node, _Anchor):
        raise GrammarError(f"{node.sign} is supported at its ends alone")
    most = "" if node.most is None else node.most
    return f"({_piece(node.node, _Side.PART, _Side.PART)}){{{node.least},{most}}}"


def _one(code: int) -> _Set:
    if 0xD800 <= code <= 0xDFFF or code > LAST:
        raise GrammarError(f"{code:x} is no character")
    return _Set(((code, code),))


def _is_one(node: _Set) -> bool:
    return len(node.ranges) == 1 and not node.properties and node.ranges[0][0] == node.ranges[0][1]


def _complement(ranges: Ranges) -> Ranges:
    ends = [-1, *(end for low, high in ranges for end in (low, high)), LAST + 1]
    return tuple((ends[i] + 1, ends[i + 1] - 1) for i in range(0, len(ends), 2))


def _has_property(char: str, name: str) -> bool:
    """Whether one of ESCAPED has a property of Unicode written as `\\p{...}` or, inverted, as `\\P{...}`."""
    wanted, category = name[3:-1], unicodedata.category(char)
    if not CATEGORY.fullmatch(wanted):
        raise GrammarError(f"{name} is not supported: only general categories are, as \\p{{L}}")
    return category.startswith(wanted) == (name[1] == "p")


def _literal(text: str) -> str:
    """A regex of a text, fit to stand between the slashes of Lark."""
    return "".join(char if char.isascii() and char.isalnum() else f"\\x{{{ord(char):x}}}" for char in text)
