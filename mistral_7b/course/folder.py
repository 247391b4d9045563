"""The learner's folder: writing it, and running its checks on the learner's files. Imports no torch by itself.

DIR/README.md                   how to work, and the list of exercises
DIR/ex01_rmsnorm.py ...         skeletons, which the learner completes
DIR/texts/ex01_rmsnorm.md ...   what is to be done, the equation, a drawing, hints
DIR/checks/ex01_rmsnorm.py ...  copies of the package's checks, which --check runs
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import pathlib
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ..errors import CourseError
from ..files import atomic_write
from .exercises import EXERCISES, Exercise
from .skeleton import skeleton

HERE = pathlib.Path(__file__).parent
State = Literal["passed", "failed", "to do"]


@dataclass(frozen=True)
class Result:
    """What a check found. `said` is the error, or what a passed check shows."""

    exercise: Exercise
    state: State
    said: str
    seconds: float


def contents() -> dict[str, str]:
    """The files of a new folder: path -> text."""
    files = {"README.md": _read("texts/README.md").replace("{exercises}", _list())}
    for e in EXERCISES:
        files[f"{e.stem}.py"] = skeleton(e)
        files[f"texts/{e.stem}.md"] = _read(f"texts/{e.stem}.md")
        files[f"checks/{e.stem}.py"] = _read(f"checks/{e.stem}.py")
    return files


def write(folder: pathlib.Path) -> tuple[int, int]:
    """Write the course, and leave every file that is there as it is: how many were written and kept.

    CourseError if `folder` is a file, or holds other things and no course. WriteError if the system refuses.
    """
    if folder.exists() and not folder.is_dir():
        raise CourseError("this is a file; the course needs a folder", field="folder", place=folder)
    if folder.is_dir() and any(folder.iterdir()) and not _is_course(folder):
        raise CourseError(
            "this folder is not empty, and holds no course", field="folder", place=folder, hint="name a new folder"
        )
    new = {name: text for name, text in contents().items() if not (folder / name).exists()}
    for name, text in new.items():
        with atomic_write(folder / name, folders=True) as path:
            path.write_text(text, encoding="utf-8")
    return len(new), len(contents()) - len(new)


def check(folder: pathlib.Path, exercise: Exercise) -> Result:
    """Run the check of one exercise on the learner's files. CourseError if there is no course in `folder`."""
    if not _is_course(folder):
        raise CourseError(
            "there is no course in this folder", field="folder", place=folder,
            hint="`mistral-7b course DIR` writes it to a new folder",
        )  # fmt: skip
    for path in (folder / f"{exercise.stem}.py", folder / "checks" / f"{exercise.stem}.py"):
        if not path.exists():
            raise CourseError(
                "this file is missing", place=path, hint=f"`mistral-7b course {folder}` writes it again"
            )
    importlib.import_module("torch")  # before the time is taken
    began = time.perf_counter()
    state, said = _run(folder.resolve(), exercise)
    return Result(exercise, state, said, time.perf_counter() - began)


def _run(folder: pathlib.Path, exercise: Exercise) -> tuple[State, str]:
    import torch

    try:
        with _importing_from(folder), torch.no_grad():
            module = importlib.import_module(exercise.stem)
            shown = _load(folder / "checks" / f"{exercise.stem}.py").check(module)  # type: ignore[attr-defined]
    except CourseError as error:
        return "failed", str(error)
    except (Exception, SystemExit) as error:
        place = _place(error, folder)
        called = None if isinstance(error, SyntaxError) else _place(error, folder / "checks")
        if isinstance(error, NotImplementedError) and place and not str(error):  # PyTorch's own has a message
            return "to do", f"not written yet: {place}"
        said = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
        said = f"{place}: {said}" if place else said
        return "failed", f"{said} (called by checks/{called})" if called else said
    return "passed", shown or ""


def _place(error: BaseException, folder: pathlib.Path) -> str | None:
    """File, line and function in `folder` that an error came through last; None if through none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{pathlib.Path(error.filename).name}:{error.lineno}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if pathlib.Path(f.filename).parent == folder]
    return (
        f"{pathlib.Path(frames[-1].filename).name}:{frames[-1].lineno}, in {frames[-1].name}" if frames else None
    )


@contextlib.contextmanager
def _importing_from(folder: pathlib.Path) -> Iterator[None]:
    """Import the learner's modules from `folder` afresh, and forget them afterwards; write no bytecode there."""
    stems = {e.stem for e in EXERCISES}

    def forget() -> None:
        for name in stems & set(sys.modules):
            del sys.modules[name]

    forget()
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.dont_write_bytecode = before
        forget()


def _load(path: pathlib.Path) -> object:
    """The module of a file that is not imported by name."""
    spec = importlib.util.spec_from_file_location(f"check_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _is_course(folder: pathlib.Path) -> bool:
    return any((folder / f"{e.stem}.py").exists() for e in EXERCISES)


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _list() -> str:
    return "\n".join(f"{e.number}. [{e.title}](texts/{e.stem}.md): `{e.stem}.py`" for e in EXERCISES)
