"""Reward functions: Python functions that score completions, named as `file.py:function`. Imports no torch.

    def reward(prompt, completions, row):
        return [float(text.strip() == row["answer"]) for text in completions]

prompt       the prompt of the row: a text, or a list of messages
completions  the texts of the completions sampled for it, without the tokens that end them
row          the row of the data as it was read, with any fields of its own
returns      a number for each completion; higher is better

The function runs in the training process, between sampling and the update, without a time limit: what it takes is
logged as `reward_s`, in seconds. Code that a model wrote must not be run there; that is a sandbox's work.
"""

from __future__ import annotations

import importlib.util
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import TrainingError

Score = Callable[[Any, list[str], Mapping[str, Any]], Sequence[float]]


class Reward:
    """A reward function that checks what it returns. `place` is its file, for errors."""

    def __init__(self, score: Score, place: str | None = None) -> None:
        self.score, self.place = score, place

    def __call__(self, row: Mapping[str, Any], completions: list[str]) -> list[float]:
        """The rewards of a prompt's completions. TrainingError for an exception, or all but finite numbers."""
        try:
            found = self.score(row["prompt"], list(completions), row)
        except (Exception, SystemExit) as error:
            line = traceback.extract_tb(error.__traceback__)[-1]
            raise self._error(f"raised {type(error).__name__}: {error} ({line.filename}:{line.lineno})") from error
        try:
            rewards = [] if isinstance(found, str) else [float(value) for value in found]
        except (TypeError, ValueError):
            rewards = []
        if not rewards:
            raise self._error(f"returned {found!r:.80}, which is no list of numbers")
        if len(rewards) != len(completions):
            raise self._error(f"returned {len(rewards)} rewards for {len(completions)} completions")
        for value, text in zip(rewards, completions, strict=True):
            if not math.isfinite(value):
                raise self._error(f"returned {value} for the completion {text!r:.80}")
        return rewards

    def _error(self, problem: str) -> TrainingError:
        return TrainingError(
            f"the reward function {problem}",
            field="reward",
            place=self.place,
            hint="it takes (prompt, completions, row) and returns a finite number for each completion",
        )


def load_reward(spec: str) -> Reward:
    """Open the function of `file.py:function`. TrainingError if there is none, or its file cannot be run."""
    file, _, name = spec.rpartition(":")
    path = Path(file).expanduser()
    if not file or not name.isidentifier():
        raise TrainingError(f"{spec!r} is not file.py:function", field="reward", hint="such as rewards.py:reward")
    if not path.is_file():
        raise TrainingError("no such file", field="reward", place=path)
    module_spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise TrainingError("not a Python file", field="reward", place=path, hint="its name must end in .py")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise TrainingError(
            f"it cannot be imported: {type(error).__name__}: {error}", field="reward", place=path
        ) from error
    score = getattr(module, name, None)
    if not callable(score):
        raise TrainingError(f"there is no function {name!r} in it", field="reward", place=path)
    return Reward(score, str(path))
