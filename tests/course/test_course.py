"""The course: its skeletons are the package's source, its checks pass right solutions and explain wrong ones."""

from __future__ import annotations

import ast
import contextlib
import io
import pathlib
from collections.abc import Iterator

import pytest
from learner import mistaken, written
from mistakes import MISTAKES, Mistake
from refusals import refused

from mistral_7b.cli import main
from mistral_7b.course import folder
from mistral_7b.course.exercises import EXERCISES, Exercise, exercise
from mistral_7b.course.skeleton import ROOT, skeleton, solution
from mistral_7b.errors import CourseError

each_exercise = pytest.mark.parametrize("e", EXERCISES, ids=lambda e: e.stem)


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder in which a learner has solved everything."""
    path = tmp_path_factory.mktemp("course") / "solved"
    folder.write(path)
    for e in EXERCISES:
        (path / f"{e.stem}.py").write_text(written(e.number), encoding="utf-8")
    return path


@contextlib.contextmanager
def replaced(path: pathlib.Path, e: Exercise, text: str) -> Iterator[None]:
    """For a moment, another text as the learner's file of an exercise."""
    file = path / f"{e.stem}.py"
    before = file.read_text(encoding="utf-8")
    file.write_text(text, encoding="utf-8")
    try:
        yield
    finally:
        file.write_text(before, encoding="utf-8")


# ------------------------------------------------------------------ solutions, skeletons, mistakes


@each_exercise
def test_a_plain_solution_passes(solved: pathlib.Path, e: Exercise) -> None:
    result = folder.check(solved, e)
    assert result.state == "passed", result.said


@each_exercise
def test_the_packages_solution_passes(solved: pathlib.Path, e: Exercise) -> None:
    with replaced(solved, e, solution(e)):
        result = folder.check(solved, e)
    assert result.state == "passed", result.said


@each_exercise
def test_a_skeleton_is_to_do(solved: pathlib.Path, e: Exercise) -> None:
    with replaced(solved, e, skeleton(e)):
        result = folder.check(solved, e)
    assert (result.state, f"{e.stem}.py:" in result.said) == ("to do", True), result.said


@pytest.mark.wording
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: f"{m.exercise}-{m.said[-1][:40]}")
def test_a_mistake_is_explained(solved: pathlib.Path, mistake: Mistake) -> None:
    e = exercise(mistake.exercise)
    with replaced(solved, e, mistaken(e.number, mistake.right, mistake.wrong)):
        result = folder.check(solved, e)
    assert result.state == "failed"
    for words in mistake.said:
        assert words in result.said, result.said


def test_each_exercise_has_two_mistakes_explained() -> None:
    assert all(sum(m.exercise == e.number for m in MISTAKES) >= 2 for e in EXERCISES)


@each_exercise
def test_a_skeleton_has_the_packages_signatures_and_docstrings(e: Exercise) -> None:
    def described(text: str) -> dict[str, tuple[str, str | None]]:
        found = {}
        for top in ast.parse(text).body:
            for node in [top, *getattr(top, "body", [])]:
                if isinstance(node, ast.FunctionDef):
                    name = node.name if node is top else f"{top.name}.{node.name}"
                    found[name] = ast.unparse(node.args), ast.get_docstring(node)
        return found

    own, real = described(skeleton(e)), {}
    for part in e.parts:
        real |= described(ROOT.joinpath(*part.module.split(".")).with_suffix(".py").read_text(encoding="utf-8"))
    assert own
    assert all(real[name] == what for name, what in own.items())
    assert skeleton(e).count("raise NotImplementedError") == sum(len(part.write) for part in e.parts)


@each_exercise
def test_a_text_has_an_equation_a_drawing_and_hints(e: Exercise) -> None:
    text = (folder.HERE / "texts" / f"{e.stem}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {e.number}. {e.title}\n")
    assert text.count("```") >= 2
    assert "<details>" in text
    for part in e.parts:
        assert all(name == part.name or name in text for name in part.write)


# ------------------------------------------------------------------ the folder


def test_files_that_are_there_are_kept(tmp_path: pathlib.Path) -> None:
    assert folder.write(tmp_path / "new") == (len(folder.contents()), 0)
    own, lost = tmp_path / "new" / "ex03_window.py", tmp_path / "new" / "checks" / "ex03_window.py"
    own.write_text("my work", encoding="utf-8")
    lost.unlink()
    assert folder.write(tmp_path / "new") == (1, len(folder.contents()) - 1)
    assert own.read_text(encoding="utf-8") == "my work"
    assert lost.exists()


def test_a_folder_of_other_things_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with refused(CourseError, field="folder", place=tmp_path):
        folder.write(tmp_path)
    with refused(CourseError, field="folder", place=tmp_path / "thesis.txt"):
        folder.write(tmp_path / "thesis.txt")
    with refused(CourseError, field="folder", place=tmp_path):
        folder.check(tmp_path, EXERCISES[0])
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with refused(CourseError, field="number"):
        exercise(0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def visible(:\n", "ex03_window.py:1: SyntaxError"),
        ("def visible(*of):\n    return 1 / 0\n", "ex03_window.py:2, in visible: ZeroDivisionError"),
        ("def visible(*of):\n    return 1 / 0\n", "(called by checks/ex03_window.py:"),
        ("import sys\n\nsys.exit()\n", "ex03_window.py:3, in <module>: SystemExit"),
        ("", "AttributeError"),
    ],
)
def test_an_error_in_the_learners_code_is_said_with_its_place(solved: pathlib.Path, text: str, said: str) -> None:
    with replaced(solved, EXERCISES[2], text):
        result = folder.check(solved, EXERCISES[2])
    assert result.state == "failed"
    assert said in result.said


def test_a_missing_file_is_named(solved: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder.write(tmp_path / "c")
    (tmp_path / "c" / "ex01_rmsnorm.py").unlink()
    with refused(CourseError, place=tmp_path / "c" / "ex01_rmsnorm.py"):
        folder.check(tmp_path / "c", EXERCISES[0])


# ------------------------------------------------------------------ the command


def run(*argv: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["course", *map(str, argv)])
    return code, out.getvalue(), err.getvalue()


def test_the_command_writes_checks_and_shows(solved: pathlib.Path, tmp_path: pathlib.Path) -> None:
    code, out, _ = run(tmp_path / "mine")
    assert (code, str(len(folder.contents())) in out) == (0, True)
    code, out, _ = run(tmp_path / "mine")
    assert (code, "none was changed" in out) == (0, True)
    code, out, _ = run(solved, "--check", 1, 3)
    assert (code, "2 of 2 passed" in out) == (0, True)
    with replaced(solved, EXERCISES[2], skeleton(EXERCISES[2])):
        code, out, _ = run(solved, "--check", 1, 3)
    assert (code, "1 of 2 passed" in out, "ex03_window.md" in out) == (1, True, True)
    code, out, _ = run("--solution", 3)
    assert (code, out) == (0, solution(EXERCISES[2]))


@pytest.mark.parametrize(
    "argv", [("--check", 15), ("--solution", 0), ("--check", 1, "--solution", 1), ("--check", "x")]
)
def test_a_wrong_command_is_one_message(solved: pathlib.Path, argv: tuple[object, ...]) -> None:
    code, out, err = run(solved, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("mistral-7b: ")


def test_ctrl_c_says_where_the_learners_code_was(solved: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with replaced(solved, EXERCISES[2], "def visible(*of):\n    raise KeyboardInterrupt\n"):
        code, out, _ = run(solved, "--check", 3)
    assert (code, "interrupted at ex03_window.py:2, in visible" in out) == (130, True)
