"""The data of the tasks beside this file, which lm-eval calls by its path: rows of JSON, without the network."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from datasets import Dataset  # type: ignore[import-untyped]


def rows(file: str, **kwargs: Any) -> dict[str, Dataset]:
    """The split "test": the rows of a JSONL file in this folder."""
    text = (pathlib.Path(__file__).parent / file).read_text(encoding="utf-8")
    return {"test": Dataset.from_list([json.loads(line) for line in text.splitlines()])}
