"""JSON pointers (RFC 6901) into a schema, as fragments like those of $ref: "#/properties/a"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def escape(name: str) -> str:
    """A name as a token of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")


def split(pointer: str) -> list[str]:
    """The names in a JSON pointer that begins with "#". Raises ValueError for any other text."""
    start, *names = pointer.split("/")
    if start != "#":
        raise ValueError(f"{pointer} is not a JSON pointer")
    return [name.replace("~1", "/").replace("~0", "~") for name in names]


def resolve(root: Any, parts: list[str]) -> list[Any]:
    """The values along a pointer, from the root to its target inclusive. LookupError if one is missing."""
    values = [root]
    for name in parts:
        values.append(values[-1][int(name) if isinstance(values[-1], list) else name])
    return values


def find_anchor(root: Any, anchor: str) -> str | None:
    """The pointer to the schema with this $anchor, or None."""
    pending = [("#", root)]
    while pending:
        pointer, value = pending.pop()
        if isinstance(value, Mapping):
            if value.get("$anchor") == anchor:
                return pointer
            pending += [(f"{pointer}/{escape(name)}", inner) for name, inner in value.items()]
        elif isinstance(value, list):
            pending += [(f"{pointer}/{i}", inner) for i, inner in enumerate(value)]
    return None


def is_base(name: Any) -> bool:
    """Whether an $id changes the base URI of the $refs below it; "#name" does not."""
    return isinstance(name, str) and not name.startswith("#")
