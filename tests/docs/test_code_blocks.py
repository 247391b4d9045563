"""Every code block of the documents: commands have flags that exist; Python runs, or its names exist.

Commands are parsed by the parsers that run them, and not run: README's run in test_readme.py, curl in
server/test_serving_docs.py. A Python block that needs a server, a download or minutes is marked
<!-- not run: reason -->; each name that it imports, and each keyword that it passes to one, must exist.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
from pathlib import Path
from typing import Any, NoReturn

import pytest

from mistral_7b.cli import COMMANDS, flags, main

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "examples/finetuning/README.md"]
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]+) -->\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```", re.M | re.S)
BLOCKS = [(page, found) for page in PAGES for found in BLOCK.finditer(page.read_text(encoding="utf-8"))]
OTHERS = {"curl", "pip", "python", "make", "source", "git", "docker", "apt-get", "printf"}
TEXT = {"", "text", "toml", "json", "mermaid"}
CLIENTS = {"openai", "anthropic", "ollama", "mistralai"}
# in test_readme.py, server/test_serving_docs.py and interpret/
RUN_ELSEWHERE = {"README.md", "serving.md", "interpret.md"}
COMING_FROM = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
THERE = {"path", "folder", "file", "prompt", "prompts", "params", "tokens", "cache", "messages", "schema"}


class ParsedError(BaseException):
    """The flags were read; what the command does is not wanted."""


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch) -> None:
    parse = flags.tyro.cli

    def cli(*args: Any, **options: Any) -> NoReturn:
        parse(*args, **options)
        raise ParsedError

    monkeypatch.setattr(flags.tyro, "cli", cli)


def commands_of(body: str) -> list[list[str]]:
    """The commands of a shell block as words, without comments, pipes and variables before them."""
    lines = body.replace("\\\n", " ")
    if lines.count('"') % 2 == 0 and re.search(r'"[^"\n]*\n[^"]*"', lines):  # a quoted text over lines
        lines = re.sub(r'"[^"]*"', lambda text: text[0].replace("\n", " "), lines)
    found = []
    for line in lines.splitlines():
        for part in re.split(r" \| | && | &$| > ", re.sub(r"(^|\s)#.*", "", line)):
            words = [w for w in shlex.split(part) if not re.fullmatch(r"[A-Z_]+=.*", w)]
            if words:
                found.append(words)
    return found


def check_command(words: list[str]) -> None:
    """Fails for a command, a flag, a script or a target that does not exist."""
    program = words[0].rpartition("/")[2]
    if program == "mistral-7b":
        assert words[1] in COMMANDS, words
        if words[1] == "train" and "--config" in words:  # the file is read first
            at = words.index("--config")
            words = words[:at] + words[at + 2 :]
        try:
            code = main(words[1:])
        except ParsedError:
            return
        pytest.fail(f"{shlex.join(words)} was refused with code {code}")
    if program == "python" and words[1].endswith(".py"):
        source = (ROOT / words[1]).read_text(encoding="utf-8")
        for word in words[2:]:
            if word.startswith("--"):
                assert f'"{word}"' in source or f"{word[2:].replace('-', '_')}: " in source, words
    if program == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), words


SHELL = [(page, found["body"]) for page, found in BLOCKS if found["language"] == "sh"]
PYTHON = [(page, found) for page, found in BLOCKS if found["language"] == "python"]


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    assert {found["language"] for _, found in BLOCKS} <= {"sh", "python"} | TEXT
    assert len(SHELL) > 20
    assert len(PYTHON) > 10


@pytest.mark.usefixtures("parse_only")
@pytest.mark.parametrize(("page", "body"), SHELL, ids=[f"{p.stem}-{b[:30]!r}" for p, b in SHELL])
def test_commands_have_the_flags_that_are_shown(
    page: Path, body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in commands_of(body):
        program = words[0].rpartition("/")[2]
        if program == "mistral-7b" or program in OTHERS:
            check_command(words)


@pytest.mark.usefixtures("parse_only")
def test_a_wrong_flag_is_noticed() -> None:
    with pytest.raises(pytest.fail.Exception, match="refused with code 2"):
        check_command(["mistral-7b", "generate", "demo", "--no-such-flag"])
    with pytest.raises(pytest.fail.Exception, match="refused with code 2"):
        check_command(["mistral-7b", "serve", "demo", "--port", "eighty"])
    with pytest.raises(AssertionError):
        check_command(["make", "coffee"])
    with pytest.raises(AssertionError):
        check_command(["python", "experiments/engine.py", "--no-such-flag"])


def check_names(source: str, names: dict[str, Any]) -> None:
    """Every import must succeed, and every call of an imported name must fit its signature."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            names.update({alias.name: getattr(module, alias.name) for alias in node.names})
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (target := resolve(node.func, names)) is not None:
            keywords = {k.arg: None for k in node.keywords if k.arg}
            inspect.signature(target).bind_partial(*[None] * len(node.args), **keywords)


def resolve(node: ast.expr, names: dict[str, Any]) -> Any:
    """The object that an expression of names and attributes means; None if it is no known one."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := resolve(node.value, names)) is not None:
        return getattr(owner, node.attr)
    return None


@pytest.mark.parametrize(("page", "found"), PYTHON, ids=[f"{p.stem}-{f['body'][:30]!r}" for p, f in PYTHON])
def test_python_runs_or_names_what_there_is(
    page: Path, found: re.Match[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    body, mark = found["body"], found["mark"] or ""
    if page.name in RUN_ELSEWHERE or mark.startswith("not run"):
        for client in CLIENTS & set(re.findall(r"^from (\w+)", body, re.M)):
            pytest.importorskip(client)
        check_names(body, {})
    else:
        exec(compile(body, str(page), "exec"), {})


def test_a_wrong_keyword_is_noticed() -> None:
    with pytest.raises(TypeError, match="no_such"):
        check_names("from mistral_7b import SamplingParams\nSamplingParams(no_such=1)", {})
    with pytest.raises(AttributeError):
        check_names("from mistral_7b import Elsewhere", {})


ROWS = re.findall(r"^\| .* \| (.*) \|$", COMING_FROM, re.M)
OURS = [span for row in ROWS for span in re.findall(r"`([^`]+)`", row)]


@pytest.mark.usefixtures("parse_only")
@pytest.mark.parametrize("span", OURS)
def test_what_is_named_for_those_who_come_from_elsewhere_exists(span: str) -> None:
    import torch

    import mistral_7b

    if span.startswith("mistral-7b "):
        check_command(shlex.split(span))
    elif route := re.fullmatch(r"(GET|POST) (/\S+)", span):
        sources = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "mistral_7b/server").rglob("*.py"))
        called = rf'\.{route[1].lower()}\(\s*"(/v1)?{route[2].removeprefix("/v1")}"'
        assert re.search(called, sources), span
    else:
        names = {name: getattr(mistral_7b, name) for name in mistral_7b._HOMES} | {"torch": torch}
        names |= {"model": mistral_7b.Mistral7B(device="meta"), "llm": mistral_7b.LLM}
        tree = ast.parse(span)
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                assert node.id in names.keys() | THERE, f"{node.id} of {span}"
        check_names(span, names)
