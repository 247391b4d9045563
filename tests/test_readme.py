"""README's promises: its snippets run, its output is what comes out, its line numbers point where they say."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
import torch

from mistral_7b.checkpoint import read_args
from mistral_7b.checkpoint.hub import DEMO
from mistral_7b.cli import main
from mistral_7b.lora.files import Adapter, Factors, save_adapter

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"(?:<!-- (?P<mark>[\w ]+) -->\n)?```(?P<language>\w+)\n(?P<body>.*?)```", re.S)
BLOCKS = [m.groupdict() for m in BLOCK.finditer(README)]
COMMANDS = [
    line
    for block in BLOCKS
    if block["language"] == "sh"
    for line in block["body"].splitlines()
    if line.startswith("mistral-7b ")
]
NEEDS_NETWORK, TALKS, SERVES = "mistral-7b pull", "mistral-7b chat", "mistral-7b serve"


def test_the_first_snippet_prints_what_readme_shows() -> None:
    snippet = next(b["body"] for b in BLOCKS if b["language"] == "python" and "generate(model" in b["body"])
    shown = next(b["body"] for b in BLOCKS if b["mark"] == "output")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(snippet, "README.md", "exec"), {})
    assert out.getvalue().rstrip("\n") == shown.rstrip("\n")


def test_the_starter_model_answers_as_readme_shows(starter: Path) -> None:
    snippet = next(b["body"] for b in BLOCKS if b["language"] == "python" and 'LLM("starter")' in b["body"])
    shown = next(b["body"] for b in BLOCKS if b["mark"] == "starter output")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(snippet, "README.md", "exec"), {})
    assert out.getvalue() == shown


def test_the_engines_snippet_continues_both_prompts() -> None:
    snippet = next(b["body"] for b in BLOCKS if b["language"] == "python" and 'LLM("demo"' in b["body"])
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(snippet, "README.md", "exec"), {})
    assert len(out.getvalue().splitlines()) == 2


def test_the_full_size_snippet_is_the_one_that_is_measured() -> None:
    snippet = next(b["body"] for b in BLOCKS if b["mark"] == "full size")
    measured = (ROOT / "tests" / "full_size.py").read_text()
    for line in snippet.splitlines():
        assert line.split("#")[0].strip() in measured


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith((NEEDS_NETWORK, TALKS, SERVES))])
def test_commands_run(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("src", "tests"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("def f(x):\n    return x + 1\n" * 2000)
    words = shlex.split(command)[1:]
    if words[0] == "train":  # two updates of it
        words[words.index("--steps") + 1] = "2"
        words[words.index("--warmup") + 1] = "1"
        words += ["--seq-len", "64", "--rows", "1", "--dim", "16", "--head-dim", "8", "--hidden-dim", "16"]
    if words[0] == "merge":
        args = read_args(DEMO)[0]
        factors = Factors(torch.ones(2, args.dim), torch.ones(args.n_heads * args.head_dim, 2), 0.1)
        save_adapter(Adapter({"layers.0.attention.wq": factors}), tmp_path / words[2], args)
        words += ["--tokens", "60"]
    if words[0] == "compare":
        assert main(["convert", "demo", words[2], "--to", "gguf"]) == 0
        words += ["--tokens", "64"]
    if words[0] == "eval":
        words[words.index("--text") + 1] = "src/a.py"
    if words[0] == "bench":  # one process of it, at a size that any machine holds
        words[words.index("--shape") + 1] = "tiny"
        words += ["--quick", "--what", "prefill"]
        request.getfixturevalue("ceilings_asked")
    if words[0] == "doctor":
        words.append("--no-measure")
    assert main(words) == 0


def test_chat_answers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert any(c.startswith(TALKS) for c in COMMANDS)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/exit\n"))
    assert main(["chat", "demo", "--max-tokens", "5"]) == 0


def test_commands_that_need_a_network_or_do_not_end_at_least_read_their_flags() -> None:
    for command in (c for c in COMMANDS if c.startswith((NEEDS_NETWORK, SERVES))):  # serve: cli/test_cli_serve.py
        assert main([*shlex.split(command)[1:], "--help"]) == 0


LINKS = re.findall(r"\[`(\w+)`\]\((mistral_7b/\w+\.py)#L(\d+)\)", README)


@pytest.mark.parametrize(("name", "path", "line"), LINKS)
def test_the_table_points_at_the_lines_it_names(name: str, path: str, line: str) -> None:
    pointed = (ROOT / path).read_text().splitlines()[int(line) - 1]
    assert re.match(rf"(class|def) {name}\b", pointed), f"{path}:{line} is {pointed!r}"


def test_the_tree_lists_what_is_there() -> None:
    tree = next(b["body"] for b in BLOCKS if b["body"].startswith("mistral_7b/\n"))
    for name in re.findall(r"^  ([\w./]+)", tree, re.M):
        assert (ROOT / "mistral_7b" / name).exists(), name
    for package in (ROOT / "mistral_7b").iterdir():
        if package.name not in ("__pycache__", "__init__.py", "__main__.py", "py.typed"):
            assert package.name in tree, f"{package.name} is missing from README's tree"


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_the_reading_path_is_short_and_each_file_begins_with_what_it_is() -> None:
    section = README.split("<!-- reading path -->", 1)[1].split("\n## ", 1)[0]
    paths = re.findall(r"^\d+\. \[(\S+)\]\(\1\)", section, re.M)
    assert len(paths) == section.count("](") >= 7
    sources = [(ROOT / path).read_text(encoding="utf-8") for path in paths]
    assert sum(len(source.splitlines()) for source in sources) <= 1500
    for path, source in zip(paths, sources, strict=True):
        opening = ast.get_docstring(ast.parse(source)) or ""
        assert re.search(r"(?m)^    \S", opening), f"{path} begins without an equation or a diagram"
