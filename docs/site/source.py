"""What the site takes from the repository: code by name, and pages of the files that documents link to."""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|<)([^)#\s]+)(#[^)\s]*)?(?=\))")
# A paragraph that is only this link is the code itself on the site: [`RMSNorm`](../mistral_7b/model.py)
CODE = re.compile(r"^\[`([\w.]+)`\]\(\.\./([\w/]+\.py)\)$", re.M)
FENCED = re.compile(r"^(```+|~~~+).*?^\1$", re.M | re.S)
LANGUAGES = {".py": "python", ".h": "cpp", ".cpp": "cpp", ".json": "json", ".toml": "toml", ".js": "javascript"}
UNSEARCHED = "---\nsearch: {exclude: true}\nhide: [toc]\n---\n"


def definition(path: str, name: str) -> tuple[str, int]:
    """The source of a function, class, method or assignment of a file, and its first line's number.

    LookupError if the file has nothing of this name.
    """
    text = (ROOT / path).read_text(encoding="utf-8")
    body: list[ast.stmt] = ast.parse(text).body
    for part in name.split("."):
        found = next((node for node in body if part in _names(node)), None)
        if found is None:
            raise LookupError(f"{path} has no {name}")
        body = getattr(found, "body", [])
    assert found is not None
    first = min([found.lineno, *(d.lineno for d in getattr(found, "decorator_list", []))])
    lines = text.splitlines()[first - 1 : found.end_lineno]
    indent = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(line[indent:] for line in lines), first


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


def with_code(markdown: str) -> str:
    """Replace the paragraphs that name code by that code, under a line that says where it is."""

    def block(found: re.Match[str]) -> str:
        name, path = found[1], found[2]
        source, line = definition(path, name)
        return f'[{path}](../{path}#L{line}), line {line}:\n\n~~~~python linenums="{line}"\n{source}\n~~~~\n'

    return CODE.sub(block, markdown)


def page_of(path: str) -> str:
    """The page of the site, as a path in docs/, that shows a file or folder of the repository."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return page_of(f"{path}/README.md") if (ROOT / path / "README.md").exists() else f"source/{path}/index.md"
    return f"source/{path}" if path.endswith((".md", ".png")) else f"source/{path}.md"


def each_link(markdown: str, path: str, change: Callable[[str, str], str]) -> str:
    """Replace each relative link of the document `path`, outside of code, by change(file, anchor)."""

    def replaced(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), found[1]))
        return change(target, found[2] or "")

    parts, end = [], 0
    for code in FENCED.finditer(markdown):
        parts += [LINK.sub(replaced, markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, LINK.sub(replaced, markdown[end:])])


def with_links(markdown: str, path: str, page: str) -> str:
    """Rewrite the links of the document `path` of the repository for its place `page` on the site."""

    def change(target: str, anchor: str) -> str:
        if line := re.fullmatch(r"#L(\d+)", anchor):
            anchor = f"#__codelineno-0-{line[1]}"
        return posixpath.relpath(page_of(target), posixpath.dirname(page) or ".") + anchor

    return each_link(markdown, path, change)


def linked(markdown: str, path: str) -> set[str]:
    """What the document `path` links to outside docs/. LookupError for a file that is missing."""
    found: set[str] = set()

    def note(target: str, anchor: str) -> str:
        if not (ROOT / target).exists():
            raise LookupError(f"{path} links to {target}, which is not there")
        if page_of(target).startswith("source/"):
            found.add(target)
        return ""

    each_link(markdown, path, note)
    return found


def source_page(path: str) -> str:
    """The Markdown of the page that shows a file or folder."""
    file = ROOT / path
    if file.is_dir():
        names = sorted(p.name + "/" * p.is_dir() for p in file.iterdir() if not p.name.startswith(("_", ".")))
        return UNSEARCHED + f"# {path}\n\n" + "".join(f"- `{name}`\n" for name in names)
    text = file.read_text(encoding="utf-8")
    if path.endswith(".md"):
        return UNSEARCHED + text
    language = LANGUAGES.get(file.suffix, "text")
    return UNSEARCHED + f'# {path}\n\n~~~~~{language} linenums="1"\n{text.rstrip()}\n~~~~~\n'
