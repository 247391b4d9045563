"""Read configuration files: strict JSON, theta, window and ModelArgs."""

from __future__ import annotations

import json
import math
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any

from ..errors import CheckpointError, ConfigError
from ..model import ModelArgs
from . import json_files

V0_1_THETA, V0_1_WINDOW, LATER_THETA = 1e4, 4096, 1e6
INSTEAD = (
    "open it with transformers or llama.cpp, or take a Mistral 7B, such as mistralai/Mistral-7B-Instruct-v0.3"
)
TEKKEN = 131_072  # the vocabulary of Mistral's later models


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON object. CheckpointError for invalid JSON, NaN or conflicting duplicates."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, value in pairs:
            if name in out and out[name] != value:
                raise CheckpointError(
                    f"{name!r} is given twice, as {out[name]!r} and as {value!r}", field=name, place=path
                )
            out[name] = value
        return out

    data = json_files.read_json(path, pairs_hook=unique)
    for field, value in _numbers(data, ""):
        if not math.isfinite(value):
            raise CheckpointError(f"field {field!r} is {value}, not a finite number", field=field, place=path)
    return data


def _numbers(value: Any, field: str) -> Iterator[tuple[str, float]]:
    """Yield every float in a JSON value with its field path, such as "a.b[0]"."""
    if isinstance(value, float):
        yield field, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, f"{field}.{name}" if field else name)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _numbers(inner, f"{field}[{i}]")


def consistent_value(path: pathlib.Path, fields: dict[str, Any]) -> Any:
    """Return the common value of synonymous fields, or None if none is set; CheckpointError if they differ."""
    given = {name: value for name, value in fields.items() if value is not None}
    values = list(given.values())
    if any(v != values[0] for v in values):
        listing = " but ".join(f"{name!r} is {value!r}" for name, value in given.items())
        raise CheckpointError(
            f"{listing}; both set the same value",
            field=next(iter(given)),
            place=path,
            hint="correct or remove one",
        )
    return values[0] if values else None


def theta_and_window(path: pathlib.Path, theta: Any, window: Any) -> tuple[Any, Any]:
    """Return RoPE's theta and the window. A given theta is never changed.

    A missing theta is 1e4 if there is a window (the `params.json` of v0.1), else 1e6 (later releases).
    """
    if theta is None:
        theta = LATER_THETA if window is None else V0_1_THETA
    if theta == LATER_THETA and window == V0_1_WINDOW:
        warnings.warn(
            f"{path}: theta 1e6 with a window of 4096 is a mistake of early copies of Instruct-v0.2. "
            "It is used unchanged; if this is v0.2 or v0.3, set the window to null in that file.",
            stacklevel=2,
        )
    return theta, window


def check_tekken(path: pathlib.Path, data: dict[str, Any], width: str) -> None:
    """Raise CheckpointError for Mistral's later models, of the same architecture with the Tekken tokenizer."""
    dim = data.get(width)
    if data.get("vocab_size") == TEKKEN and isinstance(dim, int) and dim >= 4096:
        raise CheckpointError(
            f"a vocabulary of {TEKKEN} tokens: this is Mistral Nemo, Ministral or Mistral Small, whose tokenizer "
            "(Tekken) is not supported",
            field="vocab_size",
            place=path,
            hint=INSTEAD,
        )


def check_supported(path: pathlib.Path, data: dict[str, Any], supported: dict[str, tuple[Any, ...]]) -> None:
    """Raise CheckpointError if a field has a value not in `supported`, which would change the model."""
    for field, values in supported.items():
        if (value := data.get(field)) is not None and value not in values:
            raise CheckpointError(
                f"{field!r} is {_short(value)}, which Mistral 7B does not support", field=field, place=path
            )


def is_positive(value: Any) -> bool:
    """Return whether a value is a finite number above 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def to_args(path: pathlib.Path, data: dict[str, Any], field_of: dict[str, str], **known: Any) -> ModelArgs:
    """Build ModelArgs from the fields `data[field_of[name]]` and from the `known` values."""
    values = dict(known)
    for ours, theirs in field_of.items():
        if data.get(theirs) is None:
            raise CheckpointError(f"field {theirs!r} is missing", field=theirs, place=path)
        values[ours] = data[theirs]
    try:
        return ModelArgs(**values)
    except ConfigError as e:
        raise CheckpointError.of(e, place=path) from e
    except OverflowError as e:
        raise CheckpointError(str(e), place=path) from e
