"""Tell text of a conversation that spells a control token from the control tokens that a chat template writes.

Before a conversation is rendered, a noncharacter is put inside each such spelling. Where it is found in the
rendered text, it is removed, and the spelling around it is reported as plain text:

    "a</s>b"   ->   "a<\\ufdd0/s>b"   ->   rendered   ->   "...a</s>b...", plain (4, 8)

Spellings can also come about while a template is rendered. What is marked in addition:

    removed text     "<<x>/s>" where the template removes "<x>"    every character but those removed
    changed case     "</S>" where the template writes lower case   spellings in any case
    borders          "<", "/s>" of two strings, or of a string     the ends of strings that begin or end like a
                     and the template's own text                   spelling, in a second rendering (`borders`)

The roles of messages and names that the template itself compares with are no text: `'<|' ~ role ~ '|>'` is the
template's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

from ..errors import TokenizerError

NONCHARACTERS = [chr(c) for c in range(0xFDD0, 0xFDF0)]  # never text; one of them marks, one ends a message
CASES = re.compile("lower|upper|title|capitalize|swapcase|casefold")
LONGEST = 100  # characters of a control token, and of a string of the template that is searched in messages
MOST = 500  # such strings
ROLES = frozenset(("system", "developer", "user", "assistant", "tool", "function", "ipython"))


class Read(NamedTuple):
    """Rendered text without marks, the spans that spell a control token, and how many the template wrote."""

    text: str
    plain: tuple[tuple[int, int], ...]
    written: int


class Marks:
    """Marks for one template and one vocabulary.

    `literals` are the strings in the template's expressions, `names` the attributes that it reads. Raises
    TokenizerError for control tokens of absurd length.
    """

    def __init__(
        self, source: str, literals: Collection[str], names: Collection[str], controls: Collection[str]
    ) -> None:
        self._source = source
        self._known = {s for s in (*literals, *names) if s.isidentifier()}
        self._controls = sorted({c for c in controls if c.strip()}, key=lambda c: (-len(c), c))
        if self._controls and len(self._controls[0]) > LONGEST:
            raise TokenizerError(
                f"has a control token of {len(self._controls[0]):,} characters, and at most {LONGEST} are read",
                field="added_tokens",
            )
        spelled = _alternatives(self._controls)
        self._spelled = re.compile(spelled, re.IGNORECASE if CASES.search(source) else 0)
        self._exact = re.compile(f"(?=({spelled}))")
        short = (s for s in literals if 0 < len(s) <= LONGEST and not any(s in c for c in self._controls))
        removable = sorted(short, key=lambda s: (len(s), s))[:MOST]
        self._removed = re.compile(f"({'|'.join(map(re.escape, reversed(removable))) or '(?!)'})")
        self._longest = max(map(len, self._controls), default=0)
        self._heads = {c[:i] for c in self._controls for i in range(1, len(c))}
        self._tails = {c[i:] for c in self._controls for i in range(1, len(c))}

    def free(self, strings: Iterable[str]) -> tuple[str, str]:
        """Return two noncharacters that occur neither in strings nor in the template, nor as JSON escapes them."""
        text = "\0".join((self._source, *strings)).lower()
        free = list(islice((c for c in NONCHARACTERS if c not in text and _escaped(c) not in text), 2))
        if len(free) < 2:
            raise TokenizerError(
                "the conversation uses every noncharacter from U+FDD0 to U+FDEF", field="messages"
            )
        return free[0], free[1]

    def spellings(self, text: str, mark: str) -> str:
        """Return a string with a mark inside each spelling of a control token."""
        parts = self._removed.split(text)
        if len(parts) > 1:
            bare = "".join(parts[::2])
            if len(self._spelled.findall(bare)) > len(self._spelled.findall(text)):
                parts[::2] = [_around(part, lambda core: mark + mark.join(core) + mark) for part in parts[::2]]
                return "".join(parts)
        return self._spelled.sub(lambda m: m[0][:1] + mark + m[0][1:], text)

    def borders(self, text: str, mark: str) -> str:
        """Return a string with marks where it can be a part of a spelling that its neighbours complete."""
        core, n = text.strip(), self._longest
        if core in self._known or not core:
            return text
        whole = len(core) < n and any(core in c for c in self._controls)
        if whole or any(core[:k] in self._tails for k in range(1, n)):
            core = mark + mark.join(core[:n]) + core[n:]
        if whole or any(text.rstrip()[-k:] in self._heads for k in range(1, n)):
            core = core[:-n] + mark.join(core[-n:]) + mark
        return _around(text, lambda _: core)

    def read(self, marked: str, mark: str) -> Read:
        """Remove the marks of a rendered text, and find the spellings around them."""
        parts = re.split(f"{mark}|{re.escape(_escaped(mark))}", marked)
        text = "".join(parts)
        positions, position = set(), 0
        for part in parts[:-1]:
            position += len(part)
            positions.add(position)
        plain: list[tuple[int, int]] = []
        written = 0
        for match in self._exact.finditer(text):
            start, end = match.span(1)
            if any(p in positions for p in range(start + 1, end)):
                if plain and start < plain[-1][1]:
                    start, end = plain[-1][0], max(end, plain[-1][1])
                    plain.pop()
                plain.append((start, end))
            else:
                written += 1
        return Read(text, tuple(plain), written)


def _alternatives(words: Collection[str]) -> str:
    """Return a regex for the longest of some words. Common beginnings stand once, since there can be hundreds."""
    if not words:
        return "(?!)"
    prefix = os.path.commonprefix(list(words))  # noqa: RUF071
    groups: dict[str, list[str]] = {}
    for word in words:
        groups.setdefault(word[len(prefix) : len(prefix) + 1], []).append(word[len(prefix) :])
    ends = groups.pop("", None)
    rest = "|".join(map(_alternatives, groups.values()))
    return re.escape(prefix) + (f"(?:{rest}){'?' if ends else ''}" if rest else "")


def _around(text: str, change: Callable[[str], str]) -> str:
    """Return a string whose text between blanks at both ends is changed."""
    core = text.strip()
    before, _, after = text.partition(core) if core else (text, "", "")
    return before + change(core) + after


def _escaped(character: str) -> str:
    """Return a noncharacter as JSON's ASCII writes it."""
    return f"\\u{ord(character):04x}"


def strings_of(value: Any) -> Iterator[str]:
    """Return every string of nested data, keys too."""
    stack = [value]
    while stack:
        part = stack.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, Mapping):
            stack.extend(part)
            stack.extend(part.values())
        elif isinstance(part, (list, tuple)):
            stack.extend(part)


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Return nested data with every string changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {mapped(k, change): mapped(v, change) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(v, change) for v in value)
    return value


def mapped_messages(messages: list[dict[str, Any]], change: Callable[[str], str]) -> list[dict[str, Any]]:
    """Return messages with every string changed except known roles."""
    return [
        {
            mapped(k, change): v if k == "role" and isinstance(v, str) and v in ROLES else mapped(v, change)
            for k, v in message.items()
        }
        for message in messages
    ]
