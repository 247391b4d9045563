"""Filters and tests of chat templates: each checks what it gets, and counts what it makes (template_budget.py)."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import Environment

from . import template_budget as budget
from .template_budget import ITEMS, LimitError, current


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _check_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> Any:
    step = len(indent) if isinstance(indent, str) else max(indent or 0, 0)
    between = sum(map(len, separators or ()))
    if step > 64 or between > 64:
        raise LimitError("it writes JSON with a very wide indent or separator")
    current().allow(current().size(value) * (6 + between + step * _depth(value)))
    return value


def _depth(value: Any) -> int:
    """Return how deep containers are nested, up to 100 levels."""
    level, depth = [value], 0
    while level and depth < 100:
        level = [
            part
            for v in level
            if isinstance(v, (dict, list, tuple))
            for part in (v.values() if isinstance(v, dict) else v)
        ]
        depth += 1
    return depth


# Checks of filters: each takes what the filter takes and returns the value that the filter shall get.
Check = Callable[..., Any]


def _any(value: Any, *args: Any, **kwargs: Any) -> Any:
    current().spend(len(value) if isinstance(value, (str, list, tuple, dict)) else 0)
    return value


def items(value: Any, *args: Any, **kwargs: Any) -> Any:
    """Check what is iterated over; a generator becomes a list."""
    if not hasattr(value, "__len__") and hasattr(value, "__next__"):
        value = list(itertools.islice(value, ITEMS + 1))
        current().size(value)
    count = len(value) if hasattr(value, "__len__") else 0
    if count > ITEMS:
        raise LimitError(f"it iterates over more than {ITEMS:,} items at once")
    current().spend(64 * count)
    return value


def _unique(value: Any, case_sensitive: Any = False, attribute: Any = None) -> Any:
    values = items(value)
    if attribute is None:
        values = values if hasattr(values, "__len__") else list(values)
        budget.check_keys(values)
    elif len(values) > budget.KEYS:
        raise LimitError(f"it compares attributes of more than {budget.KEYS:,} items")
    return values


def _grouped(value: Any, attribute: Any, default: Any = None, case_sensitive: Any = False) -> Any:
    values = items(value)
    current().allow(current().size(default) * len(values))
    return values


def _batched(value: Any, linecount: Any, fill_with: Any = None) -> Any:
    if isinstance(linecount, int) and linecount > ITEMS:
        raise LimitError(f"it makes groups of more than {ITEMS:,} items")
    return items(value)


def _sliced(value: Any, slices: Any, fill_with: Any = None) -> Any:
    return _batched(value, slices)


def _added(value: Any, attribute: Any = None, start: Any = 0) -> Any:
    values = items(value)
    if not isinstance(start, (int, float)):
        raise LimitError("it sums other values than numbers, which chat templates are not offered")
    return values


def _joined(value: Any, d: str = "", attribute: Any = None) -> Any:
    values = items(value)
    current().allow(current().size(list(values)) + len(str(d)) * len(values))
    return values


def _indented(value: Any, width: Any = 4, first: bool = False, blank: bool = False) -> Any:
    text = str(value)
    budget.METHODS["splitlines"](text)
    lines = sum(text.count(end) for end in budget.LINE_ENDS) + 1
    current().allow(len(text) + lines * (len(width) if isinstance(width, str) else max(width, 0)))
    return value


def _rounded(value: Any, precision: int = 0, method: str = "common") -> Any:
    if abs(precision) > 300:
        raise LimitError("it rounds to more than 300 digits")
    return value


def _centered(value: Any, width: int = 80) -> Any:
    budget.METHODS["center"](value, width)
    return value


def _replaced(value: Any, old: Any, new: Any, count: int | None = None) -> Any:
    budget.METHODS["replace"](value, old, new)
    return value


def _trimmed(value: Any, chars: str | None = None) -> Any:
    budget.METHODS["strip"](str(value), chars)
    return value


def _formatted(value: Any, *args: Any, **kwargs: Any) -> Any:
    budget.formatted(str(value), (args, kwargs))
    return value


def _titled(value: Any) -> Any:
    return items(str(value))


FILTERS: Mapping[str, Check] = {
    **dict.fromkeys(
        ["abs", "attr", "capitalize", "count", "d", "default", "e", "escape", "first", "float", "int", "last",
         "length", "lower", "reverse", "safe", "string", "truncate", "upper"],
        _any,
    ),
    **dict.fromkeys(
        ["dictsort", "items", "list", "map", "max", "min", "reject", "rejectattr", "select",
         "selectattr", "sort"], items
    ),
    "unique": _unique, "groupby": _grouped,
    "batch": _batched, "slice": _sliced, "sum": _added, "join": _joined, "indent": _indented, "round": _rounded,
    "center": _centered, "replace": _replaced, "trim": _trimmed, "format": _formatted, "title": _titled,
}  # fmt: skip


class _Counting:
    """An environment that counts the attributes which a filter reads, and of which it may keep a changed copy."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    def __getattr__(self, name: str) -> Any:
        return getattr(self._environment, name)

    def getitem(self, obj: Any, argument: Any) -> Any:
        return current().measured(self._environment.getitem(obj, argument))


def _filter(function: Callable[..., Any], check: Check) -> Callable[..., Any]:
    """Return a filter that checks its value, and counts what it makes."""
    first = int(hasattr(function, "jinja_pass_arg"))  # such a filter takes Jinja's context before the value

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        value = check(*args[first:], **kwargs)
        environment = [_Counting(arg) if isinstance(arg, Environment) else arg for arg in args[:first]]
        return current().measured(function(*environment, value, *args[first + 1 :], **kwargs))

    return run


def _test(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a test that counts."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        current().spend(units=8)
        return function(*args, **kwargs)

    return run


def offered_filters(filters: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Return those of Jinja's filters that chat templates are offered, and tojson."""
    offered = {name: _filter(filters[name], check) for name, check in FILTERS.items()}
    return {**offered, "tojson": _filter(_tojson, _check_json)}


def offered_tests(tests: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
    """Return Jinja's tests, counted."""
    return {name: _test(function) for name, function in tests.items()}
