"""Pydantic's validation errors in the client's terms: the field as it was written, and what it must be.

    location   ("body", "messages", 0, "content", "list[dict[str,any]]", 1)     with a union's branch
    field      messages.0.content.1                                            as in the body that was sent

A union reports the errors of all its branches. The one that got furthest into the body is the client's mistake; if
several stop at the same field, all that is possible there is named: "must be a string or a list".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import HttpError

LONGEST = 200  # characters of a field's name
Error = Mapping[str, Any]

# What a value must be, by the type of pydantic's error. Only in these do branches of a union add up.
MUST_BE: dict[str, Callable[[dict[str, Any]], str]] = {
    "string_type": lambda _: "a string",
    "string_sub_type": lambda _: "a string",
    "string_unicode": lambda _: "a string of valid Unicode",
    "int_type": lambda _: "an integer",
    "int_from_float": lambda _: "an integer",
    "int_parsing": lambda _: "an integer",
    "int_parsing_size": lambda _: "a smaller integer",
    "float_type": lambda _: "a number",
    "float_parsing": lambda _: "a number",
    "finite_number": lambda _: "a finite number",
    "bool_type": lambda _: "true or false",
    "bool_parsing": lambda _: "true or false",
    "list_type": lambda _: "a list",
    "dict_type": lambda _: "an object",
    "model_type": lambda _: "an object",
    "model_attributes_type": lambda _: "an object",
    "none_required": lambda _: "null",
    "literal_error": lambda ctx: str(ctx["expected"]),
    "greater_than": lambda ctx: f"greater than {ctx['gt']}",
    "greater_than_equal": lambda ctx: f"at least {ctx['ge']}",
    "less_than": lambda ctx: f"less than {ctx['lt']}",
    "less_than_equal": lambda ctx: f"at most {ctx['le']}",
    "string_too_short": lambda ctx: f"at least {_count(ctx['min_length'], 'character')} long",
    "string_too_long": lambda ctx: f"at most {_count(ctx['max_length'], 'character')} long",
    "union_tag_invalid": lambda _: "of a known type",
}


@dataclass(frozen=True)
class _Found:
    """An error at its place in the body. `branched`: how long the path is before the first union."""

    error: Error
    path: tuple[str | int, ...]
    branched: int | None

    @property
    def rank(self) -> tuple[int, tuple[int, ...]]:
        """How far it is into the body."""
        return len(self.path), tuple(part for part in self.path if isinstance(part, int))

    @property
    def of_type(self) -> bool:
        """Whether the value has another type than is wanted."""
        return self.error["type"].endswith("_type") or self.error["type"] in ("literal_error", "none_required")

    @property
    def name(self) -> str:
        return ".".join(map(str, self.path))[:LONGEST]


def invalid(errors: Sequence[Error], body: Any = None, content_type: str | None = None) -> HttpError:
    """The error response (400) for pydantic's errors: the client's first mistake in `body`, as parsed."""
    first = errors[0]
    if first["type"] == "json_invalid":
        why = first["ctx"]["error"]
        return HttpError(400, f"the body is not valid JSON: {why}", code="invalid_json")
    if isinstance(body, bytes):
        told = f"is {content_type!r:.100}" if content_type else "is missing"
        return HttpError(400, f"the header content-type {told}, so that the body was not read",
                         hint="send content-type: application/json", code="invalid_content_type")  # fmt: skip
    found = [_at(error, body) for error in errors]
    top = found[0]
    if top.branched is not None:
        shared = top.path[: top.branched]
        found = [f for f in found if f.branched == top.branched and f.path[: top.branched] == shared]
        furthest = max(f.rank for f in found)
        found = [f for f in found if f.rank == furthest]
        found = [f for f in found if not f.of_type] or found  # a branch whose type fits has got further
        top = found[0]
    else:
        found = [top]
    if not top.path and first["type"] != "value_error":
        told = "the body is missing: send a JSON object" if body is None else "the body must be a JSON object"
        return HttpError(400, told, code="missing_field" if body is None else None)
    return _told(top, found)


def _told(top: _Found, found: Sequence[_Found]) -> HttpError:
    """The response for the errors at one place."""
    name, kind, ctx = top.name, top.error["type"], top.error.get("ctx", {})
    if kind == "extra_forbidden":
        return HttpError(400, f"unknown field {name!r}", field=name, code="unknown_field")
    if kind == "missing":
        return HttpError(400, f"{name} is missing", field=name, code="missing_field")
    if kind == "union_tag_not_found":
        return HttpError(400, f"{name}.type is missing", field=f"{name}.type"[:LONGEST], code="missing_field")
    if kind == "union_tag_invalid":
        told = f"type must be {_either(ctx['expected_tags'].split(', '))}, not {ctx['tag']!r:.80}"
        return HttpError(400, f"{name}: {told}", field=name)
    if kind == "value_error":
        return HttpError(400, f"{name}: {ctx['error']}" if name else str(ctx["error"]), field=name or None)
    if kind in ("too_long", "too_short"):
        most = kind == "too_long"
        number = ctx["max_length"] if most else ctx["min_length"]
        told = f"{name} must have {'at most' if most else 'at least'} {_count(number, 'entry', 'entries')}"
        return HttpError(400, told, field=name)
    wanted = [MUST_BE[f.error["type"]](f.error.get("ctx", {})) for f in found if f.error["type"] in MUST_BE]
    told = f"must be {_either(wanted)}" if wanted else "is not valid"
    return HttpError(400, f"{name} {told}", field=name)


def _at(error: Error, body: Any) -> _Found:
    """Find an error's place in the body. Parts of its location that the body does not have name union branches."""
    where, *parts = error["loc"]
    if where != "body":  # a parameter of the path or the query, which has no parts
        return _Found(error, tuple(parts), None)
    path: list[str | int] = []
    branched = None
    for i, part in enumerate(parts):
        inside = (isinstance(body, dict) and part in body) or (
            isinstance(body, list) and isinstance(part, int) and part < len(body)
        )
        if inside:
            body = body[part]
            path.append(part)
        elif error["type"] == "missing" and i + 1 == len(parts):
            path.append(part)
        elif branched is None:
            branched = len(path)
    return _Found(error, tuple(path), branched)


def _either(wanted: Sequence[str]) -> str:
    """Join alternatives: "a", "a or b", "a, b or c"."""
    alternatives = list(dict.fromkeys(wanted))
    *most, last = alternatives
    return f"{', '.join(most)} or {last}" if most else last


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
