"""JSON schemas, of Draft 2020-12 and what older ones write otherwise, read as shapes.

Every keyword is obeyed exactly, or it is refused by its name and place. What the drafts call annotations, and
keywords that no draft knows, say nothing about a value and are passed over. `format` is obeyed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any, NoReturn
from urllib.parse import unquote

from ...errors import GrammarError
from . import pointers, shapes, strings
from .digits import Bound
from .shapes import ANYTHING, Array, Literal, Number, Object, Places, Properties, Shape, Text

MEETS = 200_000  # intersections of shapes that a schema may ask for
DEEPEST = 100  # schemas applied to one value, each inside another
DIGITS = 400  # of a number, before and behind the point
LARGEST, SMALLEST = 10**DIGITS, Fraction(1, 10**DIGITS)
COUNT = 2**31 - 1  # of characters, items or properties: no text holds as many
NOTHING = "!"  # the place of a schema that allows no value

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
REFUSED = (
    "not", "if", "contains", "uniqueItems", "unevaluatedItems", "unevaluatedProperties", "propertyNames",
    "dependentRequired", "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef", "extends", "disallow",
)  # fmt: skip
# Values with which they ask for nothing.
HARMLESS = {"not": (False,), "uniqueItems": (False,), "contains": (), "if": ()}
OWN = (
    "type", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength",
    "pattern", "format", "items", "prefixItems", "additionalItems", "minItems", "maxItems", "properties",
    "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties",
)  # fmt: skip
OLD = re.compile(r"draft-?0[3-7]|2019-09")  # drafts in which prefixItems means nothing


class _LoopError(GrammarError):
    """A schema that refers to itself for one and the same value."""


class Reader:
    """A schema, read place by place as it is asked for.

    A place is a JSON pointer, "#/properties/a". Behind "=" it is that of a value, which alone is allowed there.
    `where` is what errors call the schema.
    """

    def __init__(self, schema: Any, where: str) -> None:
        self._where = where
        self._values: dict[str, Any] = {"#": schema, NOTHING: False}
        self._known: dict[str, list[Shape]] = {}
        self._active: list[str] = []
        self._meets = 0

    def shapes(self, places: Places) -> list[Shape]:
        """What a value may be that obeys the schemas at all of these places."""
        found = self._at(places[0]) if places else list(ANYTHING)
        for place in places[1:]:
            found = self._meet(found, self._at(place))
        return found

    def refuse(self, place: str, reason: str) -> NoReturn:
        raise GrammarError(f"{self._where}: {reason}, at {place:.150}", field=self._where)

    def _at(self, place: str) -> list[Shape]:
        if place not in self._known:
            if place in self._active:
                raise _LoopError(
                    f"{self._where}: no text obeys a schema that refers to itself, at {place:.150}",
                    field=self._where,
                )
            if len(self._active) >= DEEPEST:
                self.refuse(place, f"more than {DEEPEST} schemas apply to one value")
            self._active.append(place)
            try:
                if place.startswith("="):
                    self._known[place] = [self._literal(place)]
                else:
                    self._known[place] = self._read(place)
            except strings.TerminalError as e:
                self.refuse(place, f"{strings.TOO_MUCH}: {e}")
            finally:
                self._active.pop()
        return self._known[place]

    def _meet(self, some: Iterable[Shape], others: list[Shape]) -> list[Shape]:
        """What is in one of some shapes and in one of others."""
        some = list(some)
        self._meets += len(some) * len(others)
        if self._meets > MEETS:
            raise GrammarError(f"{self._where} has too many combinations of alternatives", field=self._where)
        met = [shapes.meet(one, other) for one in some for other in others]
        return list(dict.fromkeys(shape for shape in met if shape is not None))

    def _read(self, place: str) -> list[Shape]:
        """What the schema at a place allows."""
        schema = self._values[place]
        if isinstance(schema, bool):
            return list(ANYTHING) if schema else []
        if not isinstance(schema, Mapping):
            self.refuse(place, f"a JSON schema is an object, true or false, not {schema!r:.80}")
        for key in REFUSED:
            if key in schema and schema[key] not in HARMLESS.get(key, (True, {})):
                self.refuse(place, f"{key} is not supported")
        # In the order of the schema, which is that of the properties.
        first = next((key for key in schema if key in ("properties", "required")), None)
        first = first or next((key for key in schema if key in OWN), None)
        found = list(ANYTHING)
        for key in schema:
            if key == first:
                found = self._meet(found, self._own(place, schema))
            elif key in ("const", "enum", "allOf", "anyOf", "oneOf", "$ref"):
                for allowed in self._applied(place, key, schema[key]):
                    found = self._meet(found, allowed)
        return found

    def _applied(self, place: str, key: str, value: Any) -> Iterable[list[Shape]]:
        """What a keyword allows that is about values of every type; all of these hold."""
        if key == "const":
            yield self._at(self._child(place, key, of_value=True))
        elif key == "$ref":
            yield self._at(self._target(place, value))
        else:
            if not isinstance(value, list) or (not value and key != "enum"):
                self.refuse(place, f"{key} must be a list of at least one schema, not {value!r:.80}")
            base = self._child(place, key)
            if key == "enum":
                options = [self._child(base, i, of_value=True) for i in range(len(value))]
            else:
                options = [self._child(base, i) for i in range(len(value))]
            if key == "oneOf":
                self._check_apart(place, options)
            each = map(self._at, options)
            yield from each if key == "allOf" else [list(dict.fromkeys(one for some in each for one in some))]

    def _check_apart(self, place: str, options: list[str]) -> None:
        """Refuse alternatives of which more than one may hold, for oneOf is then none of anyOf's business."""
        rest = f"{place}~oneOf"
        self._values[rest] = {key: value for key, value in self._values[place].items() if key != "oneOf"}
        for i, one in enumerate(options):
            for other in options[i + 1 :]:
                if not self._is_empty((one, other, rest), 3):
                    self.refuse(place, f"oneOf is not supported where {one} and {other} may both hold")

    def _is_empty(self, places: Places, depth: int) -> bool:
        """Whether it is plain that no value obeys all of these, looking so many levels into objects."""
        try:
            found = self.shapes(places)
        except _LoopError:
            return False
        return all(
            depth > 0
            and isinstance(shape, Object)
            and any(self._is_empty(shape.property(name), depth - 1) for name in shape.required)
            for shape in found
        )

    def _literal(self, place: str) -> Shape:
        """The value at a place, and no other."""
        value = self._values[place]
        if value is None or isinstance(value, bool):
            return Literal({None: "null", True: "true", False: "false"}[value])
        if isinstance(value, int | float):
            number = self._exact(place, value)
            return Number(Bound(number), Bound(number))
        if isinstance(value, str):
            if any("\ud800" <= char <= "\udfff" for char in value):
                self.refuse(place, f"{value!r:.80} holds half a character")
            return Text(value=value)
        if isinstance(value, list):
            items = tuple((self._child(place, i),) for i in range(len(value)))
            return Array(((items, (NOTHING,)),), len(value), len(value))
        named = tuple((name, (self._child(place, name),)) for name in value)
        return Object((Properties(named, (), (NOTHING,)),), tuple(value))

    def _own(self, place: str, schema: Mapping[str, Any]) -> list[Shape]:
        """What the keywords allow that are each about values of one type."""
        types = schema.get("type", TYPES)
        types = [types] if isinstance(types, str) else types
        if not isinstance(types, list | tuple) or not all(name in TYPES for name in types):
            wrong = types if not isinstance(types, list) else next(name for name in types if name not in TYPES)
            self.refuse(place, f"Invalid type: {wrong!s:.80}; there are {', '.join(TYPES)}")
        found: list[Shape] = []
        if "null" in types:
            found.append(Literal("null"))
        if "boolean" in types:
            found += [Literal("true"), Literal("false")]
        if "number" in types or "integer" in types:
            found.append(self._number(place, schema, whole="number" not in types))
        if "string" in types:
            found.append(self._text(place, schema))
        if "array" in types:
            found.append(self._array(place, schema))
        if "object" in types:
            found.append(self._object(place, schema))
        return found

    def _number(self, place: str, schema: Mapping[str, Any], whole: bool) -> Number:
        ends: dict[int, Bound | None] = {}
        for sign, name, exclusive in ((1, "minimum", "exclusiveMinimum"), (-1, "maximum", "exclusiveMaximum")):
            open_, end = schema.get(exclusive, False), None
            if name in schema:  # in Draft 4, `exclusive` says whether the bound itself is left out
                end = Bound(self._exact(place, schema[name], name), open_ is True)
            if not isinstance(open_, bool):
                end = shapes.tighter(end, Bound(self._exact(place, open_, exclusive), open=True), sign)
            ends[sign] = end
        step = self._exact(place, schema["multipleOf"], "multipleOf") if "multipleOf" in schema else None
        if step is not None and step <= 0:
            self.refuse(place, f"multipleOf must be above 0, not {schema['multipleOf']!r:.80}")
        return Number(ends[1], ends[-1], whole, step)

    def _text(self, place: str, schema: Mapping[str, Any]) -> Text:
        patterns: tuple[str, ...] = ()
        formats: tuple[str, ...] = ()
        if "pattern" in schema:
            patterns = (self._pattern(place, schema["pattern"], "pattern"),)
        if "format" in schema:
            formats = (schema["format"],)
            if formats[0] not in strings.FORMATS:
                known = ", ".join(strings.FORMATS)
                self.refuse(place, f"Unknown format: {formats[0]!s:.80}; known are {known}")
        return Text(*self._counts(place, schema, "minLength", "maxLength"), patterns, formats)

    def _array(self, place: str, schema: Mapping[str, Any]) -> Array:
        least, most = self._counts(place, schema, "minItems", "maxItems")
        prefix, others = "prefixItems", "items"
        if isinstance(schema.get("items"), list):  # as before Draft 2020-12
            prefix, others = "items", "additionalItems"
        elif "prefixItems" in schema and OLD.search(str(self._values["#"].get("$schema", ""))):
            self.refuse(place, "prefixItems is no keyword of the draft that $schema names")
        items: list[Places] = []
        if prefix in schema:
            if not isinstance(schema[prefix], list):
                self.refuse(place, f"{prefix} must be a list of schemas, not {schema[prefix]!r:.80}")
            base = self._child(place, prefix)
            items = [(self._child(base, i),) for i in range(len(schema[prefix]))]
        return Array(((tuple(items), (self._child(place, others),) if others in schema else ()),), least, most)

    def _object(self, place: str, schema: Mapping[str, Any]) -> Object:
        named: dict[str, list[tuple[str, Places]]] = {}
        for key in ("properties", "patternProperties"):
            value = schema.get(key, {})
            if not isinstance(value, Mapping):
                self.refuse(place, f"{key} must be an object of schemas, not {value!r:.80}")
            base = self._child(place, key) if value else ""
            named[key] = [(name, (self._child(base, name),)) for name in value]
        for pattern, _ in named["patternProperties"]:
            self._pattern(place, pattern, "patternProperties")
        others = (self._child(place, "additionalProperties"),) if "additionalProperties" in schema else ()
        required = schema.get("required", [])
        if isinstance(required, bool):
            required = []  # Draft 3 has it in the property
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            self.refuse(place, f"required must be a list of names, not {required!r:.80}")
        properties = Properties(tuple(named["properties"]), tuple(named["patternProperties"]), others)
        counts = self._counts(place, schema, "minProperties", "maxProperties")
        return Object((properties,), tuple(dict.fromkeys(required)), *counts)

    def _counts(self, place: str, schema: Mapping[str, Any], least: str, most: str) -> tuple[int, int | None]:
        for key in (least, most):
            value = schema.get(key, 0)
            whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
            if not whole or value < 0 or (key == least and value > COUNT):
                self.refuse(place, f"{key} must be a whole number from 0 to {COUNT}, not {value!r:.80}")
        limit = schema.get(most)
        return int(schema.get(least, 0)), None if limit is None or limit > COUNT else int(limit)

    def _pattern(self, place: str, pattern: Any, key: str) -> str:
        if not isinstance(pattern, str):
            self.refuse(place, f"{key} must be a regular expression, not {pattern!r:.80}")
        try:
            strings.of_pattern(pattern)
        except GrammarError as e:
            self.refuse(place, f"{key} {pattern!r:.80} cannot be used: {e.message}")
        return pattern

    def _exact(self, place: str, value: Any, key: str = "the number") -> Fraction:
        """A number as it is written: a float is the shortest decimal that means it."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(place, f"{key} must be a number, not {value!r:.80}")
        if not (-LARGEST < value < LARGEST) or (value and abs(value) < SMALLEST):
            self.refuse(place, f"{key} is not a number of at most {DIGITS} digits before and behind the point")
        return Fraction(str(value))

    def _child(self, place: str, key: str | int, of_value: bool = False) -> str:
        """The place below another one."""
        child = f"{'=' * of_value}{place}/{pointers.escaped(str(key))}"
        self._values[child] = self._values[place][key]
        return child

    def _target(self, place: str, reference: Any) -> str:
        """The place to which a $ref refers."""
        root = self._values["#"]
        if not isinstance(reference, str):
            self.refuse(place, f"$ref must be a text, not {reference!r:.80}")
        above = pointers.down(root, pointers.names(place.replace("~oneOf", "")))[1:]
        if any(isinstance(schema, Mapping) and pointers.is_base(schema.get("$id")) for schema in above):
            self.refuse(place, "$ref is not supported within a schema that has an $id of its own")
        base = str(root.get("$id", "")).rstrip("#") if isinstance(root, Mapping) else ""
        target = unquote(reference.removeprefix(base)) or "#"
        if target.startswith("#") and target[1:2] not in ("", "/"):
            target = pointers.anchored(root, target[1:]) or target
        try:
            names = pointers.names(target)
            value = pointers.down(root, names)[-1]
        except (LookupError, ValueError, TypeError):
            self.refuse(place, f"$ref {reference!r:.80} refers to no place in this schema")
        target = "#" + "".join(f"/{pointers.escaped(name)}" for name in names)
        self._values[target] = value
        return target
