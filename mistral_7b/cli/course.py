"""`mistral-7b course`: write the course, check a learner's exercises, show a solution."""

from __future__ import annotations

import dataclasses
import pathlib
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import tyro

from .inputs import UsageError, busy, read_flags

if TYPE_CHECKING:
    from ..course.exercises import Exercise
    from ..course.folder import Result

Folder = Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="[DIR]")]
WIDTH = 40  # of the titles


@dataclasses.dataclass(frozen=True)
class Course:
    """Write 14 exercises that rebuild the model, from RMSNorm to a paged, quantized decoder; check them.

    Files that are in the folder already are never changed.
    """

    folder: Folder = pathlib.Path("mistral-course")
    """The learner's folder."""
    check: Annotated[tuple[int, ...] | None, tyro.conf.arg(metavar="[N ...]")] = None
    """Check these exercises; without a number all of them."""
    solution: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Print this exercise with the package's own code."""


def run(argv: list[str]) -> int:
    args = read_flags(Course, "course", argv)
    from ..course.exercises import EXERCISES, exercise
    from ..course.skeleton import solution

    if args.check is not None and args.solution is not None:
        raise UsageError("--check and --solution are two commands: give one of them", field="--solution")
    if args.solution is not None:
        print(solution(exercise(args.solution)), end="")
        return 0
    if args.check is not None:
        return _check(args.folder, [exercise(n) for n in args.check] or EXERCISES)
    return _write(args.folder)


def _write(folder: pathlib.Path) -> int:
    from ..course.folder import write

    written, kept = write(folder)
    if not written:
        print(f"{folder} holds the course: all {kept} files are there, and none was changed")
        return 0
    print(f"{written} files are written to {folder}" + (f"; {kept} that were there are unchanged" if kept else ""))
    print(f"Begin with {folder / 'README.md'}; `mistral-7b course {folder} --check 1` checks the first exercise.")
    return 0


def _check(folder: pathlib.Path, exercises: Sequence[Exercise]) -> int:
    """Check exercises in order and print a row for each; 0 if all passed, 1 otherwise."""
    from ..course.folder import check

    results = []
    for exercise in exercises:
        try:
            with busy(f"{exercise.number} {exercise.title}"):
                result = check(folder, exercise)
        except KeyboardInterrupt as error:
            _say_where(error, folder)
            raise
        results.append(result)
        print(
            f"{exercise.number:>2}  {exercise.title:<{WIDTH}}{result.state:<8}{result.seconds:>6.1f} s", flush=True
        )
    passed = [r for r in results if r.state == "passed"]
    if len(results) > 1:
        print(f"\n{len(passed)} of {len(results)} passed")
    _print_details(folder, results)
    return 0 if len(passed) == len(results) else 1


def _print_details(folder: pathlib.Path, results: Sequence[Result]) -> None:
    """What the first exercise that has not passed lacks, and what single checks show."""
    open_ones = [r for r in results if r.state != "passed"]
    if open_ones:
        first = open_ones[0]
        print(f"\nExercise {first.exercise.number}: {first.said}")
        print(f"What is to be done: {folder / 'texts' / first.exercise.stem}.md")
    elif results[-1].said:
        print(f"\n{results[-1].said}")


def _say_where(error: BaseException, folder: pathlib.Path) -> None:
    """On Ctrl-C, the line of the learner's code that was running: likely an endless loop."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if pathlib.Path(f.filename).parent == folder.resolve()
    ]
    if frames:
        print(
            f"\ninterrupted at {pathlib.Path(frames[-1].filename).name}:{frames[-1].lineno}, in {frames[-1].name}"
        )
