"""Split GGUF files: one model in parts, as llama.cpp's llama-gguf-split writes them. Imports no torch.

The parts are named NAME-00001-of-00003.gguf, and have the keys split.no (from 0), split.count and
split.tensors.count (of all parts). The first has the metadata; each has a part of the tensors.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Sequence
from typing import Any

from ...errors import CheckpointError
from . import file as gguf_file
from .file import Contents

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.ASCII | re.DOTALL)
NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"


def part_names(name: str) -> list[str] | None:
    """Return the names of all parts, from that of any; None if it is not the name of a part."""
    found = PART.fullmatch(name)
    if found is None or not 1 <= int(found["number"]) <= int(found["count"]):
        return None
    return [f"{found['stem']}-{i:05d}-of-{found['count']}.gguf" for i in range(1, int(found["count"]) + 1)]


def first_part(path: pathlib.Path) -> pathlib.Path:
    """Return the first part for any part of a split file, if it exists; other paths are returned unchanged."""
    names = part_names(path.name)
    return path.with_name(names[0]) if names and path.with_name(names[0]).is_file() else path


def read(path: pathlib.Path) -> list[Contents]:
    """Parse a file, or all parts of the split file that it is a part of, the first first.

    Raises CheckpointError if a part is missing, or belongs to another file.
    """
    contents = gguf_file.read(path)
    count = contents.metadata.get(COUNT, 1)
    if count == 1:
        return [contents]
    names = part_names(path.name)
    if type(count) is not int or names is None or len(names) != count:
        raise CheckpointError(
            f"is one of {count!r} parts of a split file, which its name must tell",
            field=COUNT,
            place=path,
            hint="name it as it was when it was split, such as NAME-00001-of-00003.gguf",
        )
    parts = []
    for i, name in enumerate(names):
        place = path.with_name(name)
        if not place.is_file():
            raise CheckpointError(f"missing; it is part {i + 1} of {count} of a split file", place=place)
        part = contents if place == path else gguf_file.read(place)
        _check(part, {NUMBER: i, COUNT: count})
        parts.append(part)
    _check_tensors(parts)
    return parts


def _check(part: Contents, wanted: dict[str, Any]) -> None:
    for key, value in wanted.items():
        if part.metadata.get(key) != value:
            raise CheckpointError(
                f"{key!r} is {part.metadata.get(key)!r}, and must be {value}: it belongs to another file",
                field=key,
                place=part.path,
            )


def _check_tensors(parts: Sequence[Contents]) -> None:
    seen: dict[str, Contents] = {}
    for part in parts:
        for name in part.entries:
            if name in seen:
                raise CheckpointError(
                    f"tensor {name!r} is in {seen[name].path.name} too", field=name, place=part.path
                )
            seen[name] = part
    if TENSORS in parts[0].metadata:
        _check(parts[0], {TENSORS: len(seen)})
