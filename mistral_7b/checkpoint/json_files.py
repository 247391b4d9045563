"""The small files beside weights, as text and JSON. Imports no torch."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

from ..errors import CheckpointError, Mistral7BError, TokenizerError
from .others import check_pointer

MAX_BYTES = 64 << 20  # of a file that is read; tokenizer.json with 128,000 tokens has 9 MB
Error = type[Mistral7BError]


def read_text(path: pathlib.Path, error: Error = CheckpointError) -> str:
    """Read a UTF-8 file; an `error` for one that cannot be read, is too large, or is a Git LFS pointer."""
    check_pointer(path, error)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise error(f"is larger than {MAX_BYTES >> 20} MB", place=path)
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise error(f"not UTF-8 text ({e})", place=path, hint="fetch the file again") from e
    except OSError as e:
        raise error(f"cannot be read ({e.strerror})", place=path) from e


def read_json(
    path: pathlib.Path, error: Error = CheckpointError,
    pairs_hook: Callable[[list[tuple[str, Any]]], dict[str, Any]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Read a JSON object; an `error` for anything else. `pairs_hook` makes objects of (name, value) pairs."""
    text = read_text(path, error)
    try:
        data = json.loads(text, object_pairs_hook=pairs_hook)
    except (ValueError, RecursionError) as e:
        raise error(f"not JSON ({e})", place=path, hint="fetch the file again") from e
    if not isinstance(data, dict):
        raise error(f"contains a {type(data).__name__} instead of a JSON object", place=path)
    return data


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON file of a tokenizer, {} if there is no such file. TokenizerError if it is damaged."""
    return read_json(path, TokenizerError) if path.is_file() else {}


def object_in(content: Any) -> dict[str, Any]:
    """Return the JSON object in a text or bytes; {} if there is none, or if it is damaged."""
    try:
        data = json.loads(content)
    except (ValueError, TypeError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}
