"""Reward functions: what they get, and what goes wrong in them is said clearly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from refusals import refused

from mistral_7b.errors import TrainingError
from mistral_7b.training.rewards import Reward, load_reward

ROW = {"prompt": "1 + 1 =", "answer": "2"}


def test_a_function_of_a_file_gets_prompt_completions_and_row(tmp_path: Path) -> None:
    file = tmp_path / "my:rewards.py"
    file.write_text("def equal(prompt, completions, row):\n    return [c == row['answer'] for c in completions]\n")
    assert load_reward(f"{file}:equal")(ROW, ["2", "3"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    "returned",
    [[1.0], [1.0, 2.0, 3.0], [1.0, float("nan")], [1.0, float("inf")], [1.0, "x"], [1.0, None], 1.0, None],
)
def test_anything_but_finite_numbers_is_refused(returned: Any) -> None:
    with refused(TrainingError, field="reward", place="rewards.py"):
        Reward(lambda *given: returned, "rewards.py")(ROW, ["2", "3"])


def test_an_exception_names_its_line() -> None:
    def fails(prompt: str, completions: list[str], row: dict[str, Any]) -> list[float]:
        return [row["missing"] for _ in completions]

    with refused(TrainingError, field="reward") as caught:
        Reward(fails)(ROW, ["2"])
    assert isinstance(caught.value.__cause__, KeyError)
    assert f"test_rewards.py:{fails.__code__.co_firstlineno + 1}" in caught.value.message


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("rewards.py", ""),
        ("rewards.py:", ""),
        ("absent.py:reward", None),
        ("rewards.py:reward", "def other(): ..."),
        ("rewards.py:reward", "reward = 5"),
        ("rewards.py:reward", "import nothing_of_that_name"),
        ("rewards.py:reward", "def reward(:"),
        ("rewards.txt:reward", "def reward(): ..."),
    ],
)
def test_a_function_that_cannot_be_found_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, text: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path(spec.partition(":")[0]).write_text(text)
    with refused(TrainingError, field="reward"):
        load_reward(spec)
