"""Whether a task of lm-eval exists, from the text of its files.

lm-eval takes a second to import, and ten to index its 14,000 files; searching them for a name takes half a second.
A name that no file contains is no task. One that a file contains may be one: lm-eval's own index decides.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence

from ..errors import EvaluationError

TASKS = pathlib.Path(__file__).with_name("tasks")  # small tasks with their data, which need no network
DEFINING = (".yaml", ".yml", "_yaml", ".py")  # ends of the names of files that may define a task
NAMED = re.compile(rb"""^\W*(?:task|group|tag)["']?[ \t]*:[ \t]*["']?([\w.:-]+)""", re.MULTILINE)


def path_or_name(task: str) -> str:
    """A task's name, or the path of its YAML file with the home folder expanded."""
    return str(pathlib.Path(task).expanduser()) if task.endswith((".yaml", ".yml")) else task


def folders_of(include: str | pathlib.Path | None) -> list[pathlib.Path]:
    """TASKS and the folder `include`. EvaluationError if there is no such folder."""
    folders = [TASKS, *([pathlib.Path(include).expanduser()] if include is not None else [])]
    if not folders[-1].is_dir():
        raise EvaluationError("there is no such folder", field="--include", place=include)
    return folders


def check_names(tasks: Sequence[str], include: str | pathlib.Path | None = None) -> None:
    """EvaluationError for a folder or file that does not exist, and for a name that no file contains."""
    folders = folders_of(include)
    missing = {name for name in map(path_or_name, tasks) if not pathlib.Path(name).is_file()}
    for name in sorted(missing):
        if name.endswith((".yaml", ".yml")):
            raise EvaluationError("there is no such file", field="--tasks", place=name)
    found = importlib.util.find_spec("lm_eval")
    places = found.submodule_search_locations if found is not None else None
    names: set[str] = set()
    for folder in [*folders, *(pathlib.Path(place) / "tasks" for place in places or ())]:
        if not missing:
            return
        for text in _texts(folder):
            missing -= {name for name in missing if name.encode() in text}
            names.update(name.decode() for name in NAMED.findall(text))
    if missing:
        raise no_task(min(missing), names)


def _texts(folder: pathlib.Path) -> Iterator[bytes]:
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            if name.endswith(DEFINING) and os.path.isfile(path):
                with contextlib.suppress(OSError), open(path, "rb") as file:  # lm-eval's index tells
                    yield file.read()


def no_task(name: str, known: Iterable[str]) -> EvaluationError:
    """The error for a task that there is none of, with up to three near names of those known."""
    lower = {each.lower(): each for each in known}
    close = [lower[each] for each in difflib.get_close_matches(name.lower(), lower, n=3)]
    return EvaluationError(
        f"there is no task {name!r}",
        field="--tasks",
        hint=f"did you mean {' or '.join(map(repr, close))}?" if close else
        "name one of lm-eval's (`lm_eval ls tasks`), one in the folder of --include, or a YAML file",
    )  # fmt: skip
