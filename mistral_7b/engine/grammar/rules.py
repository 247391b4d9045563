"""Compiles a JSON schema into Lark rules for the JSON texts that match it, without dead ends.

    value: OPEN "\\"a\\"" COLON value_1 (COMMA "\\"b\\"" COLON value_2)? CLOSE
    value_1: VALUE_3

All reachable subschemas are parsed first (schema.py). Those that no finite text matches are removed, and rules are
written for the rest. So every allowed prefix can be completed.
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
from .schema import SchemaReader
from .shapes import Array, Literal, Number, Object, Shape, Subschemas

MAX_RULES = 20_000
MAX_STEPS = 20_000  # of multipleOf, without the point: states of the automaton that recognizes its multiples
MAX_PATTERNS = 6  # patternProperties in one object; their 2**n combinations are enumerated
MAX_EXACT_INTEGER = 2**53  # llguidance takes multiples and bounds as floats, which are exact up to here


@dataclass(frozen=True)
class Style:
    """The whitespace of JSON, as regexes of its separators."""

    comma: str = ","
    colon: str = ":"
    inside: str = ""  # inside brackets: after the opening and before the closing one


WHITESPACE = "[ \\n\\r\\t]{0,64}"  # enough to indent; bounded, so that whitespace ends
FLEXIBLE = Style(f"{WHITESPACE},{WHITESPACE}", f"{WHITESPACE}:{WHITESPACE}", WHITESPACE)
JSON_DUMPS = Style(", ", ": ")  # Python's json.dumps


def rules(schema: Any, where: str, name: str, style: Style = FLEXIBLE) -> str:
    """Lark rules for `name`, and auxiliary rules prefixed with it, of the JSON texts that match a schema.

    Raises GrammarError, with name and place, for a keyword that cannot be enforced exactly, and for a schema that
    no text matches. `where` is the schema's name in errors.
    """
    return _Writer(SchemaReader(schema, where), where, name, style).text(("#",))


@dataclass(frozen=True)
class _NameClass:
    """The additional property names that match the same patternProperties, and the subschemas of their values."""

    terminal: str
    subschemas: Subschemas


class _Writer:
    def __init__(self, reader: SchemaReader, where: str, name: str, style: Style) -> None:
        self._reader, self._where, self._name, self._style = reader, where, name, style
        self._shapes: dict[Subschemas, list[Shape]] = {}
        self._name_classes: dict[Object, list[_NameClass]] = {}
        self._satisfiable: set[Subschemas] = set()  # those that some finite text matches
        self._canonical: dict[tuple[Shape, ...], Subschemas] = {}  # one representative of equal shapes
        self._rules: dict[Subschemas, str] = {}  # rule names
        self._pending: list[Subschemas] = []  # in the order in which their rules are written
        self._shared_rules: dict[str, str] = {}  # names of auxiliary rules by their text
        self._terminals: dict[str, str] = {}  # names by terminal
        self._lines: list[str] = []
        self._count = 0

    def text(self, start: Subschemas) -> str:
        """All rules and terminals of the grammar."""
        self._read(start)
        self._find_satisfiable()
        if start not in self._satisfiable:
            raise GrammarError(f"{self._where}: no text matches the schema", field=self._where)
        self._rules[start] = self._name
        self._pending.append(start)
        for subschemas in self._pending:  # grows while rules are written
            self._add_rule(self._rules[subschemas], " | ".join(self._alternatives(subschemas)))
        return "\n".join([*self._lines, *(f"{name}: {terminal}" for terminal, name in self._terminals.items())])

    def _read(self, start: Subschemas) -> None:
        """Parse all subschemas that are reachable from `start`."""
        pending = [start]
        while pending:
            subschemas = pending.pop()
            if subschemas not in self._shapes:
                try:
                    self._shapes[subschemas] = self._reader.shapes(subschemas)
                    pending += [inner for shape in self._shapes[subschemas] for inner in self._children(shape)]
                except strings.TerminalError as e:
                    self._refuse(subschemas, f"{strings.TOO_LARGE}: {e}")
                self._canonical.setdefault(tuple(self._shapes[subschemas]), subschemas)
            if len(self._shapes) > MAX_RULES:
                raise GrammarError(f"{self._where} is too large", field=self._where)

    def _children(self, shape: Shape) -> Iterator[Subschemas]:
        """The subschemas of the items or properties of a shape."""
        if isinstance(shape, Array):
            yield from (shape.item(i) for i in range(shape.prefix_length + 1))
        elif isinstance(shape, Object):
            yield from (shape.property(name) for name in shape.names)
            yield from (name_class.subschemas for name_class in self._name_classes_of(shape))

    def _name_classes_of(self, shape: Object) -> list[_NameClass]:
        """The classes of additional property names, by the patterns that the names match."""
        if shape not in self._name_classes:
            patterns, own = shape.patterns, " | ".join(map(strings.literal, shape.names))
            if len(patterns) > MAX_PATTERNS:
                raise GrammarError(
                    f"{self._where}: more than {MAX_PATTERNS} patternProperties in one object", field=self._where
                )
            found: dict[Subschemas, list[str]] = {}
            for flags in product((True, False), repeat=len(patterns)):
                matched = [pattern for pattern, flag in zip(patterns, flags, strict=True) if flag]
                terms = [("" if p in matched else "~") + strings.of_pattern(p) for p in patterns]
                terms += [] if matched else [strings.STRING]
                terminal = " & ".join([*terms, f"~({own})"] if own else terms)
                if not patterns or not strings.is_empty(terminal):
                    found.setdefault(shape.others(matched), []).append(terminal)
            self._name_classes[shape] = [
                _NameClass(" | ".join(terms), subschemas) for subschemas, terms in found.items()
            ]
        return self._name_classes[shape]

    def _find_satisfiable(self) -> None:
        """Find all subschemas that finite texts match, propagating from each to those that contain it."""
        users: dict[Subschemas, list[Subschemas]] = {}
        for subschemas, shapes in self._shapes.items():
            for inner in {inner for shape in shapes for inner in self._children(shape)}:
                users.setdefault(inner, []).append(subschemas)
        pending = list(self._shapes)
        while pending:
            subschemas = pending.pop()
            if subschemas not in self._satisfiable and any(map(self._is_satisfiable, self._shapes[subschemas])):
                self._satisfiable.add(subschemas)
                pending += users.get(subschemas, [])
        for subschemas, shapes in self._shapes.items():
            for shape in shapes:
                if (
                    isinstance(shape, Object)
                    and shape.min_size > self._max_distinct_names(shape)
                    and self._additional_classes(shape)
                ):
                    self._refuse(
                        subschemas, "minProperties is not supported beyond the names in the schema and one"
                    )

    def _is_satisfiable(self, shape: Shape) -> bool:
        if isinstance(shape, Array):
            needed = range(min(shape.min_size, shape.prefix_length + 1))
            return all(shape.item(i) in self._satisfiable for i in needed)
        if isinstance(shape, Object):
            required = all(shape.property(name) in self._satisfiable for name in shape.required)
            return required and shape.min_size <= self._max_distinct_names(shape)
        return True

    def _additional_classes(self, shape: Object) -> list[_NameClass]:
        return [
            name_class for name_class in self._name_classes_of(shape) if name_class.subschemas in self._satisfiable
        ]

    def _max_distinct_names(self, shape: Object) -> int:
        """The number of properties with certainly distinct names: each named one, and one additional."""
        named = sum(shape.property(name) in self._satisfiable for name in shape.names)
        return named + bool(self._additional_classes(shape))

    def _alternatives(self, subschemas: Subschemas) -> list[str]:
        """The alternatives of the rule for a value."""
        terminals: list[str] = []
        rules: list[str] = []
        for shape in filter(self._is_satisfiable, self._shapes[subschemas]):
            if isinstance(shape, Literal):
                terminals.append(f'"{shape.text}"')
            elif isinstance(shape, Array):
                rules.append(self._array(shape))
            elif isinstance(shape, Object):
                rules.append(self._object(shape))
            elif terminal := shape.terminal():
                terminals.append(terminal)
            elif isinstance(shape, Number) and shape.unit:
                rules.append(self._multiples(subschemas, shape, shape.unit))
        return [self._terminal(" | ".join(terminals)), *rules] if terminals else rules

    def _array(self, shape: Array) -> str:
        most = shape.max_size
        unsatisfiable = [i for i in range(shape.prefix_length + 1) if shape.item(i) not in self._satisfiable]
        if unsatisfiable and (most is None or most > unsatisfiable[0]):
            most = unsatisfiable[0]
        fixed = shape.prefix_length if most is None else min(shape.prefix_length, most)
        rest = None if most is None else most - fixed
        comma = self._terminal(f"/{self._style.comma}/")
        text = ""
        if rest != 0:
            item = self._rule(shape.item(shape.prefix_length))
            if fixed:
                text = _repeat(f"{comma} {item}", max(shape.min_size - fixed, 0), rest)
            else:
                more = _repeat(f"{comma} {item}", max(shape.min_size - 1, 0), None if rest is None else rest - 1)
                text = f"{item} {more}"
        for i in reversed(range(fixed)):
            text = f"{comma if i else ''} {self._rule(shape.item(i))} {text}".strip()
            if i and i >= shape.min_size:
                text = f"{self._shared_rule(text)}?"
        return self._bracketed("[]", text, may_be_empty=shape.min_size == 0)

    def _object(self, shape: Object) -> str:
        """The named properties in the order of the schema, then additional ones.

        Built from the last property to the first. `first` is the rest of the object before any property, and
        `tails[n]` after n properties, up to the number `counted` beyond which the count has no effect.
        """
        comma, colon = self._terminal(f"/{self._style.comma}/"), self._terminal(f"/{self._style.colon}/")
        names = [name for name in shape.names if shape.property(name) in self._satisfiable]
        counted = max(1, min(len(names), max(shape.min_size, shape.max_size or 0)))
        if counted * len(names) > MAX_RULES:
            raise GrammarError(f"{self._where}: minProperties or maxProperties is too large", field=self._where)
        first, tails = self._additional(shape, counted, comma, colon)
        required = [name in shape.required for name in names]
        for i in reversed(range(len(names))):
            pair = f"{strings.literal(names[i])} {colon} {self._rule(shape.property(names[i]))}"
            may_be_first = not any(required[:i])
            if (may_be_first and i) or counted > 1:  # used more than once
                tails = [rest and self._shared_rule(rest) for rest in tails]
            options = [] if tails[1] is None else [f"{pair} {tails[1]}"]
            options += [] if required[i] or first is None else [first]
            first = self._shared_rule(" | ".join(options)) if may_be_first and options else None
            before: list[str | None] = [None]
            for n in range(1, counted + 1):
                more = tails[min(n + 1, counted)] if shape.max_size is None or n < shape.max_size else None
                same = None if required[i] else tails[n]
                if more is not None and more == same:
                    before.append(f"({comma} {pair})? {same}")
                else:
                    choices = [] if more is None else [f"{comma} {pair} {more}"]
                    choices += [] if same is None else [same or '""']
                    text = " | ".join(choices)
                    before.append(f"({text})" if len(choices) > 1 else text or None)
            tails = before
        return self._bracketed("{}", first or "", may_be_empty=not shape.required and shape.min_size == 0)

    def _additional(
        self, shape: Object, counted: int, comma: str, colon: str
    ) -> tuple[str | None, list[str | None]]:
        """The additional properties: `first` and `tails` of `_object` after the named properties."""
        classes = self._additional_classes(shape)
        pairs = [
            f"{self._terminal(name_class.terminal)} {colon} {self._rule(name_class.subschemas)}"
            for name_class in classes
        ]
        pair = self._shared_rule(" | ".join(pairs)) if pairs else ""
        tails: list[str | None] = []
        for n in range(counted + 1):
            missing, room = shape.min_size - n, None if shape.max_size is None else shape.max_size - n
            if missing > (1 if classes and room != 0 else 0) or (room is not None and room < 0):
                tails.append(None)
            else:
                tails.append(_repeat(f"{comma} {pair}", max(missing, 0), room) if classes else "")
        if not classes or shape.max_size == 0 or tails[0] is None:
            return None, tails
        more = None if shape.max_size is None else shape.max_size - 1
        return f"{pair} {_repeat(f'{comma} {pair}', 0, more)}", tails

    def _bracketed(self, pair: str, text: str, may_be_empty: bool) -> str:
        inside = self._style.inside
        begin, end = self._terminal(f"/\\{pair[0]}{inside}/"), self._terminal(f"/{inside}\\{pair[1]}/")
        empty = f'"{pair[1]}"'
        if not text:
            return f"{begin} {empty}"
        return f"{begin} ({text} {end} | {empty})" if may_be_empty else f"{begin} {text} {end}"

    def _multiples(self, subschemas: Subschemas, number: Number, unit: Fraction) -> str:
        """Multiples of `unit` between the bounds, as llguidance's own %json."""
        schema: dict[str, Any] = {"type": "integer" if number.integer else "number"}
        for key, bound in (("multipleOf", Bound(unit)), ("minimum", number.low), ("maximum", number.high)):
            if bound is not None:
                value: int | float = float(bound.value) if bound.value.denominator > 1 else int(bound.value)
                if abs(value) > MAX_EXACT_INTEGER or Fraction(str(value)) != bound.value:
                    self._refuse(subschemas, "multipleOf is supported for numbers up to 2**53, of 15 digits")
                schema[f"exclusive{key.capitalize()}" if bound.open else key] = value
        written = digits.format_decimal(unit)
        if int(written.replace(".", "")) > MAX_STEPS:
            self._refuse(subschemas, f"multipleOf {written} takes too long; use a rounder number")
        leaf = f"%json {json.dumps({**schema, 'x-guidance': {'whitespace_flexible': False}})}"
        if fault := strings.compile_error(leaf):
            self._refuse(subschemas, f"multipleOf {written} cannot be compiled: {fault}")
        return leaf

    def _refuse(self, subschemas: Subschemas, reason: str) -> NoReturn:
        self._reader.refuse(" and ".join(subschemas), reason)

    def _rule(self, subschemas: Subschemas) -> str:
        """The name of the rule for a value."""
        subschemas = self._canonical[tuple(self._shapes[subschemas])]
        if subschemas not in self._rules:
            self._rules[subschemas] = self._new_name()
            self._pending.append(subschemas)
        return self._rules[subschemas]

    def _shared_rule(self, text: str) -> str:
        """The name of an auxiliary rule with this text; a single symbol is returned as it is."""
        if " " not in text.strip():
            return text.strip()
        if text not in self._shared_rules:
            self._shared_rules[text] = self._new_name()
            self._add_rule(self._shared_rules[text], text)
        return self._shared_rules[text]

    def _terminal(self, terminal: str) -> str:
        """The name of a terminal, which is added if it is new."""
        return self._terminals.setdefault(terminal, f"{self._name.upper()}_{len(self._terminals)}")

    def _new_name(self) -> str:
        self._count += 1
        return f"{self._name}_{self._count}"

    def _add_rule(self, name: str, text: str) -> None:
        self._lines.append(f"{name}: {text}")


def _repeat(text: str, least: int, most: int | None) -> str:
    """A text repeated `least` to `most` times; None is unbounded."""
    if most == 0:
        return ""
    if most is None:
        return f"({text})*" if least == 0 else f"({text}){{{least},}}"
    return f"({text}){{{least},{most}}}"
