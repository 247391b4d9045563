"""Parses JSON schemas of Draft 2020-12 and older drafts into shapes.

Every keyword is enforced exactly, or refused with its name and place. Annotations, and keywords that no draft
defines, do not constrain values and are ignored. `format` is enforced.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any, NoReturn
from urllib.parse import unquote

from ...errors import GrammarError
from . import json_pointer, shapes, strings
from .digits import Bound
from .shapes import ANYTHING, Array, Literal, Number, Object, Properties, Shape, String, Subschemas

MAX_INTERSECTIONS = 200_000  # intersections of shapes in one schema
MAX_DEPTH = 100  # nested schemas that apply to one value
MAX_DIGITS = 400  # of a number, before and after the point
LARGEST, SMALLEST = 10**MAX_DIGITS, Fraction(1, 10**MAX_DIGITS)
MAX_COUNT = 2**31 - 1  # of characters, items or properties; larger limits have no effect
NEVER = "!"  # the pointer to a schema that allows no value

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
UNSUPPORTED = (
    "not", "if", "contains", "uniqueItems", "unevaluatedItems", "unevaluatedProperties", "propertyNames",
    "dependentRequired", "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef", "extends", "disallow",
)  # fmt: skip
# Values with which these keywords have no effect.
NO_EFFECT = {"not": (False,), "uniqueItems": (False,), "contains": (), "if": ()}
TYPED_KEYWORDS = (
    "type", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength",
    "pattern", "format", "items", "prefixItems", "additionalItems", "minItems", "maxItems", "properties",
    "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties",
)  # fmt: skip
OLDER_DRAFTS = re.compile(r"draft-?0[3-7]|2019-09")  # drafts without prefixItems


class _LoopError(GrammarError):
    """A schema refers to itself for the same value, so that it never ends."""


class SchemaReader:
    """A parser of one schema, which parses each subschema when it is first needed.

    Subschemas are named by JSON pointers, "#/properties/a". With "=" in front, a pointer names a literal value of
    const or enum. `where` is the schema's name in errors.
    """

    def __init__(self, schema: Any, where: str) -> None:
        self._where = where
        self._values: dict[str, Any] = {"#": schema, NEVER: False}
        self._cache: dict[str, list[Shape]] = {}
        self._active: list[str] = []
        self._intersections = 0

    def shapes(self, subschemas: Subschemas) -> list[Shape]:
        """The shapes of a value to which all of these subschemas apply."""
        found = self._shapes_at(subschemas[0]) if subschemas else list(ANYTHING)
        for pointer in subschemas[1:]:
            found = self._intersect(found, self._shapes_at(pointer))
        return found

    def refuse(self, pointer: str, reason: str) -> NoReturn:
        """Raise GrammarError with the reason and the place in the schema."""
        raise GrammarError(f"{self._where}: {reason}, at {pointer:.150}", field=self._where)

    def _shapes_at(self, pointer: str) -> list[Shape]:
        if pointer not in self._cache:
            if pointer in self._active:
                raise _LoopError(
                    f"{self._where}: no text matches a schema that refers to itself, at {pointer:.150}",
                    field=self._where,
                )
            if len(self._active) >= MAX_DEPTH:
                self.refuse(pointer, f"more than {MAX_DEPTH} schemas apply to one value")
            self._active.append(pointer)
            try:
                if pointer.startswith("="):
                    self._cache[pointer] = [self._literal(pointer)]
                else:
                    self._cache[pointer] = self._shapes_of_schema(pointer)
            except strings.TerminalError as e:
                self.refuse(pointer, f"{strings.TOO_LARGE}: {e}")
            finally:
                self._active.pop()
        return self._cache[pointer]

    def _intersect(self, some: Iterable[Shape], others: list[Shape]) -> list[Shape]:
        """The intersection of two unions of shapes."""
        some = list(some)
        self._intersections += len(some) * len(others)
        if self._intersections > MAX_INTERSECTIONS:
            raise GrammarError(f"{self._where} has too many combinations of alternatives", field=self._where)
        common = [shapes.intersect(one, other) for one in some for other in others]
        return list(dict.fromkeys(shape for shape in common if shape is not None))

    def _shapes_of_schema(self, pointer: str) -> list[Shape]:
        """The shapes that the schema at a pointer allows."""
        schema = self._values[pointer]
        if isinstance(schema, bool):
            return list(ANYTHING) if schema else []
        if not isinstance(schema, Mapping):
            self.refuse(pointer, f"a JSON schema must be an object, true or false, not {schema!r:.80}")
        for key in UNSUPPORTED:
            if key in schema and schema[key] not in NO_EFFECT.get(key, (True, {})):
                self.refuse(pointer, f"{key} is not supported")
        # Keywords apply in the order of the schema, which sets the order of the properties.
        first = next((key for key in schema if key in ("properties", "required")), None)
        first = first or next((key for key in schema if key in TYPED_KEYWORDS), None)
        found = list(ANYTHING)
        for key in schema:
            if key == first:
                found = self._intersect(found, self._typed(pointer, schema))
            elif key in ("const", "enum", "allOf", "anyOf", "oneOf", "$ref"):
                for allowed in self._applied(pointer, key, schema[key]):
                    found = self._intersect(found, allowed)
        return found

    def _applied(self, pointer: str, key: str, value: Any) -> Iterable[list[Shape]]:
        """The unions of shapes that a keyword for values of any type allows; all of them apply."""
        if key == "const":
            yield self._shapes_at(self._child(pointer, key, of_value=True))
        elif key == "$ref":
            yield self._shapes_at(self._resolve_ref(pointer, value))
        else:
            if not isinstance(value, list) or (not value and key != "enum"):
                self.refuse(pointer, f"{key} must be a list of at least one schema, not {value!r:.80}")
            base = self._child(pointer, key)
            if key == "enum":
                options = [self._child(base, i, of_value=True) for i in range(len(value))]
            else:
                options = [self._child(base, i) for i in range(len(value))]
            if key == "oneOf":
                self._check_disjoint(pointer, options)
            each = map(self._shapes_at, options)
            yield from each if key == "allOf" else [list(dict.fromkeys(one for some in each for one in some))]

    def _check_disjoint(self, pointer: str, options: list[str]) -> None:
        """Refuse a oneOf with overlapping alternatives; with disjoint ones it is equivalent to anyOf."""
        rest = f"{pointer}~oneOf"
        self._values[rest] = {key: value for key, value in self._values[pointer].items() if key != "oneOf"}
        for i, one in enumerate(options):
            for other in options[i + 1 :]:
                if not self._is_empty((one, other, rest), 3):
                    self.refuse(pointer, f"oneOf is not supported where {one} and {other} can both match")

    def _is_empty(self, subschemas: Subschemas, depth: int) -> bool:
        """Whether no value matches all of these, as far as seen `depth` levels into objects."""
        try:
            found = self.shapes(subschemas)
        except _LoopError:
            return False
        return all(
            depth > 0
            and isinstance(shape, Object)
            and any(self._is_empty(shape.property(name), depth - 1) for name in shape.required)
            for shape in found
        )

    def _literal(self, pointer: str) -> Shape:
        """The shape of the literal value at a pointer."""
        value = self._values[pointer]
        if value is None or isinstance(value, bool):
            return Literal({None: "null", True: "true", False: "false"}[value])
        if isinstance(value, int | float):
            number = self._fraction(pointer, value)
            return Number(Bound(number), Bound(number))
        if isinstance(value, str):
            if any("\ud800" <= char <= "\udfff" for char in value):
                self.refuse(pointer, f"{value!r:.80} contains an unpaired surrogate")
            return String(value=value)
        if isinstance(value, list):
            items = tuple((self._child(pointer, i),) for i in range(len(value)))
            return Array(((items, (NEVER,)),), len(value), len(value))
        named = tuple((name, (self._child(pointer, name),)) for name in value)
        return Object((Properties(named, (), (NEVER,)),), tuple(value))

    def _typed(self, pointer: str, schema: Mapping[str, Any]) -> list[Shape]:
        """The shapes that the keywords for values of one type allow, for each type."""
        types = schema.get("type", TYPES)
        types = [types] if isinstance(types, str) else types
        if not isinstance(types, list | tuple) or not all(name in TYPES for name in types):
            wrong = types if not isinstance(types, list) else next(name for name in types if name not in TYPES)
            self.refuse(pointer, f"Invalid type: {wrong!s:.80}; must be one of {', '.join(TYPES)}")
        found: list[Shape] = []
        if "null" in types:
            found.append(Literal("null"))
        if "boolean" in types:
            found += [Literal("true"), Literal("false")]
        if "number" in types or "integer" in types:
            found.append(self._number(pointer, schema, whole="number" not in types))
        if "string" in types:
            found.append(self._text(pointer, schema))
        if "array" in types:
            found.append(self._array(pointer, schema))
        if "object" in types:
            found.append(self._object(pointer, schema))
        return found

    def _number(self, pointer: str, schema: Mapping[str, Any], whole: bool) -> Number:
        ends: dict[int, Bound | None] = {}
        for sign, name, exclusive in ((1, "minimum", "exclusiveMinimum"), (-1, "maximum", "exclusiveMaximum")):
            open_, end = schema.get(exclusive, False), None
            if name in schema:  # in Draft 4, `exclusive` is a boolean: whether the bound is exclusive
                end = Bound(self._fraction(pointer, schema[name], name), open_ is True)
            if not isinstance(open_, bool):
                end = shapes.tighter(end, Bound(self._fraction(pointer, open_, exclusive), open=True), sign)
            ends[sign] = end
        step = self._fraction(pointer, schema["multipleOf"], "multipleOf") if "multipleOf" in schema else None
        if step is not None and step <= 0:
            self.refuse(pointer, f"multipleOf must be greater than 0, not {schema['multipleOf']!r:.80}")
        return Number(ends[1], ends[-1], whole, step)

    def _text(self, pointer: str, schema: Mapping[str, Any]) -> String:
        patterns: tuple[str, ...] = ()
        formats: tuple[str, ...] = ()
        if "pattern" in schema:
            patterns = (self._pattern(pointer, schema["pattern"], "pattern"),)
        if "format" in schema:
            formats = (schema["format"],)
            if formats[0] not in strings.FORMATS:
                known = ", ".join(strings.FORMATS)
                self.refuse(pointer, f"Unknown format: {formats[0]!s:.80}; known are {known}")
        return String(*self._counts(pointer, schema, "minLength", "maxLength"), patterns, formats)

    def _array(self, pointer: str, schema: Mapping[str, Any]) -> Array:
        least, most = self._counts(pointer, schema, "minItems", "maxItems")
        prefix, others = "prefixItems", "items"
        if isinstance(schema.get("items"), list):  # as before Draft 2020-12
            prefix, others = "items", "additionalItems"
        elif "prefixItems" in schema and OLDER_DRAFTS.search(str(self._values["#"].get("$schema", ""))):
            self.refuse(pointer, "prefixItems is not a keyword of the draft that $schema names")
        items: list[Subschemas] = []
        if prefix in schema:
            if not isinstance(schema[prefix], list):
                self.refuse(pointer, f"{prefix} must be a list of schemas, not {schema[prefix]!r:.80}")
            base = self._child(pointer, prefix)
            items = [(self._child(base, i),) for i in range(len(schema[prefix]))]
        return Array(((tuple(items), (self._child(pointer, others),) if others in schema else ()),), least, most)

    def _object(self, pointer: str, schema: Mapping[str, Any]) -> Object:
        named: dict[str, list[tuple[str, Subschemas]]] = {}
        for key in ("properties", "patternProperties"):
            value = schema.get(key, {})
            if not isinstance(value, Mapping):
                self.refuse(pointer, f"{key} must be an object of schemas, not {value!r:.80}")
            base = self._child(pointer, key) if value else ""
            named[key] = [(name, (self._child(base, name),)) for name in value]
        for pattern, _ in named["patternProperties"]:
            self._pattern(pointer, pattern, "patternProperties")
        others = (self._child(pointer, "additionalProperties"),) if "additionalProperties" in schema else ()
        required = schema.get("required", [])
        if isinstance(required, bool):
            required = []  # Draft 3 sets it in each property
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            self.refuse(pointer, f"required must be a list of names, not {required!r:.80}")
        properties = Properties(tuple(named["properties"]), tuple(named["patternProperties"]), others)
        counts = self._counts(pointer, schema, "minProperties", "maxProperties")
        return Object((properties,), tuple(dict.fromkeys(required)), *counts)

    def _counts(self, pointer: str, schema: Mapping[str, Any], least: str, most: str) -> tuple[int, int | None]:
        for key in (least, most):
            value = schema.get(key, 0)
            whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
            if not whole or value < 0 or (key == least and value > MAX_COUNT):
                self.refuse(pointer, f"{key} must be a whole number from 0 to {MAX_COUNT}, not {value!r:.80}")
        limit = schema.get(most)
        return int(schema.get(least, 0)), None if limit is None or limit > MAX_COUNT else int(limit)

    def _pattern(self, pointer: str, pattern: Any, key: str) -> str:
        if not isinstance(pattern, str):
            self.refuse(pointer, f"{key} must be a regular expression, not {pattern!r:.80}")
        try:
            strings.of_pattern(pattern)
        except GrammarError as e:
            self.refuse(pointer, f"{key} {pattern!r:.80} cannot be used: {e.message}")
        return pattern

    def _fraction(self, pointer: str, value: Any, key: str = "the number") -> Fraction:
        """A number of the schema, exactly; a float is its shortest decimal representation."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(pointer, f"{key} must be a number, not {value!r:.80}")
        if not (-LARGEST < value < LARGEST) or (value and abs(value) < SMALLEST):
            self.refuse(
                pointer, f"{key} is not a number of at most {MAX_DIGITS} digits before and after the point"
            )
        return Fraction(str(value))

    def _child(self, pointer: str, key: str | int, of_value: bool = False) -> str:
        """The pointer to a child of the value at `pointer`."""
        child = f"{'=' * of_value}{pointer}/{json_pointer.escape(str(key))}"
        self._values[child] = self._values[pointer][key]
        return child

    def _resolve_ref(self, pointer: str, reference: Any) -> str:
        """The pointer to the target of a $ref."""
        root = self._values["#"]
        if not isinstance(reference, str):
            self.refuse(pointer, f"$ref must be a string, not {reference!r:.80}")
        above = json_pointer.resolve(root, json_pointer.split(pointer.replace("~oneOf", "")))[1:]
        if any(isinstance(schema, Mapping) and json_pointer.is_base(schema.get("$id")) for schema in above):
            self.refuse(pointer, "$ref is not supported within a schema that has an $id of its own")
        base = str(root.get("$id", "")).rstrip("#") if isinstance(root, Mapping) else ""
        target = unquote(reference.removeprefix(base)) or "#"
        if target.startswith("#") and target[1:2] not in ("", "/"):
            target = json_pointer.find_anchor(root, target[1:]) or target
        try:
            names = json_pointer.split(target)
            value = json_pointer.resolve(root, names)[-1]
        except (LookupError, ValueError, TypeError):
            self.refuse(pointer, f"$ref {reference!r:.80} does not resolve within this schema")
        target = "#" + "".join(f"/{json_pointer.escape(name)}" for name in names)
        self._values[target] = value
        return target
