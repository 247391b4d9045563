"""Reward functions for `mistral-7b finetune --method grpo --reward examples/rewards.py:name_and_age`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def name_and_age(prompt: Any, completions: list[str], row: Mapping[str, Any]) -> list[float]:
    """A quarter each for JSON and nothing else, for its two keys, for the right name and for the right age."""
    return [_score(text, row["name"], row["age"]) for text in completions]


def _score(text: str, name: str, age: int) -> float:
    try:
        found = json.loads(text)
    except ValueError:
        return 0.0
    if not isinstance(found, dict):
        return 0.0
    keys = found.keys() == {"name", "age"}
    return 0.25 * (1 + keys + (found.get("name") == name) + (found.get("age") == age))
