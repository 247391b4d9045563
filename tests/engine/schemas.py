"""JSON schemas drawn at random, and whether a text obeys one: with whole numbers and decimals exact."""

from __future__ import annotations

import decimal
import json
import random
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import jsonschema
import jsonschema.validators
import jsonschema_rs

NAMES = ("a", "b", "ab", "x1", "größe", 'q"\\')
# Those that Python's re, by which jsonschema matches, reads as ECMA-262 does. They overlap each other and NAMES.
PATTERNS = (
    "^a", "b$", "^[ab]+$", "[0-9]", "^.{1,2}$", "^a$|^x", "^(ab|ba){1,2}$", "ö", r'^["\\]', "()", "^[^a]*$",
    "^x[0-9]$", "^[a-z]+$", "(^|b)a",
)  # fmt: skip
FORMATS = ("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
LARGE = (2**53 + 1, 2**63 - 1, -(2**63), 2**64, 1234567890123456789, -(2**53) - 1, 10**18, 2**53 - 1, 10**30)
VALUES = (None, True, False, 0, 1, -1, 1.0, 0.5, -2.25, 1e-7, 1e17, "", "a", "ab", 'q"\\', "日本", "\x7f\n\x01")
TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")


class Drawing:
    """Draws schemas from a seed, which refer to themselves and to two $defs."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)

    def schema(self) -> dict[str, Any]:
        drawn = self._object(0) if self._chance.random() < 0.5 else self._any(0)
        drawn = drawn if isinstance(drawn, dict) else {"allOf": [drawn]}
        return {**drawn, "$defs": {name: self._any(1) for name in ("p", "q/~%")}}

    def value(self, depth: int = 0) -> Any:
        kind = self._chance.random()
        if depth < 2 and kind < 0.15:
            return [self.value(depth + 1) for _ in range(self._chance.randint(0, 3))]
        if depth < 2 and kind < 0.3:
            return {name: self.value(depth + 1) for name in self._some(NAMES)}
        return self._chance.choice(LARGE if kind < 0.5 else VALUES)

    def _some(self, pool: tuple, most: int = 3) -> list:
        return self._chance.sample(pool, self._chance.randint(0, most))

    def _any(self, depth: int) -> Any:
        kinds: list[Callable[[int], Any]] = [self._number, self._number, self._string, self._enum, self._plain]
        if depth < 3:
            kinds += [self._object, self._object, self._array, self._union, self._all, self._reference]
        schema = self._chance.choice(kinds)(depth)
        if isinstance(schema, dict) and self._chance.random() < 0.2:
            schema.update(self._chance.choice([
                {"description": "said"}, {"default": 2**70}, {"x-order": [1]}, {"minimun": 3}, {"title": "t"},
            ]))  # fmt: skip
        return schema

    def _plain(self, depth: int) -> Any:
        types = self._some(TYPES)
        return self._chance.choice([True, {}, {"type": types or "string"}, {"type": "boolean"}, {"type": "null"}])

    def _bound(self) -> int | float:
        chance = self._chance
        kind = chance.randint(0, 4)
        if kind == 0:
            return chance.choice(LARGE) + chance.randint(-2, 2)
        if kind == 1:
            return round(chance.uniform(-20, 20), chance.randint(0, 4))
        return chance.choice([chance.randint(-20, 20), chance.randint(-(10**19), 10**19), 0])

    def _number(self, depth: int) -> Any:
        schema: dict[str, Any] = {"type": self._chance.choice(["integer", "number", ["integer", "null"]])}
        low, high = sorted((self._bound(), self._bound()))
        for key, value in (
            ("minimum", low), ("exclusiveMinimum", low), ("maximum", high), ("exclusiveMaximum", high),
        ):  # fmt: skip
            if self._chance.random() < 0.3:
                schema[key] = value
        if self._chance.random() < 0.25:
            schema["multipleOf"] = self._chance.choice([1, 2, 3, 7, 10, 25, 0.5, 0.01, 0.25, 1.5, 2**60])
        return schema

    def _string(self, depth: int) -> Any:
        schema: dict[str, Any] = {"type": "string"}
        kind = self._chance.random()
        if kind < 0.35:
            schema["format"] = self._chance.choice(FORMATS)
        elif kind < 0.7:
            schema["pattern"] = self._chance.choice(PATTERNS)
        least = self._chance.randint(0, 4)
        if self._chance.random() < 0.3:
            schema["minLength"] = least
        if self._chance.random() < 0.5:
            schema["maxLength"] = least + self._chance.randint(-1, 6 if kind > 0.35 else 60)
            schema["maxLength"] = max(schema["maxLength"], 0)
        return schema

    def _enum(self, depth: int) -> Any:
        if self._chance.random() < 0.5:
            return {"const": self.value()}
        schema: dict[str, Any] = {"enum": [self.value() for _ in range(self._chance.randint(1, 6))]}
        if self._chance.random() < 0.3:
            schema["type"] = self._chance.choice(TYPES)
        return schema

    def _array(self, depth: int) -> Any:
        schema: dict[str, Any] = {"type": "array"}
        if self._chance.random() < 0.8:
            schema["items"] = False if self._chance.random() < 0.15 else self._any(depth + 1)
        if self._chance.random() < 0.4:
            schema["prefixItems"] = [self._any(depth + 1) for _ in range(self._chance.randint(1, 3))]
        if self._chance.random() < 0.4:
            schema["minItems"] = self._chance.randint(0, 4)
        if self._chance.random() < 0.5:
            schema["maxItems"] = self._chance.randint(0, 5)
        if self._chance.random() < 0.05:
            schema["uniqueItems"] = True
        return schema

    def _object(self, depth: int) -> Any:
        schema: dict[str, Any] = {"type": "object"}
        if self._chance.random() < 0.8:
            schema["properties"] = {name: self._any(depth + 1) for name in self._some(NAMES, 4)}
        if self._chance.random() < 0.6:
            schema["required"] = self._some(NAMES)
        if self._chance.random() < 0.5:
            schema["patternProperties"] = {pattern: self._any(depth + 1) for pattern in self._some(PATTERNS)}
        if self._chance.random() < 0.6:
            schema["additionalProperties"] = False if self._chance.random() < 0.6 else self._any(depth + 1)
        if self._chance.random() < 0.15:
            schema["minProperties"] = self._chance.randint(0, 3)
        if self._chance.random() < 0.2:
            schema["maxProperties"] = self._chance.randint(0, 5)
        return schema

    def _union(self, depth: int) -> Any:
        options = [self._any(depth + 1) for _ in range(self._chance.randint(1, 3))]
        return {self._chance.choice(["anyOf", "anyOf", "oneOf"]): options, **self._sibling(depth)}

    def _all(self, depth: int) -> Any:
        kind = self._chance.choice([self._object, self._number, self._string, self._array, self._any])
        return {"allOf": [kind(depth + 1) for _ in range(self._chance.randint(1, 3))], **self._sibling(depth)}

    def _reference(self, depth: int) -> Any:
        return {"$ref": self._chance.choice(["#", "#/$defs/p", "#/$defs/q~1~0%25"]), **self._sibling(depth)}

    def _sibling(self, depth: int) -> dict[str, Any]:
        if self._chance.random() < 0.8:
            return {}
        schema = self._chance.choice([self._object, self._number, self._string])(depth + 1)
        return schema if isinstance(schema, dict) else {}


def exact(value: Any) -> Any:
    """A value whose floats are the decimals that they are written as."""
    return json.loads(json.dumps(value), parse_float=Decimal)


def _is_integer(checker: Any, value: Any) -> bool:
    if isinstance(value, Decimal):
        return int(value.as_tuple().exponent) >= 0 or value == value.to_integral_value()
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(checker: Any, value: Any) -> bool:
    return isinstance(value, int | Decimal) and not isinstance(value, bool)


_BASE = jsonschema.Draft202012Validator
_Validator = jsonschema.validators.extend(
    _BASE, type_checker=_BASE.TYPE_CHECKER.redefine("integer", _is_integer).redefine("number", _is_number)
)


def _checker() -> jsonschema.FormatChecker:
    """All of FORMATS, as the `jsonschema` written in Rust reads them: the other one knows half of them."""
    checker = jsonschema.FormatChecker(())
    for name in FORMATS:
        validator = jsonschema_rs.Draft202012Validator({"format": name}, validate_formats=True)
        checker.checks(name)(validator.is_valid)
    return checker


_FORMATS = _checker()


def faults(schema: Any, values: list[Any]) -> list[str]:
    """What is wrong with values whose floats are Decimals, "" where nothing is, according to jsonschema."""
    with decimal.localcontext(prec=1000):
        validator = _Validator(exact(schema), format_checker=_FORMATS)
        return [next((error.message for error in validator.iter_errors(value)), "") for value in values]
