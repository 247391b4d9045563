"""Imports point one way: read from the source of every module, imports inside functions included."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mistral_7b

ROOT = Path(mistral_7b.__file__).parent

# From the ground up: a room imports from lines above its own, never from its own line or below.
LAYERS = (
    ("errors",),
    ("files", "machine"),
    ("kernels",),
    ("attention", "rope", "sampling"),
    ("cache",),
    ("model",),
    ("surgery",),
    ("quantization",),
    ("checkpoint",),
    ("distributed", "lora", "text", "activations"),
    ("engine",),
    ("generate", "training", "evaluation", "interpret"),
    ("server", "bench", "course"),
    ("cli",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
PEERS = (
    {"surgery", "training"},
    {"checkpoint", "training"},
)  # told apart above, and yet strangers
# Deferred imports upwards: where a user's object is the natural door to a room above it.
DOORS = {
    ("model", "from_pretrained", "checkpoint"), ("model", "save_pretrained", "checkpoint"),
    ("model", "record", "interpret"), ("model", "patch", "interpret"), ("model", "steer", "interpret"),
}  # fmt: skip
# Read for --help, or at the HTTP door, before anyone needs torch.
WITHOUT_TORCH = (
    "", "errors", "machine", "cli", "cli.serve", "sampling.params", "text.messages", "text.tokenizer",
    "text.tool_calls", "text.chat_template", "text.template_choice", "text.template_sandbox",
    "checkpoint", "checkpoint.hub", "checkpoint.starter", "distributed.ranks", "checkpoint.gguf.file",
    "checkpoint.gguf.tokenizer",
    "checkpoint.gguf.tokenizer_metadata", "checkpoint.tokenizer_files", "checkpoint.chat_templates", "lora",
    "training", "training.args", "training.finetune_args", "training.examples", "training.preview",
    "training.held_out", "training.rewards", "cli.finetune", "cli.explain",
    "kernels.cpu.compiler", "kernels.threads", "engine.grammar.client", "engine.grammar.forkserver",
    "server.config", "server.openai.protocol", "server.openai.answers", "server.anthropic.wire",
    "server.anthropic.events", "server.openai.responses.events", "server.openai.responses.store",
    "server.ollama.bodies", "server.ollama.answers",
    "bench.run", "bench.report", "bench.plot", "bench.serving.run", "bench.serving.report", "bench.serving.plot",
    "bench.quality.records", "bench.quality.report", "text.default_text",
    "course", "course.exercises", "course.skeleton", "course.folder", "cli.course", "cli.agent_guide",
    "server.openai.watching", "activations.points",
)  # fmt: skip

Import = tuple[str, str, int]  # the room imported, the function it stands in ("" at the top), the line


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(source: str, package: tuple[str, ...]) -> Iterator[Import]:
    """Imports of this package's rooms in a module that lies in `package`, () being the root."""

    def walk(node: ast.AST, function: str) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inside = child.name if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else function
            for name in names_in(child):
                target = name.split(".")
                if target[0] == "mistral_7b" and len(target) > 1:
                    yield target[1], inside, child.lineno  # type: ignore[attr-defined]
            yield from walk(child, inside)

    def names_in(node: ast.AST) -> list[str]:
        """Full dotted names, `from . import a` giving the a as well."""
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        if not isinstance(node, ast.ImportFrom):
            return []
        base = node.module or ""
        if node.level:
            above = ("mistral_7b", *package)[: len(package) + 2 - node.level]
            base = ".".join([*above, *([node.module] if node.module else [])])
        return [f"{base}.{alias.name}" for alias in node.names] if base == "mistral_7b" else [base]

    yield from walk(ast.parse(source), "")


def faults_of(source: str, room: str, package: tuple[str, ...] = ()) -> list[str]:
    """What is wrong with the imports of a module of `room`."""
    faults = []
    for target, function, line in imports_of(source, package):
        if target in (room, "__version__") or (room, function, target) in DOORS:
            continue
        if target not in LEVEL:
            faults.append(f"{room}:{line} imports {target}, which has no place in LAYERS")
        elif LEVEL[target] >= LEVEL[room]:
            faults.append(f"{room}:{line} imports {target}, which lies beside or above it")
        elif any({room, target} <= group for group in PEERS):
            faults.append(f"{room}:{line} imports its peer {target}")
    return faults


MODULES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(path)
    assert room in LEVEL, f"a new room: give {room} its place in LAYERS"
    assert not faults_of(path.read_text(encoding="utf-8"), room, path.relative_to(ROOT).parts[:-1])


def test_the_model_stands_on_attention_cache_and_errors_alone() -> None:
    found = set(imports_of((ROOT / "model.py").read_text(encoding="utf-8"), ()))
    assert {room for room, function, _ in found if not function} <= {"attention", "cache", "errors", "rope"}
    doors = {("model", function, room) for room, function, _ in found if function}
    assert doors == DOORS


def test_the_package_itself_imports_nothing() -> None:
    """Beyond what only a type checker sees: names are looked up in _HOMES, each in a room that is there."""
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    outside = [node for node in tree.body if not isinstance(node, ast.If)]
    assert [name for node in outside for name, *_ in imports_of(ast.unparse(node), ())] == []
    for name, room in mistral_7b._HOMES.items():
        assert room.split(".")[0] in LEVEL
        assert getattr(mistral_7b, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        mistral_7b.nonsense  # noqa: B018
    assert set(mistral_7b._HOMES) <= set(dir(mistral_7b))


@pytest.mark.parametrize(
    ("room", "package", "source"),
    [
        ("cache", (), "from .model import Mistral7B"),
        ("cache", (), "def f():\n    from .model import Mistral7B"),
        ("cache", (), "from . import model"),
        ("cache", (), "import mistral_7b.model"),
        ("cache", (), "from mistral_7b.model import ModelArgs"),
        ("cache", (), "from mistral_7b import Mistral7B"),
        ("cache", (), "if True:\n    from .generate import generate"),
        ("model", (), "def elsewhere():\n    from .checkpoint import load"),
        ("model", (), "from .checkpoint import load"),
        ("checkpoint", ("checkpoint",), "from ..training import train"),
        ("training", ("training",), "from ..checkpoint.hub import resolve"),
        ("training", ("training",), "from .. import checkpoint"),
        ("engine", ("engine",), "from ..generate import generate"),
        ("evaluation", ("evaluation", "deep"), "from ...cli import main"),
    ],
)
def test_the_reader_of_imports_sees_a_wrong_one(room: str, package: tuple[str, ...], source: str) -> None:
    assert len(faults_of(source, room, package)) == 1


def test_the_reader_of_imports_passes_a_right_one() -> None:
    for room, package, source in (
        ("cache", (), "from .attention import visible\nfrom .errors import CacheError\nimport torch.nn"),
        ("model", (), "def from_pretrained():\n    from .checkpoint import load"),
        (
            "checkpoint",
            ("checkpoint",),
            "from . import hub\nfrom .names import rename\nfrom ..model import Mistral7B",
        ),
        ("cli", ("cli",), "from .. import __version__\nfrom .. import training"),
    ):
        assert faults_of(source, room, package) == []


def exists(module: str) -> bool:
    path = ROOT / module.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists() or module == ""


def test_rooms_that_promise_it_import_without_torch() -> None:
    """In a process each would be the proof of one; here all together, then torch in the end as a control."""
    names = [f"mistral_7b.{m}".rstrip(".") for m in WITHOUT_TORCH if exists(m)]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules: sys.exit(name + ' imported torch')\n"
        "import mistral_7b\n"
        "mistral_7b.Mistral7B\n"
        "assert 'torch' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_room_has_a_name_that_says_nothing() -> None:
    names = {part.removesuffix(".py") for path in MODULES for part in path.relative_to(ROOT).parts}
    assert not names & {"utils", "util", "common", "misc", "manager", "helpers"}
