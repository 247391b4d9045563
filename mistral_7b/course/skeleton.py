"""The source of an exercise, cut out of the package's own: with the bodies removed, or complete.

    def rotate(x, rope):                              def rotate(x, rope):
        \"\"\"Rotate neighbouring pairs of x.\"\"\"     -->     \"\"\"Rotate neighbouring pairs of x.\"\"\"
        cos, sin = rope                                   # Write your code here.
        ...                                               raise NotImplementedError

Signatures, docstrings and comments stay as they are in the package, so a skeleton cannot differ from what its
solution is. A name that an earlier exercise defines is imported from there, all others as the package does.
"""

from __future__ import annotations

import ast
import functools
import pathlib
import sys
import textwrap
from collections.abc import Iterator

from .exercises import Exercise, Part, home_of

ROOT = pathlib.Path(__file__).parent.parent  # of the package
TODO = "# Write your code here: texts/{stem}.md says what is to be done.\nraise NotImplementedError\n"
OUTLINE = (
    '"""Exercise {number}: {title}. See texts/{stem}.md; `mistral-7b course DIR --check {number}` checks it."""'
)

Definition = ast.FunctionDef | ast.ClassDef


def skeleton(exercise: Exercise) -> str:
    """The module that the learner completes."""
    return _module(exercise, complete=False)


def solution(exercise: Exercise) -> str:
    """The same module with the package's own bodies."""
    return _module(exercise, complete=True)


def _module(exercise: Exercise, complete: bool) -> str:
    own = [_Source.of(part.module).cut(part, exercise, complete) for part in exercise.parts]
    whole = [_Source.of(part.module).cut(part, exercise, True) for part in exercise.parts]
    imports = {"import torch"} | {f"from {e.stem} import {n}" for n, e in _earlier(exercise.offers, exercise)}
    for part, text, full in zip(exercise.parts, own, whole, strict=True):
        source = _Source.of(part.module)
        used = {name for name in _names(text) if name in source.scope}
        for name in sorted(used):
            if name not in exercise.names:
                home = home_of(name, exercise.number)
                imports.add(source.scope[name] if home is None else f"from {home.stem} import {name}")
        earlier = _earlier(_names(full) & set(source.scope), exercise)
        imports |= {f"from {e.stem} import {name}" for name, e in earlier}
    head = OUTLINE.format(number=exercise.number, title=exercise.title, stem=exercise.stem)
    lines = f"{head}\n\nfrom __future__ import annotations\n\n{_merged(imports)}"
    return "\n\n\n".join([lines, *(text.rstrip() for text in own)]) + "\n"


def _merged(imports: set[str]) -> str:
    """Import lines in order, one for each module: the standard library, others, the package, the exercises."""
    names: dict[str, list[str]] = {}
    for line in sorted(imports):
        base, _, name = line.partition(" import ") if line.startswith("from ") else (line, "", "")
        names.setdefault(base, []).append(name)

    def rank(base: str) -> tuple[int, bool, str]:
        root = base.split()[1].split(".")[0]
        level = (
            0 if root in sys.stdlib_module_names else 2 if root == "mistral_7b" else 3 if root[:2] == "ex" else 1
        )
        return level, base.startswith("from "), base

    lines: list[str] = []
    before = 0
    for base in sorted(names, key=rank):
        if lines and rank(base)[0] != before:
            lines.append("")
        before = rank(base)[0]
        lines.append(f"{base} import {', '.join(names[base])}" if base.startswith("from ") else base)
    return "\n".join(lines)


def _earlier(names: object, exercise: Exercise) -> Iterator[tuple[str, Exercise]]:
    """Those of these names that earlier exercises define, with the exercise."""
    for name in names:  # type: ignore[attr-defined]
        if name not in exercise.names and (home := home_of(name, exercise.number)) is not None:
            yield name, home


def _names(source: str) -> set[str]:
    """Every name that a source reads, those of annotations too."""
    return {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}


class _Source:
    """A module of the package: its lines, its definitions, and how each of its names is imported."""

    def __init__(self, module: str) -> None:
        self.module = module
        path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        text = path.read_text(encoding="utf-8")
        self.lines = text.splitlines(keepends=True)
        self.definitions: dict[str, Definition] = {}
        self.scope: dict[str, str] = {}
        for node in ast.parse(text).body:
            self._enter(node)

    @classmethod
    @functools.cache
    def of(cls, module: str) -> _Source:
        return cls(module)

    def _enter(self, node: ast.stmt) -> None:
        here = f"from mistral_7b.{self.module} import "
        if isinstance(node, ast.If):  # TYPE_CHECKING
            for child in node.body:
                self._enter(child)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                self.scope[alias.asname or alias.name.split(".")[0]] = ast.unparse(ast.Import([alias]))
        elif isinstance(node, ast.ImportFrom):
            package = ["mistral_7b", *self.module.split(".")[: -node.level]] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            for alias in node.names:
                self.scope[alias.asname or alias.name] = ast.unparse(ast.ImportFrom(base, [alias], 0))
        elif isinstance(node, Definition):
            self.definitions[node.name] = node
            self.scope[node.name] = here + node.name
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    self.scope[target.id] = here + target.id

    def cut(self, part: Part, exercise: Exercise, complete: bool) -> str:
        """The text of a part, with its bodies if `complete`."""
        node = self.definitions[part.name]
        if isinstance(node, ast.FunctionDef):
            return self._function(node, part, exercise, complete)
        header = self._text(node.lineno, node.body[0].lineno - 1)
        if part.base:
            header = f"class {part.name}({part.base}):\n"
            self.scope.setdefault("scheduler", "from mistral_7b.engine import scheduler")
        methods = {child.name: child for child in node.body if isinstance(child, ast.FunctionDef)}
        wanted = {*part.keep, *part.write, *(part.solution if complete else ())}
        texts = [
            self._function(method, part, exercise, complete) for name, method in methods.items() if name in wanted
        ]
        if ast.get_docstring(node):
            header += self._text(node.body[0].lineno, node.body[0].end_lineno)
        return header.rstrip() + "\n\n" + "\n".join(texts)

    def _function(self, node: ast.FunctionDef, part: Part, exercise: Exercise, complete: bool) -> str:
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        written, given = node.name in part.write, part.given.get(node.name)
        if given is None and (complete or not written):
            return self._text(first, node.end_lineno)
        documented = ast.get_docstring(node) is not None
        head = self._text(first, (node.body[0].end_lineno if documented else node.body[0].lineno - 1))
        body = given.lstrip("\n") if given is not None else TODO.format(stem=exercise.stem)
        return head + textwrap.indent(body, " " * (node.col_offset + 4))

    def _text(self, first: int, last: int | None) -> str:
        return "".join(self.lines[first - 1 : last])
