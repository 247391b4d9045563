"""JSON pointers into a schema, written as $ref has them: "#/properties/a"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def escaped(name: str) -> str:
    """A part of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")


def names(place: str) -> list[str]:
    """The parts of a JSON pointer that begins with "#"."""
    start, *names = place.split("/")
    if start != "#":
        raise ValueError(f"{place} is no JSON pointer")
    return [name.replace("~1", "/").replace("~0", "~") for name in names]


def down(root: Any, parts: list[str]) -> list[Any]:
    """The values on the way down from the root, both ends included. Raises LookupError where there is none."""
    values = [root]
    for name in parts:
        values.append(values[-1][int(name) if isinstance(values[-1], list) else name])
    return values


def anchored(root: Any, anchor: str) -> str | None:
    """The place of a schema with an $anchor."""
    left = [("#", root)]
    while left:
        place, value = left.pop()
        if isinstance(value, Mapping):
            if value.get("$anchor") == anchor:
                return place
            left += [(f"{place}/{escaped(name)}", inner) for name, inner in value.items()]
        elif isinstance(value, list):
            left += [(f"{place}/{i}", inner) for i, inner in enumerate(value)]
    return None


def is_base(name: Any) -> bool:
    """Whether an $id changes what a $ref below it is relative to, as "#name" does not."""
    return isinstance(name, str) and not name.startswith("#")
