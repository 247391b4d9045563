"""Reward functions for `mistral-7b finetune --method grpo --reward examples/rewards.py:name_and_age`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def name_and_age(prompt: Any, completions: list[str], row: Mapping[str, Any]) -> list[float]:
    """0.1 for JSON with these two keys and nothing else, and 0.45 each for the right name and the right age.

    The form alone earns little: with more, a policy that answers every prompt alike would be where learning ends.
    """
    return [_score(text, row["name"], row["age"]) for text in completions]


def _score(text: str, name: str, age: int) -> float:
    try:
        found = json.loads(text)
    except ValueError:
        return 0.0
    if not isinstance(found, dict) or found.keys() != {"name", "age"}:
        return 0.0
    return 0.1 + 0.45 * (found["name"] == name) + 0.45 * (found["age"] == age)
