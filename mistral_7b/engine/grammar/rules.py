"""A JSON schema as rules of a Lark grammar that allow the JSON texts that obey it, and never come to a dead end.

    value: OPEN "\\"a\\"" COLON value_1 (COMMA "\\"b\\"" COLON value_2)? CLOSE
    value_1: VALUE_3

First all places that a value can come to are read (schema.py), then those that no finite text obeys are struck
out, and what is left is written down: what is allowed at any point can be finished.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import Any, NoReturn

from ...errors import GrammarError
from . import digits, strings
from .digits import Bound
from .schema import Reader
from .shapes import Array, Literal, Number, Object, Places, Shape

RULES = 20_000
STEPS = 20_000  # a number's multiples are told apart by an automaton with as many states: time and memory
PATTERNS = 6  # of names in one object; 2 to the power of it are the ways in which they overlap
EXACT = 2**53  # whole numbers up to here are exact as floats, as which llguidance takes multiples and their bounds


@dataclass(frozen=True)
class Style:
    """How JSON is spaced: regexes of what stands between its parts."""

    comma: str = ","
    colon: str = ":"
    inside: str = ""  # next to a bracket that is not empty, and within an empty pair


BLANKS = "[ \\n\\r\\t]{0,64}"  # room to indent, and an end to it
FREE = Style(f"{BLANKS},{BLANKS}", f"{BLANKS}:{BLANKS}", BLANKS)
AS_TRAINED = Style(", ", ": ")  # Python's json.dumps


def rules(schema: Any, where: str, name: str, style: Style = FREE) -> str:
    """Rules for `name`, and others whose names begin with it, of the JSON texts that obey a schema.

    Raises GrammarError where a keyword cannot be obeyed exactly, with its name and place, or no text obeys;
    `where` is what it calls the schema.
    """
    return _Writer(Reader(schema, where), where, name, style).text(("#",))


@dataclass(frozen=True)
class _Cell:
    """The properties whose names match the same patterns and are none of the schema's own."""

    terminal: str
    places: Places


class _Writer:
    def __init__(self, reader: Reader, where: str, name: str, style: Style) -> None:
        self._reader, self._where, self._name, self._style = reader, where, name, style
        self._shapes: dict[Places, list[Shape]] = {}
        self._cells: dict[Object, list[_Cell]] = {}
        self._possible: set[Places] = set()  # some finite text obeys them
        self._alike: dict[tuple[Shape, ...], Places] = {}  # the first places with these shapes
        self._rules: dict[Places, str] = {}  # names
        self._left: list[Places] = []  # whose rules are to be written
        self._texts: dict[str, str] = {}  # names of rules that are parts of others
        self._terminals: dict[str, str] = {}  # names
        self._lines: list[str] = []
        self._count = 0

    def text(self, start: Places) -> str:
        self._read(start)
        self._find_possible()
        if start not in self._possible:
            raise GrammarError(f"{self._where}: no text obeys the schema", field=self._where)
        self._rules[start] = self._name
        self._left.append(start)
        for places in self._left:  # which grows
            self._line(self._rules[places], " | ".join(self._alternatives(places)))
        return "\n".join([*self._lines, *(f"{name}: {terminal}" for terminal, name in self._terminals.items())])

    def _read(self, start: Places) -> None:
        """Read all that a value can come to."""
        left = [start]
        while left:
            places = left.pop()
            if places not in self._shapes:
                try:
                    self._shapes[places] = self._reader.shapes(places)
                    left += [inner for shape in self._shapes[places] for inner in self._inside(shape)]
                except strings.TerminalError as e:
                    self._refuse(places, f"{strings.TOO_MUCH}: {e}")
                self._alike.setdefault(tuple(self._shapes[places]), places)
            if len(self._shapes) > RULES:
                raise GrammarError(f"{self._where} is too large", field=self._where)

    def _inside(self, shape: Shape) -> Iterator[Places]:
        """All that what stands inside must obey."""
        if isinstance(shape, Array):
            yield from (shape.item(i) for i in range(shape.fixed + 1))
        elif isinstance(shape, Object):
            yield from (shape.property(name) for name in shape.names)
            yield from (cell.places for cell in self._cells_of(shape))

    def _cells_of(self, shape: Object) -> list[_Cell]:
        """The properties that are none of the schema's own, by the patterns that their names match."""
        if shape not in self._cells:
            patterns, own = shape.patterns, " | ".join(map(strings.literal, shape.names))
            if len(patterns) > PATTERNS:
                raise GrammarError(
                    f"{self._where}: more than {PATTERNS} patternProperties in one object", field=self._where
                )
            found: dict[Places, list[str]] = {}
            for flags in product((True, False), repeat=len(patterns)):
                matched = [pattern for pattern, flag in zip(patterns, flags, strict=True) if flag]
                terms = [("" if p in matched else "~") + strings.of_pattern(p) for p in patterns]
                terms += [] if matched else [strings.STRING]
                terminal = " & ".join([*terms, f"~({own})"] if own else terms)
                if not patterns or not strings.is_empty(terminal):
                    found.setdefault(shape.others(matched), []).append(terminal)
            self._cells[shape] = [_Cell(" | ".join(terms), places) for places, terms in found.items()]
        return self._cells[shape]

    def _find_possible(self) -> None:
        """Find what finite texts obey: what is possible makes that possible in which it stands."""
        users: dict[Places, list[Places]] = {}
        for places, shapes in self._shapes.items():
            for inner in {inner for shape in shapes for inner in self._inside(shape)}:
                users.setdefault(inner, []).append(places)
        left = list(self._shapes)
        while left:
            places = left.pop()
            if places not in self._possible and any(map(self._is_possible, self._shapes[places])):
                self._possible.add(places)
                left += users.get(places, [])
        for places, shapes in self._shapes.items():
            for shape in shapes:
                if isinstance(shape, Object) and shape.least > self._most_distinct(shape) and self._extra(shape):
                    self._refuse(places, "minProperties is not supported beyond the names in the schema and one")

    def _is_possible(self, shape: Shape) -> bool:
        if isinstance(shape, Array):
            needed = range(min(shape.least, shape.fixed + 1))
            return all(shape.item(i) in self._possible for i in needed)
        if isinstance(shape, Object):
            required = all(shape.property(name) in self._possible for name in shape.required)
            return required and shape.least <= self._most_distinct(shape)
        return True

    def _extra(self, shape: Object) -> list[_Cell]:
        return [cell for cell in self._cells_of(shape) if cell.places in self._possible]

    def _most_distinct(self, shape: Object) -> int:
        """The properties that are sure to differ in name: each of the schema's own, and one other."""
        named = sum(shape.property(name) in self._possible for name in shape.names)
        return named + bool(self._extra(shape))

    def _alternatives(self, places: Places) -> list[str]:
        """What may be written for a value."""
        terminals: list[str] = []
        rules: list[str] = []
        for shape in filter(self._is_possible, self._shapes[places]):
            if isinstance(shape, Literal):
                terminals.append(f'"{shape.text}"')
            elif isinstance(shape, Array):
                rules.append(self._array(shape))
            elif isinstance(shape, Object):
                rules.append(self._object(shape))
            elif terminal := shape.terminal():
                terminals.append(terminal)
            elif isinstance(shape, Number) and shape.unit:
                rules.append(self._multiples(places, shape, shape.unit))
        return [self._terminal(" | ".join(terminals)), *rules] if terminals else rules

    def _array(self, shape: Array) -> str:
        most = shape.most
        impossible = [i for i in range(shape.fixed + 1) if shape.item(i) not in self._possible]
        if impossible and (most is None or most > impossible[0]):
            most = impossible[0]
        fixed = shape.fixed if most is None else min(shape.fixed, most)
        rest = None if most is None else most - fixed
        comma = self._terminal(f"/{self._style.comma}/")
        text = ""
        if rest != 0:
            item = self._rule(shape.item(shape.fixed))
            if fixed:
                text = _repeated(f"{comma} {item}", max(shape.least - fixed, 0), rest)
            else:
                more = _repeated(f"{comma} {item}", max(shape.least - 1, 0), None if rest is None else rest - 1)
                text = f"{item} {more}"
        for i in reversed(range(fixed)):
            text = f"{comma if i else ''} {self._rule(shape.item(i))} {text}".strip()
            if i and i >= shape.least:
                text = f"{self._named(text)}?"
        return self._bracketed("[]", text, may_be_empty=shape.least == 0)

    def _object(self, shape: Object) -> str:
        """Its own properties in the order of the schema, and others behind them.

        `first` is what may be written while no property has come, and `rests[n]` where n have: as many as matter.
        """
        comma, colon = self._terminal(f"/{self._style.comma}/"), self._terminal(f"/{self._style.colon}/")
        names = [name for name in shape.names if shape.property(name) in self._possible]
        matter = max(1, min(len(names), max(shape.least, shape.most or 0)))
        if matter * len(names) > RULES:
            raise GrammarError(f"{self._where}: minProperties or maxProperties is too large", field=self._where)
        first, rests = self._others(shape, matter, comma, colon)
        required = [name in shape.required for name in names]
        for i in reversed(range(len(names))):
            pair = f"{strings.literal(names[i])} {colon} {self._rule(shape.property(names[i]))}"
            may_be_first = not any(required[:i])
            if (may_be_first and i) or matter > 1:  # it is written more than once
                rests = [rest and self._named(rest) for rest in rests]
            options = [] if rests[1] is None else [f"{pair} {rests[1]}"]
            options += [] if required[i] or first is None else [first]
            first = self._named(" | ".join(options)) if may_be_first and options else None
            before: list[str | None] = [None]
            for n in range(1, matter + 1):
                more = rests[min(n + 1, matter)] if shape.most is None or n < shape.most else None
                same = None if required[i] else rests[n]
                if more is not None and more == same:
                    before.append(f"({comma} {pair})? {same}")
                else:
                    ways = [] if more is None else [f"{comma} {pair} {more}"]
                    ways += [] if same is None else [same or '""']
                    before.append(ways[0] if len(ways) == 1 else f"({' | '.join(ways)})" if ways else None)
            rests = before
        return self._bracketed("{}", first or "", may_be_empty=not shape.required and shape.least == 0)

    def _others(self, shape: Object, matter: int, comma: str, colon: str) -> tuple[str | None, list[str | None]]:
        """What may be written behind the schema's own properties, none or n of which have come."""
        cells = self._extra(shape)
        pairs = [f"{self._terminal(cell.terminal)} {colon} {self._rule(cell.places)}" for cell in cells]
        pair = self._named(" | ".join(pairs)) if pairs else ""
        rests: list[str | None] = []
        for n in range(matter + 1):
            missing, room = shape.least - n, None if shape.most is None else shape.most - n
            if missing > (1 if cells and room != 0 else 0) or (room is not None and room < 0):
                rests.append(None)
            else:
                rests.append(_repeated(f"{comma} {pair}", max(missing, 0), room) if cells else "")
        if not cells or shape.most == 0 or rests[0] is None:
            return None, rests
        return f"{pair} {_repeated(f'{comma} {pair}', 0, None if shape.most is None else shape.most - 1)}", rests

    def _bracketed(self, pair: str, text: str, may_be_empty: bool) -> str:
        inside = self._style.inside
        begin, end = self._terminal(f"/\\{pair[0]}{inside}/"), self._terminal(f"/{inside}\\{pair[1]}/")
        empty = f'"{pair[1]}"'
        if not text:
            return f"{begin} {empty}"
        return f"{begin} ({text} {end} | {empty})" if may_be_empty else f"{begin} {text} {end}"

    def _multiples(self, places: Places, number: Number, unit: Fraction) -> str:
        """Multiples of a unit, which llguidance counts itself."""
        schema: dict[str, Any] = {"type": "integer" if number.whole else "number"}
        for key, bound in (("multipleOf", Bound(unit)), ("minimum", number.low), ("maximum", number.high)):
            if bound is not None:
                value: int | float = float(bound.value) if bound.value.denominator > 1 else int(bound.value)
                if abs(value) > EXACT or Fraction(str(value)) != bound.value:
                    self._refuse(places, "multipleOf is supported for numbers up to 2**53, of 15 digits")
                schema[f"exclusive{key.capitalize()}" if bound.open else key] = value
        written = digits.written(unit)
        if int(written.replace(".", "")) > STEPS:
            self._refuse(places, f"multipleOf {written} takes too long; give a rounder number")
        leaf = f"%json {json.dumps({**schema, 'x-guidance': {'whitespace_flexible': False}})}"
        if fault := strings.fault(leaf):
            self._refuse(places, f"multipleOf {written} cannot be followed: {fault}")
        return leaf

    def _refuse(self, places: Places, reason: str) -> NoReturn:
        self._reader.refuse(" and ".join(places), reason)

    def _rule(self, places: Places) -> str:
        """The name of the rule of a value."""
        places = self._alike[tuple(self._shapes[places])]
        if places not in self._rules:
            self._rules[places] = self._fresh()
            self._left.append(places)
        return self._rules[places]

    def _named(self, text: str) -> str:
        """A rule for what is written, by its name; what is short stands for itself."""
        if " " not in text.strip():
            return text.strip()
        if text not in self._texts:
            self._texts[text] = self._fresh()
            self._line(self._texts[text], text)
        return self._texts[text]

    def _terminal(self, terminal: str) -> str:
        """The name of a terminal."""
        return self._terminals.setdefault(terminal, f"{self._name.upper()}_{len(self._terminals)}")

    def _fresh(self) -> str:
        self._count += 1
        return f"{self._name}_{self._count}"

    def _line(self, name: str, text: str) -> None:
        self._lines.append(f"{name}: {text}")


def _repeated(text: str, least: int, most: int | None) -> str:
    """So many times."""
    if most == 0:
        return ""
    if most is None:
        return f"({text})*" if least == 0 else f"({text}){{{least},}}"
    return f"({text}){{{least},{most}}}"
