"""The page for coding assistants: it is printed whole, its Python runs, and its commands and files exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import mistral_7b
from mistral_7b import cli
from mistral_7b.cli.agent_guide import PAGE

TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.S)
COMMANDS = [
    shlex.split(line, comments=True)
    for language, body in BLOCKS
    if language == "sh"
    for line in body.splitlines()
    if line.startswith("mistral-7b ")
]


def test_the_command_prints_the_page(run) -> None:
    assert run("agent-guide") == (0, TEXT, "")
    assert len(TEXT.splitlines()) <= 250


def test_its_python_runs() -> None:
    source = [body for language, body in BLOCKS if language == "python"]
    assert len(source) >= 6
    exec(compile("\n".join(source), PAGE.name, "exec"), {})


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_its_commands_have_these_flags(run, words: list[str]) -> None:
    code, out, _ = run(words[1], "--help")
    assert code == 0
    assert all(flag in out for flag in words if flag.startswith("--"))


def test_what_it_names_exists() -> None:
    assert {words[1] for words in COMMANDS} <= set(cli.COMMANDS)
    root = Path(mistral_7b.__file__).parent
    section = TEXT.split("## Changing the code")[1]
    for name in re.findall(r"`((?:\w+/)*\w+\.py)`", section.split("- Imports")[0]):
        assert (root / name).exists() or (root / "engine" / name).exists(), name
    classes = re.findall(r"\b[A-Z]\w+Error\b", TEXT)
    known = {*vars(mistral_7b.errors), "RequestsFailedError"}
    assert set(classes) <= known
