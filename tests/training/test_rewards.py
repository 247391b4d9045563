"""Reward functions: what they get, and what goes wrong in them is said clearly."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from refusals import refused

from mistral_7b.cli.finetune import Finetune
from mistral_7b.cli.inputs import read_flags
from mistral_7b.errors import TrainingError
from mistral_7b.training.rewards import Reward, load_reward

ROOT = Path(__file__).parents[2]

ROW = {"prompt": "1 + 1 =", "answer": "2"}


def test_a_function_of_a_file_gets_prompt_completions_and_row(tmp_path: Path) -> None:
    file = tmp_path / "my:rewards.py"
    file.write_text("def equal(prompt, completions, row):\n    return [c == row['answer'] for c in completions]\n")
    assert load_reward(f"{file}:equal")(ROW, ["2", "3"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    "returned",
    [[1.0], [1.0, 2.0, 3.0], [1.0, float("nan")], [1.0, float("inf")], [1.0, "x"], [1.0, None], 1.0, None, "12"],
)
def test_anything_but_finite_numbers_is_refused(returned: Any) -> None:
    with refused(TrainingError, field="reward", place="rewards.py") as caught:
        Reward(lambda *given: returned, "rewards.py")(ROW, ["2", "3"])
    assert "returned" in caught.value.message


def test_an_exception_names_its_line() -> None:
    def fails(prompt: str, completions: list[str], row: dict[str, Any]) -> list[float]:
        return [row["missing"] for _ in completions]

    with refused(TrainingError, field="reward") as caught:
        Reward(fails)(ROW, ["2"])
    assert isinstance(caught.value.__cause__, KeyError)
    assert f"test_rewards.py:{fails.__code__.co_firstlineno + 1}" in caught.value.message


def test_a_function_that_ends_the_program_is_an_error() -> None:
    with refused(TrainingError, field="reward") as caught:
        Reward(lambda *given: sys.exit(0))(ROW, ["2"])
    assert "SystemExit" in caught.value.message


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
        ("rewards.py:reward", "raise SystemExit(0)"),
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


def test_the_function_of_the_documentation_runs() -> None:
    text = (ROOT / "docs" / "preferences.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    assert Reward(namespace["reward"])(ROW, [" 2\n", "3"]) == [1.0, 0.0]


def test_the_commands_of_the_documentation_read_their_flags() -> None:
    text = (ROOT / "docs" / "preferences.md").read_text(encoding="utf-8")
    commands = re.findall(r"^mistral-7b finetune (.*)$", text, re.MULTILINE)
    methods = [read_flags(Finetune, "finetune", shlex.split(command)).training.method for command in commands]
    assert methods == ["dpo", "kto", "grpo"]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ('{"name": "Ann", "age": 31}', 1.0),
        ('{"age": 31, "name": "Zoe"}', 0.55),
        ('{"name": "Ann", "age": "31"}', 0.55),
        ('{"name": "Zoe", "age": 7}', 0.1),
        ('{"name": "Ann", "age": 31, "city": "Rome"}', 0.0),
        ('{"name": "Ann", "age": 31} Well done', 0.0),
        ("[31]", 0.0),
        ("", 0.0),
    ],
)
def test_the_example_rewards_answers_more_than_their_form(completion: str, reward: float) -> None:
    score = load_reward(f"{ROOT / 'examples' / 'rewards.py'}:name_and_age")
    assert score({"prompt": "", "name": "Ann", "age": 31}, [completion]) == [pytest.approx(reward)]
